"""A network of random weights: drawn from a seed, its batch norm measured on training images."""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from captioning.features.cnn import preprocess
from captioning.features.image_files import load_image
from support.errors import UserError
from support.files import replacing

STATISTICS_REMEDY = (
    "without this file the same network cannot be made again, so copy it from the folder of the features, "
    "or delete the features and run python data_utils.py to make them anew"
)


def _all_layers(network):
    """The layers of a Keras model, and of the models in it."""
    for layer in network.layers:
        if isinstance(layer, keras.Model):
            yield from _all_layers(layer)
        else:
            yield layer


def _batch_norms(network):
    return [layer for layer in _all_layers(network) if isinstance(layer, keras.layers.BatchNormalization)]


def set_random_weights(network, seed):
    """Draw He-normal kernels from a seed (He et al., arXiv 1502.01852). All else is as Keras begins with it."""
    rng = np.random.default_rng(seed)
    for layer in _all_layers(network):
        if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D | keras.layers.Dense):
            is_depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            fan_in = np.prod(layer.kernel.shape[: 2 if is_depthwise else -1])
            layer.kernel.assign(rng.standard_normal(layer.kernel.shape, np.float32) * np.sqrt(2.0 / fan_in))


def calibrate(network, cnn, image_paths):
    """Measure the batch-norm statistics of random weights in one pass over images. Without them activations vanish.

    Args:
      network: Keras model. Its own statistics change.
      image_paths: list of image files. Those that cannot be read are left out: they are reported elsewhere.

    Returns:
      list of arrays: of each batch norm the mean, then the variance; empty for a network without batch norm

    Raises:
      UserError: no image can be read.
    """
    pixels = []
    for path in image_paths:
        with contextlib.suppress(ValueError):
            pixels.append(load_image(path, cnn.image_size))
    if not pixels:
        raise UserError("no training image can be read, and random weights need some: see --coco_dir or --images")
    norms = _batch_norms(network)
    for norm in norms:
        norm.momentum = 0.0
    for layer in _all_layers(network):
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0  # else two passes over the same images would differ
    # As a graph, which lets go of each layer's outputs: otherwise all are held, 9 GB.
    if norms:
        tf.function(network)(preprocess(tf.constant(np.stack(pixels), tf.float32), cnn), training=True)
    return [variable.numpy() for norm in norms for variable in (norm.moving_mean, norm.moving_variance)]


def write_statistics(path, values, identity):
    with replacing(path) as temporary:
        np.savez(temporary, *values, identity=identity)


def set_statistics(network, path, identity):
    """Set the batch-norm statistics to what `write_statistics` wrote.

    Args:
      identity: str, `network_identity`, without statistics, of the network that they must belong to.

    Raises:
      UserError: the file is missing or damaged, or belongs to another network.
    """
    variables = [variable for norm in _batch_norms(network) for variable in (norm.moving_mean, norm.moving_variance)]
    try:
        with np.load(path, allow_pickle=False) as saved:
            owner = str(saved["identity"])
            values = [saved[name] for name in saved.files if name != "identity"]
        if [value.shape for value in values] != [tuple(variable.shape) for variable in variables]:
            raise ValueError("these are not the statistics of this network")
        if not all(np.isfinite(value).all() for value in values):
            raise ValueError("a number is not finite")
    except Exception as error:  # a zip file and its arrays raise errors of many classes
        raise UserError(f"{path} is missing or damaged ({type(error).__name__}): {STATISTICS_REMEDY}") from error
    if owner != identity:
        problem = f"belongs to another network ({owner}) than the settings name ({identity})"
        raise UserError(f"{path} {problem}: {STATISTICS_REMEDY}")
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
