"""A CNN without its top, from pixels to features, as one TensorFlow graph."""

import contextlib
import pathlib
import threading

import keras
import numpy as np
import tensorflow as tf

from captioning.features.cnn import CNNS, preprocess
from captioning.features.manifest import MADE_ELSEWHERE
from captioning.features.random_weights import (
    STATISTICS_REMEDY,
    calibrate,
    set_random_weights,
    set_statistics,
    write_statistics,
)
from support.devices import compute_capability, has_fast_bfloat16
from support.errors import UserError
from support.files import file_digest


def network_identity(config, statistics=None):
    """The name of the network, one line. Other weights have another name. Looks at no feature and no image.

    Args:
      config: Config. `cnn` names the network; `inception_weights` is "imagenet", "random" or the path of a weights
        file. The file that "imagenet" stands for is named as "imagenet" is, wherever it lies.
      statistics: path of the batch-norm statistics of random weights, which are a part of these, or None to name the
        seed alone. Other weights do not need it.

    Raises:
      UserError: the weights file or the statistics are missing.
    """
    weights = config.inception_weights
    if weights == "imagenet":
        return f"{config.cnn}, weights imagenet"
    if weights == "random":
        name = f"{config.cnn}, random weights of seed {config.seed}"
        if statistics is None:
            return name
        try:
            return f"{name} and calibration {file_digest(statistics)[:16]}"
        except OSError as error:
            kind = type(error).__name__
            raise UserError(f"{statistics} is missing or damaged ({kind}): {STATISTICS_REMEDY}") from None
    imagenet = CNNS[config.cnn].imagenet_digest
    try:
        if file_digest(weights, "md5" if len(imagenet) == 32 else "sha256") == imagenet:
            return f"{config.cnn}, weights imagenet"
        return f"{config.cnn}, weights of SHA-256 {file_digest(weights)[:16]}"
    except OSError:
        raise UserError(f"--inception_weights {weights} is not a file: name one, or take imagenet or random") from None


def feature_network(config, statistics=None, calibration_paths=None, expected_identity=None):
    """The network that computes features, for several threads. Arguments and errors are those of `feature_graph`.

    Returns a function of uint8 (B, side, side, 3) -> float32 (B, P, F).
    """
    return compiled_once(feature_graph(config, statistics, calibration_paths, expected_identity))


def feature_graph(config, statistics=None, calibration_paths=None, expected_identity=None):
    """Make the network that computes features.

    Args:
      config: Config, as `network_identity` takes it.
      statistics: path of the batch-norm statistics of random weights. Other weights do not need it.
      calibration_paths: list of training images. If there is no file `statistics`, it is made from them.
      expected_identity: str, what `network_identity` said of the network whose features a model was trained on. None
        stands for any.

    Returns:
      tf.function of uint8 (B, side, side, 3) -> float32 (B, P, F), without variables

    Raises:
      UserError: the weights or their statistics are missing or damaged, or the network is not the one expected.
    """
    cnn, is_random = CNNS[config.cnn], config.inception_weights == "random"
    check_identity(config, statistics, expected_identity)
    precision = extraction_precision(config)
    model = load_cnn(cnn, config.inception_weights, precision)
    if is_random:
        set_random_weights(model, config.seed)
        if calibration_paths is not None and not pathlib.Path(statistics).exists():
            values = calibrate(model, cnn, calibration_paths)
            if not pathlib.Path(statistics).exists():  # another shard may have been quicker
                write_statistics(statistics, values, network_identity(config))
        set_statistics(model, statistics, network_identity(config))

    # TensorFlow folds batch norm into the convolutions if the weights are constants. It cannot do so with variables.
    trainable = [variable.numpy() for variable in model.trainable_variables]
    others = [variable.numpy() for variable in model.non_trainable_variables]

    @tf.function(input_signature=[tf.TensorSpec((None, cnn.image_size, cnn.image_size, 3), tf.uint8)])
    def network(pixels):
        scaled = preprocess(tf.cast(pixels, tf.float32), cnn)
        constants = [tf.constant(value) for value in trainable], [tf.constant(value) for value in others]
        grid, _ = model.stateless_call(*constants, scaled, training=False)  # (B, grid_size, grid_size, F)
        return tf.cast(tf.reshape(grid, (-1, *cnn.feature_shape)), tf.float32)  # (B, P, F)

    return network


def compiled_once(graph):
    """A function that calls a graph. While its first call is at work, those of other threads wait.

    TensorFlow compiles a graph when it is first called: once for each thread that does so at the same time.
    """
    first, compiled = threading.Lock(), threading.Event()

    def call(pixels):
        with contextlib.nullcontext() if compiled.is_set() else first:
            result = graph(pixels)
            compiled.set()
        return result

    return call


def check_identity(config, statistics, expected):
    """Raise UserError if the network is not the one that made the features which a model was trained on.

    Args:
      config, statistics: as `network_identity` takes them.
      expected: str, what `network_identity` said of that network, MADE_ELSEWHERE, or None for any.
    """
    if expected == MADE_ELSEWHERE:
        raise UserError(
            "this model was trained on features made by another program, and only that program's network can read new "
            "images for it: train a model on features that python data_utils.py made"
        )
    identity = network_identity(config)
    if statistics and f"{expected} ".startswith(f"{identity} "):  # the seed fits, and the calibration may not
        identity = network_identity(config, statistics)
    if expected not in (None, identity):
        raise UserError(
            f"this model was trained on features of another network ({expected}) than the settings name ({identity}): "
            "give the --cnn, --inception_weights and --data_dir of its training, and random weights their statistics"
        )


# --- Number types -----------------------------------------------------------------------------------------------


def extraction_precision(config):
    """The number type that the CNN computes in: "float32", "bfloat16" or "float16".

    "auto" is the fastest on this machine, of those with which captions were seen to stay the same.
    """
    if config.extract_precision != "auto":
        return config.extract_precision
    if not CNNS[config.cnn].keeps_captions_in_bfloat16:
        return "float32"
    if has_fast_bfloat16():
        return "bfloat16"
    gpus = tf.config.list_physical_devices("GPU")
    return "float16" if gpus and compute_capability(gpus[0]) >= (7, 0) else "float32"


@contextlib.contextmanager
def extraction_graphs(config):
    """Let TensorFlow rewrite the graphs of this block so that extraction is fast.

    On a CPU this brings bfloat16 into the graph, where `extraction_precision` chooses it. A GPU's number type is part
    of the Keras model. The options hold for the whole process. Decoding stays out of the block: captions are computed
    in float32.
    """
    on_cpu = not tf.config.list_physical_devices("GPU")
    # The arithmetic optimizer moves ReLU behind pooling and concatenation, where no convolution can absorb it.
    _set_rewriting(bfloat16=on_cpu and extraction_precision(config) == "bfloat16", arithmetic=False)
    try:
        yield
    finally:
        _set_rewriting(bfloat16=False, arithmetic=True)


def _set_rewriting(bfloat16, arithmetic):
    tf.config.optimizer.set_experimental_options(
        {"auto_mixed_precision_onednn_bfloat16": bfloat16, "arithmetic_optimization": arithmetic}
    )


# --- Weights ----------------------------------------------------------------------------------------------------


def load_cnn(cnn, weights, precision):
    """Build Keras's model of a CNN, up to its grid.

    Args:
      weights: "imagenet", "random" or the path of a weights file.
      precision: "float32", "bfloat16" or "float16". The last two are for GPUs. On a CPU the model itself is float32.

    Raises:
      UserError: the weights cannot be downloaded, or the file is damaged or another network's.
    """
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(f"mixed_{precision}" if on_gpu and precision != "float32" else "float32")
        model = getattr(keras.applications, cnn.name)(
            include_top=False,
            weights=None if weights == "random" else weights,
            input_shape=(cnn.image_size, cnn.image_size, 3),
        )
        if cnn.grid_layer:
            model = keras.Model(model.input, model.get_layer(cnn.grid_layer).output)
        for layer in model.layers:
            if isinstance(layer, keras.layers.Normalization):  # its tensors would become inputs of an ONNX model
                layer.mean, layer.variance = np.asarray(layer.mean), np.asarray(layer.variance)
        return _use_depthwise(model)
    except Exception as error:  # a download or an HDF5 file raises errors of many classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{cnn.name} cannot take the weights {weights} ({reason}): "
            "name a weights file without the top by --inception_weights"
        ) from error
    finally:
        keras.config.set_dtype_policy(policy)


def _use_depthwise(model):
    """The same Keras model, with a DepthwiseConv2D for each convolution that has a group for each channel.

    Keras leaves convolutions in groups to XLA. That is slow on a CPU, and neither LiteRT nor ONNX can hold it.
    """
    in_groups = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D) and layer.groups > 1]
    if not in_groups:
        return model

    def replace(layer):
        if layer not in in_groups:
            return layer
        options = {"strides": layer.strides, "padding": layer.padding, "use_bias": layer.use_bias}
        return keras.layers.DepthwiseConv2D(layer.kernel_size, **options, dtype=layer.dtype_policy, name=layer.name)

    changed = keras.models.clone_model(model, clone_function=replace)
    for layer in in_groups:
        kernel, *bias = layer.get_weights()  # (height, width, 1, channels)
        changed.get_layer(layer.name).set_weights([kernel.transpose(0, 1, 3, 2), *bias])
    return changed
