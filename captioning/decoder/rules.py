"""What every way of decoding keeps to: words that are never said, repeats that are blocked, and when a caption ends.

Letters of shapes as in model.py; L is the length of decoded captions.
"""

from typing import NamedTuple

import tensorflow as tf

from captioning.vocabulary import END, PAD, START, UNK

_BANNED_WORDS = (PAD, UNK, START)
_BANNED_LOG_PROB = -1e9


class DecodedCaptions(NamedTuple):
    """B captions as the decoder said them.

    Attributes:
      words: int (B, L), token ids with <end>, then <pad>.
      log_probs: float (B, L), natural logarithm of each word's probability, among the words that can be said; 0 for
        <pad>.
      attention_weights: float (B, L, P)
    """

    words: tf.Tensor
    log_probs: tf.Tensor
    attention_weights: tf.Tensor


def has_ended(words):
    """Whether each caption's last word is <end> or comes after it. int (..., T) -> bool (...)."""
    return (words[..., -1] == END) | (words[..., -1] == PAD)


def next_word_log_probs(logits, words, repeat_block):
    """Log-probabilities of the next word, very low for words that may not be said.

    Probabilities are shared out among the words that the model can say: those that are never said have none of them,
    however high their logits are.

    Args:
      logits: float (B, V)
      words: int (B, T), what has been said, from <start> on.
      repeat_block: int, no sequence of so many words is said twice; 0 for no such rule.

    Returns:
      float (B, V)
    """
    log_probs = tf.nn.log_softmax(ban_words(logits))  # (B, V)
    # Behind the softmax: before it, a beam would gain the blocked words' probability for having to say another word.
    return _block_repeated_ngrams(log_probs, words, repeat_block) if repeat_block else log_probs


def ban_words(logits):
    """Make the words very unlikely that are never said. float (N, V) -> float (N, V)."""
    return logits + tf.reduce_sum(tf.one_hot(_BANNED_WORDS, logits.shape[-1], on_value=_BANNED_LOG_PROB), 0)  # (N, V)


def _block_repeated_ngrams(log_probs, words, length):
    """Make each next word very unlikely that would repeat a sequence of `length` words, 1 or more.

    float (B, V), int (B, T) -> float (B, V)
    """
    words = tf.pad(words, ((0, 0), (length, 0)))  # (B, length + T), long enough for what follows
    count = tf.shape(words)[1] - length + 1
    # Where the words before position i are the last words said, the word at i would complete a repeat.
    same = tf.ones_like(words[:, :count], tf.bool)  # (B, count)
    for i in range(length - 1):
        same &= words[:, i : i + count] == words[:, i - length + 1, tf.newaxis]  # (B, count)
    blocked = tf.where(same, words[:, length - 1 :], PAD)  # (B, count); <pad> is banned anyway
    rows = tf.repeat(tf.range(tf.shape(words)[0])[:, tf.newaxis], count, 1)  # (B, count)
    positions = tf.stack((rows, blocked), -1)  # (B, count, 2)
    return tf.tensor_scatter_nd_min(log_probs, positions, tf.fill(tf.shape(rows), _BANNED_LOG_PROB))
