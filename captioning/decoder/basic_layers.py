"""Building blocks that compute what TensorFlow's own do, but faster.

Letters of shapes as in model.py.
"""

import keras
import tensorflow as tf


class MixedPrecisionDense(keras.layers.Dense):
    """A Dense layer whose product is computed in the number type of a Keras dtype policy.

    Inputs, outputs, weights and bias are float32 or are cast to it.

    Args:
      units: int, size of the outputs.
      precision: str, a Keras dtype policy such as mixed_bfloat16.
    """

    def __init__(self, units, precision="float32", **options):
        super().__init__(units, autocast=False, **options)
        self.product_type = keras.DTypePolicy(precision).compute_dtype

    def call(self, inputs):
        inputs, kernel = (tf.cast(x, self.product_type) for x in (inputs, self.kernel))
        outputs = tf.cast(tf.tensordot(inputs, kernel, 1), tf.float32)  # (..., units)
        return tf.nn.bias_add(outputs, self.bias) if self.use_bias else outputs


class _TrainingCall(keras.layers.Layer):
    """Keras tells the layers that are called in another's call what that was told of `training`."""

    def call(self, function=None, args=None):
        return function(*args)


def in_training(function, *args):
    """Call a function whose Keras layers, such as Dropout, are to behave as in training. Returns what it returns."""
    return _TrainingCall(name="training", autocast=False)(function=function, args=args, training=True)


@tf.custom_gradient
def softmax_cross_entropy(logits, words):
    """Cross-entropy of each word, in nats.

    On a CPU this is three times as fast as TensorFlow's own function, which does not use oneDNN.

    Args:
      logits: float (N, V)
      words: int (N,)

    Returns:
      float (N,)
    """
    probabilities = tf.nn.softmax(logits)  # (N, V)
    positions = tf.stack((tf.range(tf.size(words), dtype=words.dtype), words), axis=1)  # (N, 2)
    # The probability of the likeliest word is used: the word's own may be too small for a float.
    highest_log_prob = tf.math.log(tf.reduce_max(probabilities, axis=1))  # (N,)
    losses = tf.reduce_max(logits, axis=1) - highest_log_prob - tf.gather_nd(logits, positions)  # (N,)

    def gradient(d_losses):
        d_logits = probabilities * d_losses[:, tf.newaxis]  # (N, V)
        return tf.tensor_scatter_nd_sub(d_logits, positions, d_losses), None

    return losses, gradient
