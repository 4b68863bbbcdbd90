"""Captions as words, and words as token ids.

A word is a run of letters, digits and inner apostrophes, in lower case. A token id is a word's position in the
vocabulary. The first four positions belong to the special words.
"""

import keras
import numpy as np
import tensorflow as tf

from support.errors import UserError
from support.files import read_json

SPECIAL_WORDS = ("<pad>", "<unk>", "<start>", "<end>")
PAD, UNK, START, END = range(4)


def standardize(captions):
    """Turn captions into lower-case words with one blank between them.

    Args:
      captions: (N,) tensor or list of str.

    Returns:
      (N,) string tensor of letters, digits, inner apostrophes and single blanks.
    """
    captions = tf.strings.lower(captions, encoding="utf-8")
    captions = tf.strings.regex_replace(captions, r"[^\p{L}\p{M}\p{N}']+", " ")
    return tf.strings.strip(tf.strings.regex_replace(captions, r"(^|\s)'+|'+(\s|$)", " "))


def count_words(captions):
    """Count the words of each caption.

    Args:
      captions: list of N str.

    Returns:
      list of N int.
    """
    if not captions:
        return []
    return tf.strings.split(standardize(tf.constant(captions))).row_lengths().numpy().tolist()


def build_vocabulary(captions, vocab_size):
    """Choose the most frequent words of the training captions.

    Args:
      captions: list of str, not empty.
      vocab_size: int, V, the largest number of words. The four special words count too.

    Returns:
      list of at most V str: the special words, then the others from the most frequent to the least.
    """
    vectorizer = make_vectorizer(max_tokens=vocab_size - 2)  # Keras counts <pad> and <unk>, but not <start> and <end>
    vectorizer.adapt(captions)
    return [*SPECIAL_WORDS, *(str(word) for word in vectorizer.get_vocabulary()[2:])]


def encode_captions(captions, vocabulary):
    """Turn each caption into token ids.

    Args:
      captions: list of N str.
      vocabulary: list of V str, as `build_vocabulary` returns it.

    Returns:
      list of N lists of int: <start>, the words, <end>. A word outside the vocabulary is <unk>.
    """
    if not captions:
        return []
    encoded = make_vectorizer(vocabulary)(tf.constant(captions)).to_list()
    return [[START, *token_ids, END] for token_ids in encoded]


def log_frequency_bias(encoded_captions, vocab_size):
    """The output layer's bias before training: logarithms of the words' shares of all that the captions say.

    As in Karpathy's NeuralTalk (github.com/karpathy/neuraltalk). Half of each share is the same for every word, 1 / V:
    where rare words start at nearly 0, the training captions are sooner learned by heart.

    Args:
      encoded_captions: list of lists of token ids, <start> first.

    Returns:
      float (V,)
    """
    targets = np.concatenate([caption[1:] for caption in encoded_captions])
    shares = np.bincount(targets, minlength=vocab_size) / len(targets)  # (V,)
    return np.log((shares + 1 / vocab_size) / 2)  # (V,)


def make_vectorizer(vocabulary=None, max_tokens=None):
    """Make Keras's layer from captions (N,) to ragged token ids (N, words), without <start> and <end>."""
    words = None if vocabulary is None else vocabulary[START:]  # Keras itself puts <pad> and <unk> first
    return keras.layers.TextVectorization(max_tokens, standardize=standardize, ragged=True, vocabulary=words)


def read_vocabulary(path, remedy):
    """Read a vocabulary from its JSON file.

    Args:
      path: path of the file.
      remedy: str, which command mends a bad file. It ends the error's message.

    Returns:
      list of V different str, the special words first.

    Raises:
      UserError: the file is missing or damaged.
    """
    words = read_json(path, remedy, list)
    special = len(SPECIAL_WORDS)
    if not all(isinstance(word, str) for word in words) or tuple(words[:special]) != SPECIAL_WORDS:
        raise UserError(f"{path} is damaged (it is not a list of words): {remedy}")
    if len(set(words)) < len(words):
        raise UserError(f"{path} is damaged (it has a word twice): {remedy}")
    return words
