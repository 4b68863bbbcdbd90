"""Adam in one pass over the weights, and its learning rate."""

import math

import keras
import tensorflow as tf

from support.distribution import sum_replicas


def scheduled_rate(config, epochs_done):
    """The learning rate after some epochs of cross-entropy, which need not be a whole number.

    It depends on the share of `config.epochs` that is done and on nothing else. So a run that is continued with another
    batch size goes on where it was. One that gets more epochs goes on at the rate that the longer schedule has there.
    """
    return config.learning_rate * _decay(config.schedule, epochs_done / config.epochs)


def self_critical_rate(config, epochs_done):
    """The learning rate after some self-critical epochs, as `scheduled_rate`."""
    return config.self_critical_rate * _decay(config.schedule, epochs_done / config.self_critical_epochs)


def _decay(schedule, share_done):
    """What a schedule leaves of the learning rate, from 1 to 0."""
    return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * min(share_done, 1))) / 2


class SummedAdam(keras.optimizers.Adam):
    """Adam for gradients that are summed over the replicas already. Keras would clip each replica's, then sum them.

    Its arithmetic is Keras's, in one pass over each weight where Keras makes a dozen. Gradients whose norm is within
    `global_clipnorm` are not touched. Keras has no public way to either, so this class overrides and reads private
    names. tests/training/test_optimizer.py guards them, and requirements.txt keeps Keras below the next minor release.

    Args:
      apart: int, how many weights, the last of those it is built with, have a norm of their own that is clipped. They
        do not change how the others learn.
      *args, **options: of keras.optimizers.Adam, with `global_clipnorm`. Each weight needs a gradient at each step.
    """

    def __init__(self, *args, apart=0, **options):
        super().__init__(*args, **options)
        self.apart = apart

    def _all_reduce_sum_gradients(self, grads_and_vars):
        return grads_and_vars

    def _clip_gradients(self, gradients):
        first = len(gradients) - self.apart
        return [*self._clip_together(gradients[:first]), *self._clip_together(gradients[first:])]

    def _clip_together(self, gradients):
        if not gradients:
            return []
        # As in Keras, the parts of the embedding's gradient, one for each word said, count one by one.
        norm, limit = tf.linalg.global_norm(gradients), self.global_clipnorm
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        return tf.cond(
            norm <= limit, lambda: gradients, lambda: tf.clip_by_global_norm(gradients, limit, use_norm=norm)[0]
        )

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        step = tf.cast(self.iterations + 1, variable.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=self.beta_1**step,
            beta2_power=self.beta_2**step,
            lr=tf.cast(learning_rate, variable.dtype),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


def apply_gradients(state, gradients, loss):
    """Sum the gradients of all replicas and take a step of the optimizer. Called on every replica.

    Args:
      state: TrainingState
      gradients: list of this replica's gradients, one for each of its `trainable_variables`, None for one of zeros.
      loss: float (), this replica's part.

    Returns:
      the loss, float (), summed over the replicas
    """
    weights = state.trainable_variables
    gradients = [tf.zeros(w.shape) if g is None else g for g, w in zip(gradients, weights, strict=True)]
    loss, *gradients = sum_replicas([loss, *gradients])
    state.scaled_optimizer.apply_gradients(zip(gradients, weights, strict=True))
    return loss
