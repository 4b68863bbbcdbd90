"""CIDEr-D of sampled captions against all references of their images: the reward of self-critical training.

CIDEr-D is from Vedantam et al., 2015 (arXiv 1411.5726). The arithmetic is pycocoevalcap's, which counts how many images
have an n-gram anew at each call. Here that is counted once, for the training images.
"""

import collections
import math

from pycocoevalcap.cider.cider_scorer import precook

from captioning.vocabulary import END, PAD, SPECIAL_WORDS
from captioning.words import split_words

_LONGEST_NGRAM = 4  # words
_SIGMA = 6.0  # words; a caption of another length than a reference's counts less, as a normal curve falls
_END_WORD = SPECIAL_WORDS[END]  # said at the end of references too, so that a caption that does not end is worth less


class CiderReward:
    """CIDEr-D with <end> as a word, or without, which is the CIDEr that captions are evaluated by.

    Args:
      references: list of N lists of str, the reference captions of each training image.
      vocabulary: list of V words.
    """

    def __init__(self, references, vocabulary):
        self.vocabulary = vocabulary
        self.references = [[" ".join(split_words(text)) for text in group] for group in references]
        self.log_images = math.log(len(references))
        frequencies = collections.Counter()  # of each n-gram: the images that have it in a reference
        for group in self.references:
            frequencies.update({ngram for text in group for ngram in precook(f"{text} {_END_WORD}", _LONGEST_NGRAM)})
        self.log_frequencies = {ngram: math.log(count) for ngram, count in frequencies.items()}

    def score(self, images, captions, with_end=True):
        """Score several captions of each of some images.

        Args:
          images: list of B int, positions in the references.
          captions: list of B lists of S captions, each a list of token ids with <end> and maybe <pad>.
          with_end: bool, whether <end> is a word, as a reward needs. Without it the mean over all images is the
            CIDEr of captioning.evaluation.metrics.cider_by_image.

        Returns:
          list of B lists of S float, each from 0 to 10
        """
        rewards = []
        for image, said in zip(images, captions, strict=True):
            end = f" {_END_WORD}" if with_end else ""
            references = [self.weigh_ngrams(text + end) for text in self.references[image]]
            left_out = (PAD,) if with_end else (PAD, END)
            texts = [" ".join(self.vocabulary[i] for i in words if i not in left_out) for words in said]
            rewards.append([_score_caption(self.weigh_ngrams(text), references) for text in texts])
        return rewards

    def weigh_ngrams(self, text):
        """A caption's n-grams by how telling they are.

        Returns:
          (weights, list of a dict of n-gram to float for each length; the norm of each; the words but one)
        """
        weights = [{} for _ in range(_LONGEST_NGRAM)]
        for ngram, count in precook(text, _LONGEST_NGRAM).items():
            weights[len(ngram) - 1][ngram] = count * (self.log_images - self.log_frequencies.get(ngram, 0.0))
        norms = [math.sqrt(sum(weight * weight for weight in each.values())) for each in weights]
        return weights, norms, max(len(text.split()) - 1, 0)


def _score_caption(caption, references):
    """CIDEr-D of a caption against references, all as `weigh_ngrams` returns them. Returns float."""
    weights, norms, length = caption
    total = 0.0
    for their_weights, their_norms, their_length in references:
        similarity = 0.0
        for ours, theirs, norm, their_norm in zip(weights, their_weights, norms, their_norms, strict=True):
            if norm and their_norm:
                shared = sum(min(ours[ngram], theirs[ngram]) * theirs[ngram] for ngram in ours.keys() & theirs.keys())
                similarity += shared / (norm * their_norm)
        total += similarity * math.exp(-((length - their_length) ** 2) / (2 * _SIGMA**2))
    return 10 * total / (_LONGEST_NGRAM * len(references))
