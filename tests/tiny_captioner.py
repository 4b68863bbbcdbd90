"""A captioner with drawn weights for tests that need captions, but no training and no InceptionV3."""

import numpy as np
import tensorflow as tf

from captioning.captioner import Captioner
from captioning.vocabulary import SPECIAL_WORDS
from model import build_captioner

SIZES = {"encoder_dim": 16, "embedding_dim": 12, "units": 32}
VOCABULARY = [*SPECIAL_WORDS, *(f"word{i}" for i in range(16)), "tüür"]
MIXED = [*SPECIAL_WORDS, *(f"word{i}" if i % 2 else chr(ord("一") + i) for i in range(len(VOCABULARY) - 4))]
NO_FEATURES = np.array([-0.7, 0.7])[:, None, None] + np.zeros((64, 2048))  # of mean 0 and some deviation


def tiny_captioner(config, features=NO_FEATURES, seed=1):
    """A Captioner whose captions are sure, and differ in words and lengths from image to image.

    Args:
      features: (B, P, F), what normalises features.
      seed: int, what the weights are drawn from.
    """
    encoder, decoder = build_captioner(config, len(VOCABULARY), features.mean((0, 1)), features.std())
    rng = np.random.default_rng(seed)
    for weight in decoder.trainable_weights:
        weight.assign(0.7 * rng.standard_normal(weight.shape))
    decoder.output_layer.kernel.assign(2 * decoder.output_layer.kernel)
    return Captioner(encoder, decoder, VOCABULARY, "best/ckpt-1")


def colour_network(pixels):
    """A stand-in for InceptionV3: features that depend on the mean colour alone. (B, 299, 299, 3) -> (B, P, F)."""
    noise = np.random.default_rng(0).standard_normal((64, 2048), np.float32)
    colours = tf.reduce_mean(tf.cast(pixels, tf.float32), (1, 2, 3))  # (B,)
    return tf.sin(colours[:, None, None] * noise)  # (B, P, F)
