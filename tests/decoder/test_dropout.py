import numpy as np
import pytest
import tensorflow as tf

from captioning.decoder.dropout import channel_dropout, variational_dropout


def test_dropout_drops_the_same_numbers_at_all_words_of_a_caption():
    ones = tf.ones((5, 40, 100))  # (T, B, n)
    dropped = variational_dropout(ones, 0.25, tf.constant((7, 1)), layer=0).numpy()
    assert dropped.shape == (5, 40, 100)
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (dropped == dropped[0]).all()
    assert np.mean(dropped[0] == 0) == pytest.approx(0.25, abs=0.03)
    assert len(np.unique(dropped[0], axis=0)) == 40
    assert np.mean(dropped[0] == variational_dropout(ones, 0.25, tf.constant((7, 1)), layer=1)[0]) < 0.7


def test_no_mask_comes_twice():
    """Neither in the other layer nor at the next step."""
    ones = tf.ones((1, 8, 16))
    seeds = [tf.constant((7, step)) for step in range(5)]
    masks = [variational_dropout(ones, 0.5, seed, layer).numpy().tobytes() for seed in seeds for layer in (0, 1)]
    masks += [channel_dropout(ones[0][:, tf.newaxis], 0.0, 0.5, seed).numpy().tobytes() for seed in seeds]
    assert len(set(masks)) == 15


@pytest.mark.parametrize(("rate", "seed"), [(0.0, (7, 1)), (0.5, None)])
def test_without_a_rate_or_a_seed_nothing_is_dropped(rate, seed):
    x = tf.ones((2, 3, 4))
    assert variational_dropout(x, rate, seed, layer=0) is x
    assert channel_dropout(x, tf.zeros(4), rate, seed) is x
