"""Adam and its schedule; and that the private names of Keras which SummedAdam relies on are still there and called."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from captioning.settings import make_config
from captioning.training.optimizer import SummedAdam, scheduled_rate


def test_adam_in_one_pass_is_keras_own():
    """Gradients above and below the norm at which they are clipped, and of embeddings, a row of which comes twice."""
    rng = np.random.default_rng(3)
    rate = keras.optimizers.schedules.CosineDecay(0.01, 6)
    ends = []
    gradients = [(rng.standard_normal((5, 4)) * 4**step, rng.standard_normal((3, 4))) for step in range(-3, 3)]
    for kind in (keras.optimizers.Adam, SummedAdam):
        weights = [keras.Variable(np.ones((5, 4), np.float32)), keras.Variable(np.ones((7, 4), np.float32))]
        optimizer = kind(rate, global_clipnorm=5.0)
        optimizer.build(weights)
        for whole, rows in gradients:
            rows = tf.IndexedSlices(tf.constant(rows, tf.float32), tf.constant([6, 0, 6]), (7, 4))
            optimizer.apply([tf.constant(whole, tf.float32), rows], weights)
        ends.append([variable.numpy() for variable in (*weights, *optimizer.variables)])
    for ours, theirs in zip(ends[1], ends[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert all(np.abs(end - 1).max() > 0.01 for end in ends[0][:2])  # they have moved


def test_the_last_weights_are_clipped_apart():
    """Adam's first momentum is a tenth of the gradient."""
    weights = [keras.Variable(np.ones(1, np.float32)) for _ in range(3)]
    optimizer = SummedAdam(0.1, apart=1, global_clipnorm=5.0)
    optimizer.build(weights)
    optimizer.apply([tf.constant([6.0]), tf.constant([8.0]), tf.constant([50.0])], weights)
    np.testing.assert_allclose(np.ravel(optimizer._momentums), [0.3, 0.4, 0.5], rtol=1e-5)


@pytest.mark.parametrize("in_graph", [True, False])
def test_keras_still_calls_what_is_overridden(in_graph):
    """Were a name gone, Keras would clip and sum each replica's gradients, and nothing else would tell."""
    called = []

    class Recorder(SummedAdam):
        def _all_reduce_sum_gradients(self, grads_and_vars):
            called.append("sum")
            return super()._all_reduce_sum_gradients(grads_and_vars)

        def _clip_gradients(self, gradients):
            called.append("clip")
            return super()._clip_gradients(gradients)

        def update_step(self, gradient, variable, learning_rate):
            called.append("update")
            return super().update_step(gradient, variable, learning_rate)

    weights = [keras.Variable(np.ones(3, np.float32)), keras.Variable(np.ones(2, np.float32))]
    optimizer = Recorder(0.1, global_clipnorm=1.0)
    optimizer.build(weights)
    gradients = [tf.ones(3), tf.ones(2)]
    apply = lambda: optimizer.apply_gradients(zip(gradients, weights, strict=True))  # noqa: E731
    tf.function(apply)() if in_graph else apply()
    assert called == ["clip", "sum", "update", "update"]
    assert float(weights[0][0]) == pytest.approx(0.9, abs=1e-4)


def test_keras_adam_still_has_the_state_that_is_read():
    weight = keras.Variable(np.ones(3, np.float32))
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build([weight])
    assert optimizer._get_variable_index(weight) == optimizer._get_variable_index(weight.value) == 0
    for slots in (optimizer._momentums, optimizer._velocities):
        assert [slot.shape for slot in slots] == [(3,)]
        assert slots[0].value.handle is not None


def test_a_new_rate_is_taken_by_a_graph_that_is_there_already():
    """Training sets the rate before each step, and traces the step once."""
    weight = keras.Variable(np.zeros(1, np.float32))
    optimizer = SummedAdam(0.5, global_clipnorm=5.0)
    optimizer.build([weight])
    step = tf.function(lambda: optimizer.apply_gradients([(tf.ones(1), weight)]))
    step()
    assert float(weight[0]) == pytest.approx(-0.5, abs=1e-4)
    optimizer.learning_rate = 0.25
    step()
    assert float(weight[0]) == pytest.approx(-0.75, abs=1e-4)
    assert step.experimental_get_tracing_count() == 1


def rates(epochs_done, **settings):
    config = make_config({"learning_rate": 0.5, "schedule": "cosine", **settings})
    return [scheduled_rate(config, done) for done in epochs_done]


def test_the_rate_falls_to_0_at_the_end_of_the_last_epoch_or_stays():
    falling = rates(np.linspace(0, 3, 7), epochs=3)
    assert falling[0] == 0.5 and falling[3] == pytest.approx(0.25) and falling[6] == pytest.approx(0.0, abs=1e-6)
    assert falling == sorted(falling, reverse=True)
    assert set(rates((0, 1.5, 100), epochs=3, schedule="constant")) == {0.5}


def test_the_rate_goes_by_epochs_whatever_the_batch_size():
    """3 of 8 epochs at 64, continued at 256, was a rate of 0 to the end when the schedule went by steps."""
    assert rates((3, 3.5, 7.9), epochs=8, batch_size=64) == rates((3, 3.5, 7.9), epochs=8, batch_size=256)
    assert rates((3,), epochs=8, batch_size=256)[0] == pytest.approx(0.5 * (1 + np.cos(np.pi * 3 / 8)) / 2)


def test_more_epochs_after_a_finished_run_go_on_at_the_longer_schedules_rate():
    (finished,), (longer,), later = rates((8,), epochs=8), rates((8,), epochs=12), rates((9, 10, 12), epochs=12)
    assert finished == pytest.approx(0.0, abs=1e-9)
    assert longer == pytest.approx(0.125)  # a quarter of the rate, where a third of the epochs is left
    assert longer > later[0] > later[1] > later[2] == pytest.approx(0.0, abs=1e-9)


def test_fewer_epochs_than_are_done_give_a_rate_of_0_and_not_a_rising_one():
    assert rates((8, 9), epochs=4) == pytest.approx([0.0, 0.0], abs=1e-9)
