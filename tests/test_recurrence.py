import recurrence

import numpy as np
import pytest
import tensorflow as tf

B, P, D, U = 3, 64, 8, 16
NAMES = ("word_gates", "hidden", "encoded_features", "keys", "query_kernel", "score_kernel", "context_kernel")
NAMES += ("hidden_kernel", "hidden_bias")


def inputs(words):
    shapes = (words, B, 3 * U), (B, U), (B, P, D), (B, P, U), (U, U), (U, 1), (D, 3 * U), (U, 3 * U), (3 * U,)
    rng = np.random.default_rng(words)
    return [tf.constant(rng.standard_normal(shape) / 2, tf.float32) for shape in shapes]


def say_words_one_by_one(word_gates, hidden, features, keys, query_kernel, score_kernel, context_kernel, kernel, bias):
    """The same in TensorFlow's plain operations, which differentiates them."""
    all_hidden, all_weights = [], []
    for gates in word_gates:
        score = tf.tanh(keys + (hidden @ query_kernel)[:, tf.newaxis]) @ score_kernel  # (B, P, 1)
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
    """What a function returns, and the gradients of all arguments for arbitrary gradients of the results."""
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        results = function(*arguments)
    rng = np.random.default_rng(7)
    wanted = [tf.constant(rng.standard_normal(x.shape), tf.float32) for x in results]
    return results, tape.gradient(results, arguments, wanted)


def compile_loops(compiled, monkeypatch):
    monkeypatch.setattr(recurrence, "COMPILE", compiled)
    for name in ("forward_loop", "backward_loop"):
        loop = getattr(recurrence, name).python_function
        monkeypatch.setattr(recurrence, name, tf.function(loop, jit_compile=compiled))


@pytest.mark.parametrize("words", [1, 5, recurrence.ROOM, recurrence.ROOM + 1])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_loops_and_their_gradient_are_those_of_plain_steps(words, compiled, monkeypatch):
    compile_loops(compiled, monkeypatch)
    arguments = inputs(words)
    expected, expected_gradients = differentiate(say_words_one_by_one, arguments)
    (all_hidden, all_weights), gradients = differentiate(recurrence.say_words, arguments)
    assert all_hidden.shape == (words, B, U)
    assert all_weights.shape == (words, B, P)
    np.testing.assert_allclose(all_hidden, expected[0], atol=1e-5)
    np.testing.assert_allclose(all_weights, expected[1], atol=1e-6)
    for name, gradient, value in zip(NAMES, gradients, expected_gradients, strict=True):
        assert gradient.shape == value.shape
        np.testing.assert_allclose(gradient, value, atol=2e-5 * np.abs(value).max(), err_msg=name)


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
