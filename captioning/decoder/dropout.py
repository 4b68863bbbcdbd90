"""Dropout whose masks can be drawn again: of a caption's words, and of an image's channels.

Letters of shapes as in model.py.
"""

import tensorflow as tf


def variational_dropout(x, rate, seed, layer):
    """Dropout that drops the same numbers at all words of a caption (Gal and Ghahramani, 2016, arXiv 1512.05287).

    Args:
      x: float (T, B, n)
      rate: float, share of the numbers that are dropped.
      seed: int (2,), or None for no dropout.
      layer: 0 or 1, which of the decoder's two dropouts this is.

    Returns:
      float (T, B, n)
    """
    if seed is None or not rate:
        return x
    return x * _dropout_mask(tf.shape(x)[1:], rate, (seed[0], 2 * seed[1] + layer))  # (T, B, n)


def channel_dropout(features, mean, rate, seed):
    """Dropout that makes channels of an image what they are on average, the same ones at all its locations.

    A few images can be learned by heart from single channels. So the encoder has to use many.

    Args:
      features: float (B, P, F)
      mean: float (F,), of each channel.
      rate: float, share of the channels that are dropped.
      seed: int (2,), or None for no dropout.

    Returns:
      float (B, P, F)
    """
    if seed is None or not rate:
        return features
    # A number below 0, which no word's mask has.
    mask = _dropout_mask(tf.shape(features)[::2], rate, (seed[0], -1 - seed[1]))  # (B, F)
    return mean + (tf.cast(features, tf.float32) - mean) * mask[:, tf.newaxis]  # (B, P, F)


def _dropout_mask(shape, rate, seed):
    """What numbers are multiplied by: 0 for those that are dropped, and more than 1 for the others.

    The mask depends on nothing but `seed`, so a resumed run draws the same one. Each replica draws the mask of the
    whole batch and takes its own rows, so the number of replicas changes nothing.

    (B, n), float, two ints that no other mask has -> float (B, n)
    """
    replica, (rows, size) = tf.distribute.get_replica_context(), tf.unstack(shape)
    shape = rows * replica.num_replicas_in_sync, size
    random = tf.random.stateless_uniform(shape, tf.stack(seed))
    kept = random[replica.replica_id_in_sync_group :: replica.num_replicas_in_sync] >= rate  # (B, n)
    return tf.cast(kept, tf.float32) / (1 - rate)  # (B, n)
