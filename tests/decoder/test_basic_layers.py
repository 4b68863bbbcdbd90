import keras
import numpy as np
import pytest
import tensorflow as tf

from captioning.decoder.basic_layers import MixedPrecisionDense, softmax_cross_entropy


@pytest.mark.parametrize("shape", [(4, 30), (3, 4, 30)])
def test_a_product_in_float32_is_keras_own(shape):
    x = tf.constant(np.random.default_rng(0).standard_normal(shape), tf.float32)
    ours, keras_own = MixedPrecisionDense(7), keras.layers.Dense(7)
    for layer in (ours, keras_own):
        layer.build(shape)
    keras_own.set_weights([ours.kernel, np.arange(7)])
    ours.bias.assign(np.arange(7))
    np.testing.assert_allclose(ours(x), keras_own(x), atol=1e-5)


def test_the_product_alone_is_rounded():
    """The bias, which bfloat16 could not hold, is added in float32."""
    x = tf.constant(np.random.default_rng(0).standard_normal((4, 30)), tf.float32)
    exact, rounded = MixedPrecisionDense(7), MixedPrecisionDense(7, "mixed_bfloat16")
    for layer in (exact, rounded):
        layer.build(x.shape)
        layer.kernel.assign(np.random.default_rng(1).standard_normal((30, 7)))
    error = np.abs(rounded(x) - exact(x))
    assert rounded(x).dtype == tf.float32 and rounded.kernel.dtype == "float32"
    assert 0 < error.max() < 0.2
    rounded.kernel.assign(np.zeros((30, 7)))
    rounded.bias.assign(np.full(7, 1.001))
    np.testing.assert_allclose(rounded(x), 1.001, rtol=1e-6)


def test_inputs_may_come_in_another_number_type():
    x = np.random.default_rng(0).standard_normal((4, 30)).astype(np.float16)
    layer = MixedPrecisionDense(7, use_bias=False)
    result = layer(tf.constant(x))
    assert result.dtype == tf.float32
    np.testing.assert_allclose(result, x.astype(np.float32) @ layer.kernel.numpy(), atol=1e-5)


def test_losses_of_words_are_cross_entropies():
    logits = np.random.default_rng(0).standard_normal((6, 30), np.float32)
    logits[0, :2] = 300, -300  # too unlikely for a probability in float32
    words = tf.constant([1, 0, 4, 2, 2, 1])
    losses, gradients = [], []
    for function in (softmax_cross_entropy, lambda x, w: tf.nn.sparse_softmax_cross_entropy_with_logits(w, x)):
        with tf.GradientTape() as tape:
            x = tf.constant(logits)
            tape.watch(x)
            losses.append(function(x, words))  # (6,)
        gradients.append(tape.gradient(losses[-1], x, tf.constant([1.0, 2.0, 0.0, 0.5, 1.0, 3.0])))
    assert losses[0].shape == (6,)
    assert losses[0][0] == 600
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    np.testing.assert_allclose(gradients[0], gradients[1], atol=1e-6)
