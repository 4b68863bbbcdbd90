"""InceptionV3's weights as bfloat16 numbers, chosen so that its features stay as near to float32's as they can.

A bfloat16 number has 8 significant bits. If each weight is rounded for itself, its error is the same in every image and
at every location. These errors add up, and they are most of what is lost. Two properties of the network avoid most of
it, and no data are needed (Nagel et al., 2019, arXiv 1906.04721):

- ReLU and pooling pass on a positive factor. A channel may therefore be multiplied by one, if the next kernels are
  divided by it.
- Batch norm tells the mean of each channel. Rounding errors can therefore be made to cancel at the mean.
"""

import math

import keras
import numpy as np
import tensorflow as tf

_BFLOAT16 = tf.bfloat16.as_numpy_dtype
_PIXEL_FACTOR = 255.0  # (2 * pixels - 255) / (pixels / 127.5 - 1)
_LEAST_MEAN = 1e-6


def round_weights(inception):
    """Fold batch norm into the convolutions and round kernels and biases to bfloat16, all in place.

    After that the network takes 2 * pixels - 255 instead of pixels / 127.5 - 1. These are whole numbers, which bfloat16
    holds exactly.

    Args:
      inception: Keras model, InceptionV3 without its top.

    Returns:
      float64 (F,): the network's features must be divided by these factors.
    """
    # For each tensor of the network its channels' factors and means, (2, channels).
    known = {inception.input: np.stack([np.full(3, _PIXEL_FACTOR), np.ones(3)])}
    convolutions = {}
    for layer in inception.layers[1:]:
        channels = np.concatenate([known[tensor] for tensor in keras.tree.flatten(layer.input)], axis=1)  # (2, inputs)
        if isinstance(layer, keras.layers.Conv2D):
            convolutions[layer.output] = layer
        elif isinstance(layer, keras.layers.BatchNormalization):
            channels = _round_layer(convolutions[layer.input], layer, *channels)  # (2, outputs)
        known[layer.output] = channels
    return known[inception.output][0]  # (F,)


def _round_layer(convolution, norm, factors, means):
    """Fold a batch norm into its convolution and round both, in place.

    A bias is not rounded. Instead its channel is multiplied by the factor that makes the bias a bfloat16 number. The
    kernels of the next layers are divided by that factor.

    Args:
      convolution: Keras Conv2D layer without a bias.
      norm: Keras BatchNormalization layer behind it, without a scale.
      factors: (inputs,), by which the input's channels are too large.
      means: (inputs,), approximate means of the input's channels.

    Returns:
      float64 (2, outputs): factors and means of the channels behind the ReLU.
    """
    scale = 1 / np.sqrt(norm.moving_variance.numpy().astype(np.float64) + norm.epsilon)  # (outputs,)
    kernel = convolution.kernel.numpy() * scale / factors[:, np.newaxis]  # (height, width, inputs, outputs)
    beta = norm.beta.numpy().astype(np.float64)  # (outputs,)
    bias = beta - norm.moving_mean.numpy() * scale  # (outputs,)
    exact = bias.astype(_BFLOAT16).astype(np.float64)  # (outputs,)
    factor = np.divide(exact, bias, out=np.ones_like(bias), where=exact != 0)  # (outputs,)

    convolution.kernel.assign(_round_kernel(kernel * factor, means))
    norm.beta.assign(exact)
    norm.moving_mean.assign(np.zeros_like(bias))
    norm.moving_variance.assign(np.ones_like(bias))
    norm.epsilon = 0.0

    # Batch norm leaves a channel of mean beta and variance 1. Taken as normal, this is its mean behind a ReLU
    # (Nagel et al., appendix C).
    share_above_zero = np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in beta])  # (outputs,)
    mean = beta * share_above_zero + np.exp(-(beta**2) / 2) / math.sqrt(2 * math.pi)  # (outputs,)
    return np.stack([factor, np.maximum(factor * mean, _LEAST_MEAN)])  # (2, outputs)


def _round_kernel(kernel, means):
    """Round a kernel so that each output hardly changes while every input is at its mean.

    The change is at most the rounding error of one weight. Each weight passes what it loses on to the next one. The
    order is from inputs of small mean to inputs of large mean, so that the part passed on never grows.

    Args:
      kernel: (height, width, inputs, outputs).
      means: (inputs,), positive.

    Returns:
      (height, width, inputs, outputs), bfloat16 numbers in the type of `kernel`.
    """
    height, width, inputs, outputs = kernel.shape
    order = np.argsort(means)
    wanted = kernel.transpose(2, 0, 1, 3)[order].reshape(-1, outputs)  # (inputs * height * width, outputs)
    rounded = np.empty_like(wanted)
    lost = np.zeros(outputs)
    for row, mean in enumerate(np.repeat(means[order], height * width)):
        weights = wanted[row] + lost / mean  # (outputs,)
        rounded[row] = weights.astype(_BFLOAT16)
        lost = (weights - rounded[row]) * mean  # (outputs,)
    rounded = rounded.reshape(inputs, height, width, outputs)[np.argsort(order)]  # (inputs, height, width, outputs)
    return rounded.transpose(1, 2, 0, 3)  # (height, width, inputs, outputs)
