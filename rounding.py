"""InceptionV3's weights as bfloat16 numbers, chosen so that its features stay as near float32's as they can.

bfloat16 keeps 8 bits of a number. Rounded one by one, weights are off by the same amounts in every image and at every
location, and that is most of the error. Two properties of the network avoid most of it without data (Nagel et al.,
2019, arXiv 1906.04721): ReLU and pooling hand a channel's factor on, and batch norm says what a channel's mean is.
"""

import math

import keras
import numpy as np
import tensorflow as tf

BFLOAT16 = tf.bfloat16.as_numpy_dtype
PIXEL_FACTOR = 255.0  # InceptionV3 expects pixels / 127.5 - 1, which 2 * pixels - 255 is the whole number of
LEAST_MEAN = 1e-6


def round_weights(inception):
    """Fold batch norm into the convolutions and make kernels and biases bfloat16 numbers, all in place.

    The network then takes 2 * pixels - 255, whole numbers that bfloat16 holds, instead of pixels / 127.5 - 1.

    Args:
      inception: Keras model, InceptionV3 without its top.

    Returns:
      float64 (F,), by what each channel of the features must be divided
    """
    known = {inception.input: np.stack([np.full(3, PIXEL_FACTOR), np.ones(3)])}  # a channel's factor and its mean
    convolutions = {}
    for layer in inception.layers[1:]:
        channels = np.concatenate([known[tensor] for tensor in keras.tree.flatten(layer.input)], axis=1)  # (2, inputs)
        if isinstance(layer, keras.layers.Conv2D):
            convolutions[layer.output] = layer
        elif isinstance(layer, keras.layers.BatchNormalization):
            channels = round_layer(convolutions[layer.input], layer, *channels)  # (2, outputs)
        known[layer.output] = channels
    return known[inception.output][0]


def round_layer(convolution, norm, factors, means):
    """Round one convolution, its batch norm folded in.

    A bias is not rounded: its whole channel is multiplied by what makes it a bfloat16 number, and the kernels of the
    next layers are divided by that factor.

    Args:
      factors: (inputs,), by how much the input's channels are too large.
      means: (inputs,), about what they are on average.

    Returns:
      float64 (2, outputs): factors and means of the channels behind the ReLU
    """
    scale = 1 / np.sqrt(norm.moving_variance.numpy().astype(np.float64) + norm.epsilon)  # (outputs,)
    kernel = convolution.kernel.numpy() * scale / factors[:, np.newaxis]  # (height, width, inputs, outputs)
    beta = norm.beta.numpy().astype(np.float64)
    bias = beta - norm.moving_mean.numpy() * scale
    exact = bias.astype(BFLOAT16).astype(np.float64)
    factor = np.divide(exact, bias, out=np.ones_like(bias), where=exact != 0)  # (outputs,)

    convolution.kernel.assign(round_kernel(kernel * factor, means))
    norm.beta.assign(exact)
    norm.moving_mean.assign(np.zeros_like(bias))
    norm.moving_variance.assign(np.ones_like(bias))
    norm.epsilon = 0.0

    # Of a normal variable with mean beta and variance 1, as batch norm leaves it, behind a ReLU (their appendix C).
    above = np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in beta])
    mean = beta * above + np.exp(-(beta**2) / 2) / math.sqrt(2 * math.pi)
    return np.stack([factor, np.maximum(factor * mean, LEAST_MEAN)])


def round_kernel(kernel, means):
    """Round a kernel so that its sum over inputs, each at its mean, changes by no more than one weight's rounding.

    What a weight loses, the next one gets, from channels of small mean to those of large, so that it never grows.

    Args:
      kernel: (height, width, inputs, outputs).
      means: (inputs,), positive.
    """
    height, width, inputs, outputs = kernel.shape
    order = np.argsort(means)
    wanted = kernel.transpose(2, 0, 1, 3)[order].reshape(-1, outputs)
    rounded = np.empty_like(wanted)
    lost = np.zeros(outputs)
    for row, mean in enumerate(np.repeat(means[order], height * width)):
        weights = wanted[row] + lost / mean
        rounded[row] = weights.astype(BFLOAT16)
        lost = (weights - rounded[row]) * mean
    rounded = rounded.reshape(inputs, height, width, outputs)[np.argsort(order)]
    return rounded.transpose(1, 2, 0, 3)
