import keras
import numpy as np
import pytest
from PIL import Image

from captioning.features import bfloat16_weights as rounding

SIZE = 139


@pytest.fixture(scope="module")
def pixels():
    coarse = np.random.default_rng(1).integers(0, 256, (24, 5, 5, 3), np.uint8)  # smooth, as most of a photograph is
    smooth = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in coarse]
    return np.stack(smooth).astype(np.float32)


@pytest.fixture
def inception(pixels):
    """A small InceptionV3 with random weights, whose batch norms have the statistics of the images."""
    keras.utils.set_random_seed(0)
    network = keras.applications.InceptionV3(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    rng = np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.beta.assign(rng.normal(0.1, 0.3, layer.beta.shape))
            layer.momentum = 0.0
    network(pixels / 127.5 - 1, training=True)
    return network


def is_bfloat16(values):
    return np.array_equal(values, np.asarray(values).astype(rounding._BFLOAT16).astype(np.float32))


def error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_the_network_is_the_same_but_for_the_rounding_of_kernels(inception, pixels, monkeypatch):
    wanted = inception(pixels / 127.5 - 1, training=False).numpy()
    assert wanted.std() > 0.01
    monkeypatch.setattr(rounding, "_round_kernel", lambda kernel, means: kernel)
    factors = rounding.round_weights(inception)
    assert factors.shape == (2048,)
    assert 0.003 < np.abs(factors - 1).max() < 0.004  # half a step of bfloat16, which is at most 1 / 128
    found = inception(2 * pixels - 255, training=False).numpy()
    assert error(found / factors, wanted) < 2e-4
    assert error(found, wanted) > 1e-3  # so that missing factors would be noticed


def test_every_weight_is_a_bfloat16_number_and_the_features_are_nearer_than_by_plain_rounding(inception, pixels):
    wanted = inception(pixels / 127.5 - 1, training=False).numpy()
    plain = keras.models.clone_model(inception)
    plain.set_weights(inception.get_weights())
    factors = rounding.round_weights(inception)
    for layer in inception.layers:
        if isinstance(layer, keras.layers.Conv2D):
            assert is_bfloat16(layer.kernel)
        if isinstance(layer, keras.layers.BatchNormalization):
            assert is_bfloat16(layer.beta)
    found = inception(2 * pixels - 255, training=False).numpy() / factors

    for layer in plain.layers:  # what TensorFlow does: fold batch norm in, then round each weight for itself
        if isinstance(layer, keras.layers.BatchNormalization):
            convolution = next(other for other in plain.layers if getattr(other, "output", None) is layer.input)
            mean, variance, beta = (v.numpy() for v in (layer.moving_mean, layer.moving_variance, layer.beta))
            scale = 1 / np.sqrt(variance + layer.epsilon)
            convolution.kernel.assign((convolution.kernel.numpy() * scale).astype(rounding._BFLOAT16))
            layer.beta.assign((beta - mean * scale).astype(rounding._BFLOAT16))
            layer.moving_mean.assign(np.zeros_like(mean))
            layer.moving_variance.assign(np.ones_like(variance))
            layer.epsilon = 0.0
    assert error(found, wanted) < 0.75 * error(plain(pixels / 127.5 - 1, training=False).numpy(), wanted)


def test_what_one_weight_loses_in_rounding_goes_to_the_next():
    rng = np.random.default_rng(0)
    kernel, means = rng.standard_normal((3, 3, 50, 20)), rng.uniform(0.01, 2, 50)
    means[7] = 1e-6  # as of a channel that is nearly always 0
    rounded = rounding._round_kernel(kernel, means)
    assert rounded.shape == kernel.shape
    assert is_bfloat16(rounded)
    assert np.abs(rounded - kernel).max() < 0.05  # no weight changes much
    at_mean = means[:, np.newaxis]
    lost = np.abs(((rounded - kernel) * at_mean).sum((0, 1, 2)))  # (20,)
    plain = np.abs(((kernel.astype(rounding._BFLOAT16).astype(float) - kernel) * at_mean).sum((0, 1, 2)))
    assert lost.max() <= means.max() * np.abs(kernel[:, :, means.argmax()]).max() / 256
    assert lost.mean() < plain.mean() / 5


def test_a_channels_mean_is_that_of_its_normal_variable_behind_a_relu():
    convolution, norm = keras.layers.Conv2D(3, 1, use_bias=False), keras.layers.BatchNormalization(scale=False)
    keras.Sequential([keras.Input((4, 4, 2)), convolution, norm])
    beta = np.array([-1.0, 0.0, 0.7], np.float32)
    norm.beta.assign(beta)
    factors, means = rounding._round_layer(convolution, norm, np.ones(2), np.ones(2))
    drawn = np.random.default_rng(0).standard_normal((400_000, 1)) + beta
    np.testing.assert_allclose(means / factors, drawn.clip(0).mean(0), atol=0.01)
    assert factors[1] == 1.0  # a bias of zero


def test_a_bias_too_small_for_bfloat16_leaves_its_channel_alive():
    convolution, norm = keras.layers.Conv2D(1, 1, use_bias=False), keras.layers.BatchNormalization(scale=False)
    keras.Sequential([keras.Input((4, 4, 1)), convolution, norm])
    norm.beta.assign([1e-42])
    factors, _ = rounding._round_layer(convolution, norm, np.ones(1), np.ones(1))
    assert factors == [1.0]
    assert np.abs(convolution.kernel).max() > 0
