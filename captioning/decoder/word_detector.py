"""Where in an image each word is seen, learned from captions, which say only that it is there.

A detector must find each word of the captions at some location, and not in images whose captions do not have it. So it
learns where the word is (multiple-instance learning with a noisy-or: Fang et al., 2015, arXiv 1411.4952). It takes the
captioner's encoded features as they are: no gradient reaches them, and its own are clipped apart. So captions are the
same with it or without. Letters of shapes as in model.py; W counts the words in the captions of a batch.
"""

import keras
import tensorflow as tf
from keras import layers

from captioning.vocabulary import PAD, SPECIAL_WORDS
from support.distribution import sum_replicas

# At first all locations together see a word in 6 % of the images: most words of a batch are in the captions of few.
_FIRST_BIAS = -7.0
# At each step the detector learns from one of so many captions. It learns soon, and all would take four times as long.
_STEPS_BETWEEN_TURNS = 4


class WordDetector(layers.Layer):
    """How much each location shows of each word: softplus(encoded feature . kernel of the word + its bias).

    These are rates of independent sightings. A word is seen in an image with probability 1 - exp(-their sum), and each
    location has its share of the sum in that.

    Args:
      vocab_size: int, V.
      precision: Keras dtype policy of the product.

    Call:
      encoded_features: float (B, P, D)
      words: int (W,)

    Returns:
      sightings: float (B, P, W)
    """

    def __init__(self, vocab_size, precision="float32"):
        super().__init__(autocast=False)
        self.vocab_size = vocab_size
        self.product_type = keras.DTypePolicy(precision).compute_dtype

    def build(self, shape):
        self.kernel = self.add_weight(shape=(self.vocab_size, shape[-1]), initializer="zeros", name="kernel")  # (V, D)
        first = keras.initializers.Constant(_FIRST_BIAS)
        self.bias = self.add_weight(shape=(self.vocab_size,), initializer=first, name="bias")  # (V,)

    def call(self, encoded_features, words):
        kernel = tf.gather(self.kernel, words)  # (W, D)
        encoded_features, kernel = (tf.cast(x, self.product_type) for x in (encoded_features, kernel))
        products = tf.cast(tf.tensordot(encoded_features, kernel, [[2], [1]]), tf.float32)  # (B, P, W)
        return tf.nn.softplus(products + tf.gather(self.bias, words))  # (B, P, W)


def detection_loss(detector, captions, encoded_features, step):
    """Cross-entropy of whether each word is said of each image, for the captions whose turn it is.

    Args:
      detector: WordDetector
      captions: int (B, T)
      encoded_features: float (B, P, D); they get no gradient.
      step: int (), steps taken before. Which captions have their turn depends on it and on their words alone, so that
        the number of replicas changes nothing.

    Returns:
      float (): nats, summed over images and the words that any of these captions says, and divided by how many are
      said, of all replicas; this replica's part of the sum. <unk> and <end> are no words, a row of <pad> no caption.
    """
    has_turn = (tf.reduce_sum(captions, axis=1) + tf.cast(step, captions.dtype)) % _STEPS_BETWEEN_TURNS == 0  # (B,)
    has_turn &= tf.reduce_any(captions != PAD, axis=1)  # (B,)
    captions, encoded_features = (tf.boolean_mask(x, has_turn) for x in (captions, encoded_features))  # (b, ...)
    said = _said_words(captions, detector.vocab_size)  # (b, V)
    in_batch = sum_replicas(tf.reduce_sum(said, axis=0))  # (V,)
    # <pad> is always among the words, said of no image: workers cannot exchange a gradient without rows.
    words = tf.cast(tf.where((in_batch > 0) | (tf.range(detector.vocab_size) == PAD))[:, 0], tf.int32)  # (W,)
    sums = tf.reduce_sum(detector(tf.stop_gradient(encoded_features), words), axis=1)  # (b, W)
    losses = _cross_entropy(tf.gather(said, words, axis=1), sums)  # (b, W)
    return tf.math.divide_no_nan(tf.reduce_sum(losses), tf.reduce_sum(in_batch))


def _said_words(captions, vocab_size):
    """Which words each caption says, special ones apart. int (B, T) -> float (B, V) of 0 and 1."""
    rows = tf.broadcast_to(tf.range(tf.shape(captions)[0])[:, tf.newaxis], tf.shape(captions))  # (B, T)
    counts = tf.scatter_nd(tf.stack((rows, captions), 2), tf.ones_like(captions), (tf.shape(captions)[0], vocab_size))
    is_word = tf.range(vocab_size) >= len(SPECIAL_WORDS)  # (V,)
    return tf.cast((counts > 0) & is_word, tf.float32)  # (B, V)


def _cross_entropy(is_said, sums):
    """Of events of probability 1 - exp(-sum), in nats. float (B, W) of 0 and 1, float (B, W) -> (B, W)."""
    return (1 - is_said) * sums - is_said * tf.math.log(-tf.math.expm1(-sums) + 1e-20)  # (B, W)


def word_maps(detector, captions, encoded_features):
    """Of all that is seen of a word in its image, the share at each location; a map sums to 1.

    A word that the detector has not learned, such as <unk>, has a uniform map.

    Args:
      detector: WordDetector
      captions: int (B, T)
      encoded_features: float (B, P, D)

    Returns:
      float (B, T, P)
    """
    words, _ = tf.unique(tf.reshape(captions, (-1,)))  # (W,)
    sightings = detector(encoded_features, words)  # (B, P, W)
    shares = tf.math.divide_no_nan(sightings, tf.reduce_sum(sightings, axis=1, keepdims=True))  # (B, P, W)
    is_word = tf.cast(captions[:, :, tf.newaxis] == words, tf.float32)  # (B, T, W)
    return tf.einsum("btw,bpw->btp", is_word, shares)  # (B, T, P)
