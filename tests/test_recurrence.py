import recurrence

import numpy as np
import pytest
import tensorflow as tf

P, D, U = 64, 8, 16
NAMES = ("word_gates", "hidden", "encoded_features", "keys", "query_kernel", "score_kernel", "context_kernel")
NAMES += ("hidden_kernel", "query_bias", "hidden_bias")


def inputs(words, lengths=None):
    """Arguments of say_words, for 3 captions of as many words if not given their lengths."""
    lengths = lengths or [words] * 3
    B = len(lengths)
    shapes = (words, B, 3 * U), (B, U), (B, P, D), (B, P, U), (U, U), (U, 1), (D, 3 * U), (U, 3 * U), (U,), (3 * U,)
    rng = np.random.default_rng(words)
    word_gates, *others = (tf.constant(rng.standard_normal(shape) / 2, tf.float32) for shape in shapes)
    return [word_gates, tf.constant(lengths), *others]


def say_words_one_by_one(
    word_gates, lengths, hidden, features, keys, query_kernel, score_kernel, context_kernel, kernel, query_bias, bias
):
    """The same in TensorFlow's plain operations, which differentiates them."""
    all_hidden, all_weights = [], []
    for gates in word_gates:
        score = tf.tanh(keys + (hidden @ query_kernel + query_bias)[:, tf.newaxis]) @ score_kernel  # (B, P, 1)
        weights = tf.nn.softmax(score, axis=1)  # (B, P, 1)
        x = gates + tf.reduce_sum(weights * features, 1) @ context_kernel  # (B, 3U)
        h = hidden @ kernel + bias  # (B, 3U)
        update, reset = (tf.sigmoid(x[:, i * U : i * U + U] + h[:, i * U : i * U + U]) for i in (0, 1))  # (B, U) each
        new = tf.tanh(x[:, 2 * U :] + reset * h[:, 2 * U :])  # (B, U)
        hidden = update * hidden + (1 - update) * new  # (B, U)
        all_hidden.append(hidden)
        all_weights.append(weights[:, :, 0])
    return tf.stack(all_hidden), tf.stack(all_weights)


def differentiate(function, arguments):
    """What a function returns for the words to be said, and the gradients of all arguments but lengths for it."""
    word_gates, lengths, *_ = arguments
    said = tf.cast(tf.range(len(word_gates))[:, tf.newaxis] < lengths, tf.float32)[:, :, tf.newaxis]  # (T, B, 1)
    floats = [x for x in arguments if x is not lengths]
    with tf.GradientTape() as tape:
        tape.watch(floats)
        results = [x * said for x in function(*arguments)]
    rng = np.random.default_rng(7)
    wanted = [tf.constant(rng.standard_normal(x.shape), tf.float32) for x in results]
    return results, tape.gradient(results, floats, wanted)


def compile_loops(compiled, monkeypatch):
    monkeypatch.setattr(recurrence, "COMPILE", compiled)
    for name in ("forward_loop", "backward_loop"):
        loop = getattr(recurrence, name).python_function
        monkeypatch.setattr(recurrence, name, tf.function(loop, jit_compile=compiled))


LENGTHS = {
    "one word": [1, 1, 1],
    "alike": [5, 5, 5],
    "as much as there is room for": [recurrence.ROOM] * 3,
    "one more": [recurrence.ROOM + 1] * 3,
    "the first longer": [6, 4, 2],
    "the first shorter": [2, 4, 6],
    "the others empty": [4, 3, 0],
    "all but the last empty": [0, 0, 4],
    "one row": [3],
    "more rows": [9, 3, 7, 2, 8],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("compiled", [True, False])
def test_the_loops_and_their_gradient_are_those_of_plain_steps(lengths, compiled, monkeypatch):
    compile_loops(compiled, monkeypatch)
    words, rows = max(lengths), len(lengths)
    arguments = inputs(words, lengths)
    expected, expected_gradients = differentiate(say_words_one_by_one, arguments)
    (all_hidden, all_weights), gradients = differentiate(recurrence.say_words, arguments)
    assert all_hidden.shape == (words, rows, U)
    assert all_weights.shape == (words, rows, P)
    np.testing.assert_allclose(all_hidden, expected[0], atol=1e-5)
    np.testing.assert_allclose(all_weights, expected[1], atol=1e-6)
    for name, gradient, value in zip(NAMES, gradients, expected_gradients, strict=True):
        assert gradient.shape == value.shape
        np.testing.assert_allclose(gradient, value, atol=2e-5 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_first_half_goes_on_alone(compiled, monkeypatch):
    """What is returned behind the others' last word is 0 for them, as nothing was computed."""
    compile_loops(compiled, monkeypatch)
    arguments = inputs(6, [6, 5, 2])
    all_hidden, all_weights = recurrence.say_words(*arguments)
    for x in (all_hidden, all_weights):
        assert not np.any(x[2:, 2])
        assert np.all(x[:, :2]) and np.all(x[:2, 2])


@pytest.mark.parametrize("compiled", [True, False])
def test_lower_precision_rounds_products_with_kernels_and_no_others(compiled, monkeypatch):
    compile_loops(compiled, monkeypatch)
    arguments = inputs(9)
    exact, exact_gradients = differentiate(recurrence.say_words, arguments)
    rounded, rounded_gradients = differentiate(lambda *x: recurrence.say_words(*x, "bfloat16"), arguments)
    names = ("all_hidden", "all_weights", *NAMES)
    for name, value, expected in zip(names, (*rounded, *rounded_gradients), (*exact, *exact_gradients), strict=True):
        assert value.dtype == tf.float32
        if compiled or name in ("query_kernel", "context_kernel", "hidden_kernel"):
            assert 0 < np.abs(value - expected).max() < 0.02 * np.abs(expected).max(), name
        else:
            np.testing.assert_array_equal(value, expected, err_msg=name)


def test_one_graph_serves_captions_of_all_lengths():
    graph = tf.function(recurrence.say_words)
    shapes = [tf.TensorSpec((None, *x.shape[1:])) if i == 0 else x for i, x in enumerate(inputs(4))]
    step = graph.get_concrete_function(*shapes)
    for words in (2, 30):
        arguments = inputs(words)
        all_hidden, all_weights = step(*arguments)
        expected = say_words_one_by_one(*arguments)
        np.testing.assert_allclose(all_hidden, expected[0], atol=1e-5)
        np.testing.assert_allclose(all_weights, expected[1], atol=1e-6)
