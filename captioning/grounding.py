"""Where a word is seen: words are predicted from single locations, and attention is taught to look there.

Captions say which words a picture shows, but not where. A detector that must find each word of the captions at some
location, and not in pictures that nobody said it of, learns where (multiple-instance learning with a noisy-or: Fang et
al., 2015, arXiv 1411.4952). Attention is chosen before the word is known and costs the caption little where it is
wrong; with the detector's map as its target it learns to be where the coming word is seen. Letters of shapes as in
model.py; W counts the words that the captions of a batch say.
"""

import keras
import tensorflow as tf
from keras import layers

from captioning.distribution import sum_replicas
from captioning.vocabulary import PAD, SPECIAL_WORDS

# At first all locations together see a word in 6 % of the pictures, which is about how rare words are.
FIRST_BIAS = -7.0


class WordDetector(layers.Layer):
    """How much each location shows each word: softplus(encoded feature . kernel of the word + its bias).

    These are rates of independent sightings: a word is seen in a picture with probability 1 - exp(-their sum), and if
    it is, a location has its share of the sum in it.

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
        first = keras.initializers.Constant(FIRST_BIAS)
        self.bias = self.add_weight(shape=(self.vocab_size,), initializer=first, name="bias")  # (V,)

    def call(self, encoded_features, words):
        kernel = tf.gather(self.kernel, words)  # (W, D)
        encoded_features, kernel = (tf.cast(x, self.product_type) for x in (encoded_features, kernel))
        products = tf.cast(tf.tensordot(encoded_features, kernel, [[2], [1]]), tf.float32)  # (B, P, W)
        return tf.nn.softplus(products + tf.gather(self.bias, words))  # (B, P, W)


def grounding_losses(detector, captions, encoded_features, attention_weights):
    """What teaches the detector, and what teaches attention to look where the detector sees the word to be said.

    The words are all that the whole batch says, but for <unk> and <end>. The maps of the detector are targets only:
    attention does not teach the detector.

    Args:
      detector: WordDetector
      captions: int (B, T)
      encoded_features: float (B, P, D)
      attention_weights: float (B, T-1, P)

    Returns, as this replica's share of the means over all replicas:
      detection: float (), cross-entropy in nats of whether each word is said of each picture, summed over the words of
        the batch and divided by how many are said.
      guidance: float (), divergence in nats of attention from the detector's map, KL(map || attention), mean over the
        words said.
    """
    targets = captions[:, 1:]  # (B, T-1)
    said = said_words(targets, detector.vocab_size)  # (B, V)
    in_batch = sum_replicas(tf.reduce_sum(said, axis=0))  # (V,)
    words = tf.cast(tf.where(in_batch > 0)[:, 0], tf.int32)  # (W,)
    sightings = detector(encoded_features, words)  # (B, P, W)
    is_caption = tf.cast(tf.reduce_any(targets != PAD, axis=1, keepdims=True), tf.float32)  # (B, 1)
    detections = detection_losses(tf.gather(said, words, axis=1), sightings) * is_caption  # (B, W)
    maps = tf.stop_gradient(word_maps(sightings, words, targets))  # (B, T-1, P)
    guidances = divergences(maps, attention_weights)  # (B, T-1)
    num_words = sum_replicas(tf.reduce_sum(tf.cast(targets >= len(SPECIAL_WORDS), tf.float32)))
    return (
        tf.math.divide_no_nan(tf.reduce_sum(detections), tf.reduce_sum(in_batch)),
        tf.math.divide_no_nan(tf.reduce_sum(guidances), num_words),
    )


def said_words(targets, vocab_size):
    """Which words each caption says, special ones apart. int (B, T-1) -> float (B, V) of 0 and 1."""
    rows = tf.broadcast_to(tf.range(tf.shape(targets)[0])[:, tf.newaxis], tf.shape(targets))  # (B, T-1)
    counts = tf.scatter_nd(tf.stack((rows, targets), 2), tf.ones_like(targets), (tf.shape(targets)[0], vocab_size))
    is_word = tf.range(vocab_size) >= len(SPECIAL_WORDS)  # (V,)
    return tf.cast((counts > 0) & is_word, tf.float32)  # (B, V)


def detection_losses(is_said, sightings):
    """Cross-entropy of whether each word is said of each picture. float (B, W) of 0 and 1, (B, P, W) -> (B, W)."""
    sums = tf.reduce_sum(sightings, axis=1)  # (B, W)
    return (1 - is_said) * sums - is_said * tf.math.log(-tf.math.expm1(-sums) + 1e-20)  # (B, W)


def word_maps(sightings, words, captions):
    """Of all that is seen of a word in its picture, the share at each location; a map sums to 1.

    Args:
      sightings: float (B, P, W)
      words: int (W,), all different.
      captions: int (B, T)

    Returns:
      float (B, T, P), 0 where a caption has a word that is not among `words`.
    """
    shares = tf.math.divide_no_nan(sightings, tf.reduce_sum(sightings, axis=1, keepdims=True))  # (B, P, W)
    is_word = tf.cast(captions[:, :, tf.newaxis] == words, tf.float32)  # (B, T, W)
    return tf.einsum("btw,bpw->btp", is_word, shares)  # (B, T, P)


def divergences(maps, attention_weights):
    """KL(map || attention) of each word in nats, 0 where the map is. float (B, T-1, P) twice -> (B, T-1)."""
    logs = tf.math.log(maps + 1e-10) - tf.math.log(attention_weights + 1e-10)  # (B, T-1, P)
    return tf.reduce_sum(maps * logs, axis=2)  # (B, T-1)
