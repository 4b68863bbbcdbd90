"""The vocabulary: words as token ids.

A token id is a word's position in the vocabulary. The first four positions belong to the special words.
"""

import collections

import numpy as np

from captioning.words import split_words
from support.errors import FileError
from support.files import read_json

SPECIAL_WORDS = ("<pad>", "<unk>", "<start>", "<end>")
PAD, UNK, START, END = range(4)


def build_vocabulary(captions, vocab_size):
    """Choose the most frequent words of the training captions.

    Args:
      captions: list of str.
      vocab_size: int, V, the largest number of words. The four special words count too.

    Returns:
      list of at most V str: the special words, then the others from the most frequent to the least.
    """
    counts = collections.Counter(word for caption in captions for word in split_words(caption))
    by_frequency = sorted(counts, key=lambda word: (counts[word], word), reverse=True)
    return [*SPECIAL_WORDS, *by_frequency[: vocab_size - len(SPECIAL_WORDS)]]


def encode_captions(captions, vocabulary):
    """Turn each caption into token ids: <start>, the words, <end>. A word outside the vocabulary is <unk>.

    list of N str, list of V str as `build_vocabulary` returns it -> list of N lists of int
    """
    ids = {word: i for i, word in enumerate(vocabulary)}
    return [[START, *(ids.get(word, UNK) for word in split_words(caption)), END] for caption in captions]


def log_frequency_bias(encoded_captions, vocab_size):
    """The output layer's bias before training: logarithms of the words' shares of all that the captions say.

    As in Karpathy's NeuralTalk (github.com/karpathy/neuraltalk). Half of each share is the same for every word, 1 / V:
    where rare words start at nearly 0, the training captions are sooner learned by heart.

    list of lists of token ids, <start> first; int V -> float (V,)
    """
    targets = np.concatenate([caption[1:] for caption in encoded_captions])
    shares = np.bincount(targets, minlength=vocab_size) / len(targets)  # (V,)
    return np.log((shares + 1 / vocab_size) / 2)  # (V,)


def read_vocabulary(path):
    """Read a vocabulary from its JSON file. path -> list of V different str, the special words first.

    Raises:
      FileError: the file is missing or damaged.
    """
    words = read_json(path, list)
    if not all(isinstance(word, str) for word in words) or tuple(words[: len(SPECIAL_WORDS)]) != SPECIAL_WORDS:
        raise FileError(path, "is damaged (it is not a list of words)")
    if len(set(words)) < len(words):
        raise FileError(path, "is damaged (it has a word twice)")
    return words
