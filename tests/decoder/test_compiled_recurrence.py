"""The compiled recurrence must compute what RNN_Decoder.unroll does, values and gradients."""

import numpy as np
import pytest
import tensorflow as tf

import model
from captioning.decoder import compiled_recurrence as recurrence
from captioning.settings import make_config

P, D, U, E = 64, 8, 16, 12
INPUTS = ("word_gates", "hidden", "encoded_features", "keys")


def make_decoder(precision="float32"):
    """An RNN_Decoder whose biases are not 0, as they would be before training."""
    config = make_config({"encoder_dim": D, "embedding_dim": E, "units": U})
    _, decoder = model.build_captioner(config, 30, precision=precision)
    rng = np.random.default_rng(4)
    for bias in (decoder.attention.query_layer.bias, decoder.hidden_gates.bias):
        bias.assign(rng.standard_normal(bias.shape) / 2)
    return decoder


@pytest.fixture(scope="module")
def decoder():
    return make_decoder()


def recurrence_weights(decoder):
    """Dict of name to variable, all that the recurrence uses."""
    layers = [decoder.attention.query_layer, decoder.attention.score_layer, decoder.context_gates, decoder.hidden_gates]
    names = ("query_layer", "score_layer", "context_gates", "hidden_gates")
    return {
        f"{name}/{weight.name}": weight for name, layer in zip(names, layers, strict=True) for weight in layer.weights
    }


def inputs(words, lengths=None):
    """Arguments of `unroll`, for 3 captions of as many words if not given their lengths."""
    lengths = lengths or [words] * 3
    B = len(lengths)
    rng = np.random.default_rng(words)
    shapes = (words, B, 3 * U), (B, U), (B, P, D), (B, P, U)
    word_gates, *others = (tf.constant(rng.standard_normal(shape) / 2, tf.float32) for shape in shapes)
    return [word_gates, tf.constant(lengths), *others]


def differentiate(unroll, decoder, arguments):
    """What `unroll` returns for the words to be said, and its gradients by inputs and by weights.

    Returns:
      (all_hidden, all_attention_weights), dict of name to gradient
    """
    word_gates, lengths, *_ = arguments
    said = tf.cast(tf.range(len(word_gates))[:, tf.newaxis] < lengths, tf.float32)[:, :, tf.newaxis]  # (T, B, 1)
    floats = [x for x in arguments if x is not lengths]
    weights = recurrence_weights(decoder)
    with tf.GradientTape() as tape:
        tape.watch(floats)
        results = [x * said for x in unroll(decoder, *arguments)]
    rng = np.random.default_rng(7)
    wanted = [tf.constant(rng.standard_normal(x.shape), tf.float32) for x in results]
    by = [*floats, *(weight.value for weight in weights.values())]
    return results, dict(zip((*INPUTS, *weights), tape.gradient(results, by, wanted), strict=True))


LENGTHS = {
    "one word": [1, 1, 1],
    "alike": [5, 5, 5],
    "the whole bucket": [recurrence.LENGTH_BUCKET] * 3,
    "one more": [recurrence.LENGTH_BUCKET + 1] * 3,
    "the first longer": [6, 4, 2],
    "the first shorter": [2, 4, 6],
    "the others empty": [4, 3, 0],
    "all but the last empty": [0, 0, 4],
    "one row": [3],
    "more rows": [9, 3, 7, 2, 8],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_compiled_recurrence_and_its_gradient_are_those_of_the_plain_one(decoder, lengths):
    words, rows = max(lengths), len(lengths)
    arguments = inputs(words, lengths)
    expected, expected_gradients = differentiate(model.RNN_Decoder.unroll, decoder, arguments)
    (all_hidden, all_weights), gradients = differentiate(recurrence.compiled_unroll, decoder, arguments)
    assert all_hidden.shape == (words, rows, U)
    assert all_weights.shape == (words, rows, P)
    np.testing.assert_allclose(all_hidden, expected[0], atol=1e-5)
    np.testing.assert_allclose(all_weights, expected[1], atol=1e-6)
    for name, expected in expected_gradients.items():
        assert gradients[name].shape == expected.shape
        np.testing.assert_allclose(gradients[name], expected, atol=2e-5 * np.abs(expected).max(), err_msg=name)


def test_the_loops_compute_the_same_without_being_compiled(decoder, monkeypatch):
    """They are TensorFlow's plain operations too, which tells a fault of theirs from one of the compiler."""
    for name in ("forward_loop", "backward_loop"):
        monkeypatch.setattr(recurrence, name, tf.function(getattr(recurrence, name).python_function))
    test_the_compiled_recurrence_and_its_gradient_are_those_of_the_plain_one(decoder, LENGTHS["more rows"])


def test_the_first_half_goes_on_alone(decoder):
    """What is returned behind the others' last word is 0 for them, as nothing was computed."""
    arguments = inputs(6, [6, 5, 2])
    all_hidden, all_weights = recurrence.compiled_unroll(decoder, *arguments)
    for x in (all_hidden, all_weights):
        assert not np.any(x[2:, 2])
        assert np.all(x[:, :2]) and np.all(x[:2, 2])


def test_lower_precision_rounds_products_with_kernels_and_no_others(decoder):
    arguments = inputs(9)
    exact, exact_gradients = differentiate(recurrence.compiled_unroll, decoder, arguments)
    rounding = make_decoder("mixed_bfloat16")
    rounded, rounded_gradients = differentiate(recurrence.compiled_unroll, rounding, arguments)
    names = ("all_hidden", "all_weights", *exact_gradients)
    results = zip((*rounded, *rounded_gradients.values()), (*exact, *exact_gradients.values()), strict=True)
    for name, (value, expected) in zip(names, results, strict=True):
        assert value.dtype == tf.float32
        assert 0 < np.abs(value - expected).max() < 0.02 * np.abs(expected).max(), name


def test_the_plain_recurrence_rounds_nothing(decoder):
    arguments = inputs(9)
    exact, exact_gradients = differentiate(model.RNN_Decoder.unroll, decoder, arguments)
    results, gradients = differentiate(model.RNN_Decoder.unroll, make_decoder("mixed_bfloat16"), arguments)
    for value, expected in zip((*results, *gradients.values()), (*exact, *exact_gradients.values()), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("unroll", [recurrence.compiled_unroll, model.RNN_Decoder.unroll], ids=["compiled", "plain"])
def test_one_graph_serves_captions_of_all_lengths(decoder, unroll):
    graph = tf.function(lambda *arguments: unroll(decoder, *arguments))
    specs = [tf.TensorSpec((None, *x.shape[1:])) if i == 0 else x for i, x in enumerate(inputs(4))]
    step = graph.get_concrete_function(*specs)
    for words in (2, 30):
        arguments = inputs(words)
        all_hidden, all_weights = step(*arguments)
        expected = decoder.unroll(*arguments)
        np.testing.assert_allclose(all_hidden, expected[0], atol=1e-5)
        np.testing.assert_allclose(all_weights, expected[1], atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "strategy", "gpus", "compiled"),
    [
        ("auto", "auto", [], True),
        ("auto", "multiworker", [], False),
        ("auto", "auto", ["GPU:0"], False),
        ("on", "multiworker", ["GPU:0"], True),
        ("off", "auto", [], False),
    ],
)
def test_the_loops_are_compiled_as_the_setting_says(setting, strategy, gpus, compiled, monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    assert recurrence.compiles_loops(make_config({"compile": setting, "strategy": strategy})) == compiled
