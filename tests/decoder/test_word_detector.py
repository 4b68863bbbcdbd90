import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from captioning.decoder import word_detector
from captioning.decoder.word_detector import (
    _FIRST_BIAS,
    _STEPS_BETWEEN_TURNS,
    WordDetector,
    _cross_entropy,
    _said_words,
    detection_loss,
    word_maps,
)
from captioning.vocabulary import END, PAD, START, UNK

ROOT = pathlib.Path(__file__).parent.parent.parent

V, D, P = 9, 3, 4
CAPTIONS = tf.constant([[START, 5, 4, 5, END], [START, 6, UNK, END, PAD], [PAD] * 5])  # the last is no image


def softplus(x):
    return np.log1p(np.exp(x))


def new_detector(precision="float32"):
    detector = WordDetector(V, precision)
    detector.build((None, P, D))
    return detector


@pytest.fixture
def detector():
    detector = new_detector()
    rng = np.random.default_rng(0)
    detector.set_weights([rng.standard_normal((V, D)), rng.standard_normal(V)])
    return detector


@pytest.fixture
def encoded():
    return tf.constant(np.random.default_rng(1).standard_normal((3, P, D)), tf.float32)


def test_a_new_detector_sees_each_word_alike_and_seldom(encoded):
    sightings = new_detector()(encoded, tf.constant([4, 7]))
    assert sightings.shape == (3, P, 2)
    np.testing.assert_allclose(sightings, softplus(_FIRST_BIAS), rtol=1e-5)
    assert 1 - np.exp(-64 * softplus(_FIRST_BIAS)) == pytest.approx(0.06, abs=0.01)


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-6), ("mixed_bfloat16", 0.05), ("mixed_float16", 5e-3)])
def test_sightings_are_those_of_the_words_asked_for(detector, encoded, precision, tolerance):
    other = new_detector(precision)
    other.set_weights(detector.get_weights())
    assert all(weight.dtype == "float32" for weight in other.weights)
    sightings = other(encoded, tf.constant([7, 4]))
    assert sightings.dtype == tf.float32
    kernel, bias = detector.get_weights()
    expected = softplus(encoded.numpy() @ kernel[[7, 4]].T + bias[[7, 4]])
    np.testing.assert_allclose(sightings, expected, atol=tolerance)


def test_special_words_are_not_said():
    said = _said_words(CAPTIONS, V)
    assert said.shape == (3, V)
    assert [np.flatnonzero(row).tolist() for row in said] == [[4, 5], [6], []]
    assert said.numpy().max() == 1


def test_the_loss_of_a_word_is_that_of_a_noisy_or():
    seen = 1 - np.exp([-0.7, -0.01])
    sums = tf.constant([[0.7, 0.01]])
    np.testing.assert_allclose(_cross_entropy(tf.constant([[1.0, 0.0]]), sums), [[-np.log(seen[0]), 0.01]], 1e-5)
    np.testing.assert_allclose(_cross_entropy(tf.constant([[0.0, 1.0]]), sums), [[0.7, -np.log(seen[1])]], 1e-5)
    assert np.isfinite(_cross_entropy(tf.constant([[1.0, 1.0]]), tf.zeros((1, 2)))).all()


def all_turns(detector, captions, encoded):
    """The losses of all turns."""
    return [detection_loss(detector, captions, encoded, step) for step in range(_STEPS_BETWEEN_TURNS)]


def test_the_loss_by_hand(detector, encoded, monkeypatch):
    monkeypatch.setattr(word_detector, "_STEPS_BETWEEN_TURNS", 1)
    kernel, bias = detector.get_weights()
    seen = 1 - np.exp(-softplus(encoded.numpy() @ kernel.T + bias).sum(1))  # (B, V)
    said = {(0, 4), (0, 5), (1, 6)}
    words = PAD, 4, 5, 6
    losses = [-np.log(seen[b, w]) if (b, w) in said else -np.log(1 - seen[b, w]) for b in (0, 1) for w in words]
    np.testing.assert_allclose(detection_loss(detector, CAPTIONS, encoded, 7), sum(losses) / 3, rtol=1e-5)


def test_each_caption_has_its_turn(detector, encoded):
    """The words of the first add up to 19, of the second to 12."""
    alone = [
        detection_loss(detector, CAPTIONS[row : row + 1], encoded[row : row + 1], step)
        for row, step in ((0, 1), (1, 0))
    ]
    losses = all_turns(detector, CAPTIONS, encoded)
    assert min(alone) > 0
    np.testing.assert_allclose(losses, [alone[1], alone[0], 0, 0], rtol=1e-5)
    later = [detection_loss(detector, CAPTIONS, encoded, tf.constant(step, tf.int64)) for step in range(8, 12)]
    np.testing.assert_array_equal(later, losses)


@pytest.mark.parametrize("captions", [[[START, UNK, END]], [[PAD, PAD, PAD]]])
def test_captions_without_words_teach_nothing(detector, captions):
    assert all_turns(detector, tf.constant(captions), tf.zeros((1, P, D))) == [0] * _STEPS_BETWEEN_TURNS


def test_the_gradient_reaches_the_words_of_the_batch_and_no_encoded_features(detector, encoded):
    with tf.GradientTape() as tape:
        tape.watch(encoded)
        loss = sum(all_turns(detector, CAPTIONS, encoded))
    to_features, to_kernel, to_bias = tape.gradient(loss, [encoded, detector.kernel, detector.bias])
    assert to_features is None
    for gradient in (to_kernel, to_bias):
        gradient = tf.convert_to_tensor(gradient).numpy().reshape(V, -1)
        assert np.flatnonzero(np.abs(gradient).max(1)).tolist() == [PAD, 4, 5, 6]


def test_a_words_map_is_its_share_at_each_location(detector, encoded):
    captions = np.array([[4, 7, 5], [7, 7, END], [PAD, 4, UNK]])
    maps = word_maps(detector, tf.constant(captions), encoded)
    assert maps.shape == (3, 3, P)
    kernel, bias = detector.get_weights()
    rates = softplus(encoded.numpy() @ kernel.T + bias)  # (B, P, V)
    for row in range(3):
        for position in range(3):
            rate = rates[row, :, captions[row, position]]
            np.testing.assert_allclose(maps[row, position], rate / rate.sum(), rtol=1e-5)
    np.testing.assert_allclose(word_maps(new_detector(), tf.constant(captions), encoded), 1 / P, rtol=1e-5)


def test_the_detector_finds_where_a_word_is():
    """Word 4 is said of images with a mark at some location; it learns which one without being told."""
    rng = np.random.default_rng(3)
    images = rng.standard_normal((40, P, D)).astype(np.float32) / 5
    marked, place = np.arange(40) % 2 == 0, rng.integers(P, size=40)
    images[marked, place[marked], 0] += 2
    captions = tf.constant([[START, 4 if mark else 5, END] for mark in marked])
    detector = new_detector()

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = sum(all_turns(detector, captions, tf.constant(images)))
        for weight, gradient in zip(detector.weights, tape.gradient(loss, detector.weights), strict=True):
            weight.assign_sub(0.5 * tf.convert_to_tensor(gradient))

    for _ in range(300):
        step()
    maps = word_maps(detector, captions[:, 1:2], tf.constant(images))[:, 0].numpy()  # (40, P)
    assert (maps[marked].argmax(1) == place[marked]).mean() > 0.9
    assert maps[marked].max(1).mean() > 0.6


ON_TWO_DEVICES = """
import numpy as np
import tensorflow as tf
from support.distribution import replica_rows, run_replicas, sum_replicas
from captioning.decoder.word_detector import WordDetector, detection_loss
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
rng = np.random.default_rng(0)
captions = tf.constant(np.pad(rng.integers(1, 12, (6, 5)), ((0, 2), (0, 0))), tf.int32)  # the last two are empty
captions = tf.gather(captions, [0, 1, 2, 6, 3, 4, 5, 7])
encoded = tf.constant(rng.standard_normal((8, 4, 3)), tf.float32)
values = [rng.standard_normal((12, 3)), rng.standard_normal(12)]

def found(strategy):
    with strategy.scope():
        detector = WordDetector(12)
        detector.build((None, 4, 3))
        detector.set_weights(values)

        def replica(encoded, captions):
            encoded, captions = replica_rows(encoded), replica_rows(captions)
            with tf.GradientTape() as tape:
                loss = sum(detection_loss(detector, captions, encoded, step) for step in range(4))
            gradients = map(tf.convert_to_tensor, tape.gradient(loss, detector.trainable_variables))
            return sum_replicas([loss, *gradients])

        step = tf.function(lambda: strategy.run(replica, (encoded, captions)))
        return [strategy.experimental_local_results(each)[0].numpy() for each in step()]

one = found(tf.distribute.get_strategy())
two = found(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
assert one[0] > 0
for mine, theirs in zip(two, one, strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
"""


@pytest.mark.slow
def test_two_replicas_are_one():
    subprocess.run([sys.executable, "-c", ON_TWO_DEVICES], cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, check=True)
