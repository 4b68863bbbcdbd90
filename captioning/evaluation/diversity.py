"""How much the captions of an image differ from each other."""

import dataclasses

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu

from captioning.words import split_words


@dataclasses.dataclass(frozen=True)
class Diversity:
    """What sets of captions, one set of each image, are like.

    Div-1, Div-2 and mBLEU are those of Shetty et al. (2017, arXiv 1703.10476), which Wang and Chan (2019, arXiv
    1903.12020) compare with others. They are of the project's own tokens. People's five captions of a COCO image have
    much higher Div and lower mBLEU than those of beams.

    Attributes:
      captions: int, of all images together.
      distinct: float, the share of different captions among these.
      div_1, div_2: float, the mean over images of how many different words (pairs of neighbouring words) a set has, for
        each word in it. 0 to 1; higher is more diverse.
      mbleu_4: float, BLEU-4 of each caption with the others of its set as references: for all first captions together,
        for all second ones, and so on, and the mean of these. 0 to 100; lower is more diverse. None without a set of
        two.
    """

    captions: int
    distinct: float
    div_1: float
    div_2: float
    mbleu_4: float | None

    def __str__(self):
        mbleu = "-" if self.mbleu_4 is None else f"{self.mbleu_4:.1f}"
        return (
            f"Div-1 {self.div_1:.3f}, Div-2 {self.div_2:.3f}, mBLEU-4 {mbleu}; "
            f"{100 * self.distinct:.1f} % of {self.captions} captions differ"
        )


def describe_diversity(sets):
    """The Diversity of some captions. list of lists of str, each one or more of one image -> Diversity."""
    captions = [caption for group in sets for caption in group]
    words = [[split_words(caption) for caption in group] for group in sets]
    return Diversity(
        captions=len(captions),
        distinct=len(set(captions)) / len(captions),
        div_1=float(np.mean([_distinct_ngrams(group, 1) for group in words])),
        div_2=float(np.mean([_distinct_ngrams(group, 2) for group in words])),
        mbleu_4=_mutual_bleu(words),
    )


def _distinct_ngrams(captions, length):
    """Different sequences of `length` words in captions, for each word in them. list of lists of str -> float."""
    found = {tuple(words[i : i + length]) for words in captions for i in range(len(words) - length + 1)}
    return len(found) / max(sum(map(len, captions)), 1)


def _mutual_bleu(sets):
    """BLEU-4 of captions against the others of their set, see Diversity. list of lists of lists of str -> float."""
    texts = [[" ".join(words) for words in captions] for captions in sets if len(captions) > 1]
    scores = []
    for place in range(max(map(len, texts), default=0)):
        having = {i: group for i, group in enumerate(texts) if place < len(group)}
        said = {i: [group[place]] for i, group in having.items()}
        others = {i: group[:place] + group[place + 1 :] for i, group in having.items()}
        bleu, _ = Bleu(4).compute_score(others, said, verbose=0)
        scores.append(100 * float(bleu[3]))
    return float(np.mean(scores)) if scores else None
