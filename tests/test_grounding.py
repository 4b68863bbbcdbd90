import numpy as np
import pytest
import tensorflow as tf

from captioning.grounding import (
    FIRST_BIAS,
    WordDetector,
    detection_losses,
    divergences,
    grounding_losses,
    said_words,
    word_maps,
)
from captioning.vocabulary import END, PAD, START, UNK

V, D, P = 9, 3, 4
CAPTIONS = tf.constant(
    [[START, 5, 4, 5, END], [START, 6, UNK, END, PAD], [PAD] * 5]  # the last is no caption
)


def softplus(x):
    return np.log1p(np.exp(x))


@pytest.fixture
def detector():
    detector = WordDetector(V)
    detector.build((None, P, D))
    rng = np.random.default_rng(0)
    detector.kernel.assign(rng.standard_normal((V, D)))
    detector.bias.assign(rng.standard_normal(V))
    return detector


@pytest.fixture
def encoded():
    return tf.constant(np.random.default_rng(1).standard_normal((3, P, D)), tf.float32)


@pytest.fixture
def weights():
    rng = np.random.default_rng(2)
    return tf.nn.softmax(tf.constant(rng.standard_normal((3, 4, P)), tf.float32))


def test_a_new_detector_sees_each_word_alike_and_seldom(encoded):
    sightings = WordDetector(V)(encoded, tf.constant([4, 7]))
    assert sightings.shape == (3, P, 2)
    np.testing.assert_allclose(sightings, softplus(FIRST_BIAS), rtol=1e-5)
    assert 1 - np.exp(-64 * softplus(FIRST_BIAS)) == pytest.approx(0.06, abs=0.01)


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-6), ("mixed_bfloat16", 0.05), ("mixed_float16", 5e-3)])
def test_sightings_are_those_of_the_words_asked_for(detector, encoded, precision, tolerance):
    other = WordDetector(V, precision)
    other.build((None, P, D))
    other.set_weights(detector.get_weights())
    assert all(weight.dtype == "float32" for weight in other.weights)
    sightings = other(encoded, tf.constant([7, 4]))
    assert sightings.dtype == tf.float32
    kernel, bias = detector.get_weights()
    expected = softplus(encoded.numpy() @ kernel[[7, 4]].T + bias[[7, 4]])
    np.testing.assert_allclose(sightings, expected, atol=tolerance)


def test_special_words_are_not_said():
    said = said_words(CAPTIONS[:, 1:], V)
    assert said.shape == (3, V)
    assert [np.flatnonzero(row).tolist() for row in said] == [[4, 5], [6], []]
    assert said.numpy().max() == 1


def test_detection_is_the_cross_entropy_of_a_noisy_or():
    sightings = tf.constant([[[0.5, 0.01], [0.2, 0.0]]])  # (1, 2, 2)
    seen = 1 - np.exp([-0.7, -0.01])
    np.testing.assert_allclose(detection_losses(tf.constant([[1.0, 0.0]]), sightings), [[-np.log(seen[0]), 0.01]], 1e-5)
    np.testing.assert_allclose(detection_losses(tf.constant([[0.0, 1.0]]), sightings), [[0.7, -np.log(seen[1])]], 1e-5)
    assert np.isfinite(detection_losses(tf.constant([[1.0, 1.0]]), tf.zeros((1, 2, 2)))).all()


def test_a_words_map_is_its_share_at_each_location():
    sightings = tf.constant([[[1.0, 2.0], [3.0, 2.0]], [[0.5, 0.0], [0.5, 8.0]]])  # (2, 2, 2)
    maps = word_maps(sightings, tf.constant([7, 4]), tf.constant([[4, 7, 5], [7, 7, 4]]))
    assert maps.shape == (2, 3, 2)
    np.testing.assert_allclose(maps, [[[0.5, 0.5], [0.25, 0.75], [0, 0]], [[0.5, 0.5], [0.5, 0.5], [0, 1]]])


def test_divergence_is_zero_where_attention_is_the_map_or_there_is_none():
    maps = tf.constant([[[0.5, 0.5], [1.0, 0.0], [0.0, 0.0], [0.25, 0.75]]])  # (1, 4, 2)
    weights = tf.constant([[[0.5, 0.5], [0.5, 0.5], [0.1, 0.9], [0.5, 0.5]]])
    expected = [[0, np.log(2), 0, np.log(2) + 0.25 * np.log(0.25) + 0.75 * np.log(0.75)]]
    np.testing.assert_allclose(divergences(maps, weights), expected, atol=1e-6)


def test_both_losses_by_hand(detector, encoded, weights):
    kernel, bias = detector.get_weights()
    rates = softplus(encoded.numpy() @ kernel.T + bias)  # (B, P, V)
    seen = 1 - np.exp(-rates.sum(1))  # (B, V)
    said = {(0, 4), (0, 5), (1, 6)}
    losses = [-np.log(seen[b, w]) if (b, w) in said else -np.log(1 - seen[b, w]) for b in (0, 1) for w in (4, 5, 6)]
    steps = [(0, 0, 5), (0, 1, 4), (0, 2, 5), (1, 0, 6)]
    maps = [(rates[b, :, w] / rates[b, :, w].sum(), weights[b, t].numpy()) for b, t, w in steps]
    expected = sum(losses) / 3, np.mean([np.sum(q * np.log(q / a)) for q, a in maps])
    np.testing.assert_allclose(grounding_losses(detector, CAPTIONS, encoded, weights), expected, rtol=1e-4)


@pytest.mark.parametrize("captions", [[[START, UNK, END]], [[PAD, PAD, PAD]]])
def test_captions_without_words_teach_nothing(detector, captions):
    losses = grounding_losses(detector, tf.constant(captions), tf.zeros((1, P, D)), tf.fill((1, 2, P), 1 / P))
    np.testing.assert_array_equal(losses, 0)


def test_attention_is_taught_by_guidance_alone_and_the_detector_by_detection_alone(detector, encoded, weights):
    sources = [weights, encoded, *detector.trainable_variables]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(sources[:2])
        detection, guidance = grounding_losses(detector, CAPTIONS, encoded, weights)
    to_weights, *others = tape.gradient(detection, sources)
    assert to_weights is None and all(other is not None for other in others)
    to_weights, *others = tape.gradient(guidance, sources)
    assert np.abs(to_weights[0, 0]).min() > 0 and all(other is None for other in others)
    assert not np.any(to_weights[2]) and not np.any(to_weights[1, 1:])  # no caption, <unk>, <end>, <pad>


def test_a_step_down_the_gradient_moves_attention_to_the_map(detector, encoded):
    scores = tf.Variable(tf.zeros((3, 4, P)))
    found = []
    for _ in range(200):
        with tf.GradientTape() as tape:
            _, guidance = grounding_losses(detector, CAPTIONS, encoded, tf.nn.softmax(scores))
        scores.assign_sub(10 * tape.gradient(guidance, scores))
        found.append(float(guidance))
    assert found[0] > 0.01 and found[-1] < 1e-4


def test_the_detector_finds_where_a_word_is():
    """Word 4 is said of pictures with a mark at some location; it learns which one without being told."""
    rng = np.random.default_rng(3)
    pictures = rng.standard_normal((40, P, D)).astype(np.float32) / 5
    marked, place = np.arange(40) % 2 == 0, rng.integers(P, size=40)
    pictures[marked, place[marked], 0] += 2
    captions = tf.constant([[START, 4 if mark else 5, END] for mark in marked])
    detector = WordDetector(V)
    detector.build((None, P, D))
    for _ in range(300):
        with tf.GradientTape() as tape:
            detection, _ = grounding_losses(detector, captions, tf.constant(pictures), tf.fill((40, 2, P), 1 / P))
        gradients = tape.gradient(detection, detector.trainable_variables)
        for variable, gradient in zip(detector.trainable_variables, gradients, strict=True):
            variable.assign_sub(0.5 * tf.convert_to_tensor(gradient))
    sightings = detector(tf.constant(pictures), tf.constant([4]))[:, :, 0].numpy()
    assert (sightings[marked].argmax(1) == place[marked]).mean() > 0.9
