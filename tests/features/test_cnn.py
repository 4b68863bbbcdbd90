"""Every network that --cnn names, and what must hold for all of them alike."""

import dataclasses
import hashlib
import inspect
import pathlib
import sys
import typing

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from captioning.features import cnn as cnns
from captioning.features.cnn import CNNS, preprocess
from captioning.features.extraction import extract_features
from captioning.features.frozen_graph import _OPERATIONS, _graph_function, _rewrite_graph
from captioning.features.network import _use_depthwise, feature_graph, load_cnn, network_identity
from captioning.settings import make_config
from config import Config
from support.errors import UserError
from support.process import release_memory

FAMILIES = ("VGG16", "EfficientNetV2B0", "ConvNeXtTiny")  # MobileNetV3Large: see test_another_cnn.py


def config_of(name, **settings):
    return make_config({"cnn": name, "inception_weights": "random", "extract_precision": "float32", **settings})


@pytest.fixture
def paths(tmp_path):
    """Two small images of smooth noise."""
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, image in zip(paths, np.random.default_rng(1).integers(0, 256, (2, 5, 5, 3), np.uint8), strict=True):
        Image.fromarray(image).resize((64, 48), Image.Resampling.BICUBIC).save(path)
    return paths


def test_the_setting_names_the_networks_of_the_table():
    assert set(typing.get_args(typing.get_type_hints(Config)["cnn"])) == CNNS.keys()
    assert Config().cnn == "InceptionV3"
    with pytest.raises(UserError, match="--cnn takes .*EfficientNetV2B0.*, not 'ResNet50'"):
        make_config({"cnn": "ResNet50"})


# --- What the table says, against Keras


@pytest.mark.parametrize("name", CNNS)
def test_pixels_are_prepared_as_keras_does_it(name):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3)).astype(np.float32)
    module = sys.modules[getattr(keras.applications, name).__module__]
    wanted = module.preprocess_input(pixels.copy())  # hands back pixels where the network prepares them itself
    np.testing.assert_allclose(preprocess(tf.constant(pixels), CNNS[name]), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CNNS)
def test_the_digest_is_that_of_kerass_weights_without_the_top(name):
    folder = pathlib.Path(inspect.getsourcefile(getattr(keras.applications, name))).parent
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*.py")]
    (text,) = (text for text in texts if f'"{CNNS[name].imagenet_digest}"' in text)
    before = text.partition(f'"{CNNS[name].imagenet_digest}"')[0][-300:]
    # It is named in a call for that file, or comes second in a pair whose first is that of the weights with the top.
    assert "NO_TOP" in before or before.rstrip().endswith('",')


def slow_but(quick, names):
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_but("EfficientNetV2B0", FAMILIES))
def test_a_network_of_random_weights_gives_its_grid_of_features(name, paths, tmp_path):
    """By the graph that is kept beside a run."""
    config, cnn, statistics = config_of(name), CNNS[name], tmp_path / "statistics.npz"
    function = feature_graph(config, statistics, paths).get_concrete_function()
    assert [tensor.name for tensor in function.inputs] == ["pixels:0"]  # all else is in the graph, as ONNX needs it
    graph = function.graph.as_graph_def()
    del function
    release_memory()  # before rewriting takes a dozen copies of the weights
    kept = _rewrite_graph(graph, "float32")
    assert {node.op for node in kept.node} <= _OPERATIONS and not kept.library.function
    ((done, features, failed),) = extract_features(_graph_function(kept), cnn, paths, 2)
    assert (done, failed) == (paths, [])
    assert features.shape == (2, *cnn.feature_shape) and features.dtype == np.float32
    assert 1e-3 < features.std() and np.abs(features).max() < np.finfo(np.float16).max  # false for NaN
    assert np.abs(features[0] - features[1]).mean() > 0.05 * features.std()
    assert network_identity(config, statistics).startswith(f"{name}, random weights of seed 42 and calibration ")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CNNS.keys() - {*FAMILIES, "InceptionV3", "MobileNetV3Large"}))
def test_the_others_have_the_grid_of_the_table(name):
    cnn = CNNS[name]
    assert load_cnn(cnn, "random", "float32").output_shape == (None, cnn.grid_size, cnn.grid_size, cnn.channels)


@pytest.mark.slow
def test_convolutions_in_groups_are_depthwise_and_compute_the_same():
    image = keras.Input((9, 9, 4))
    hidden = keras.layers.Conv2D(4, 3, padding="same", groups=4, bias_initializer="normal", name="grouped")(image)
    model = keras.Model(image, keras.layers.Conv2D(2, 1)(hidden))
    changed = _use_depthwise(model)
    assert isinstance(changed.get_layer("grouped"), keras.layers.DepthwiseConv2D)
    pixels = np.random.default_rng(0).standard_normal((2, 9, 9, 4)).astype(np.float32)
    np.testing.assert_allclose(changed(pixels), model(pixels), rtol=1e-4, atol=1e-5)


def test_the_papers_grid_of_vgg():
    """196 annotation vectors of 512 numbers (section 4.3), from before the last pooling."""
    assert CNNS["VGG16"].feature_shape == (196, 512)
    assert CNNS["VGG16"].grid_layer == "block5_conv3"


# --- Weights by name and by path


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_imagenet_and_the_file_of_its_weights_are_one_network(tmp_path, monkeypatch, algorithm):
    file = tmp_path / "notop.h5"
    file.write_bytes(b"weights")
    cnn = CNNS["MobileNetV3Large"]
    known = dataclasses.replace(cnn, imagenet_digest=hashlib.new(algorithm, b"weights").hexdigest())
    monkeypatch.setitem(cnns.CNNS, cnn.name, known)
    by_name, by_path = (config_of(cnn.name, inception_weights=weights) for weights in ("imagenet", str(file)))
    assert network_identity(by_name) == network_identity(by_path) == "MobileNetV3Large, weights imagenet"
    file.write_bytes(b"other weights")
    assert network_identity(by_path).startswith("MobileNetV3Large, weights of SHA-256 ")


@pytest.mark.slow
def test_keras_is_asked_for_the_weights_of_the_digest(tmp_path, monkeypatch):
    cnn, file, asked = CNNS["MobileNetV3Large"], tmp_path / "downloaded.weights.h5", []
    model = load_cnn(cnn, "random", "float32")
    model.save_weights(file)

    def get_file(*args, file_hash, **kwargs):
        asked.append(file_hash)
        return str(file)

    monkeypatch.setattr("keras.src.utils.file_utils.get_file", get_file)
    loaded = load_cnn(cnn, "imagenet", "float32")
    assert asked == [cnn.imagenet_digest]
    for wanted, found in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(found, wanted)
