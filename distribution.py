"""Training on several devices or hosts: one replica on each device, which all take the same step (tf.distribute).

Outside of `replicas` there is one replica, and the functions below work as well.
"""

import contextlib
import json
import os
import re
import signal
import sys

from command_line import UserError

import keras
import numpy as np
import tensorflow as tf

TF_CONFIG_EXAMPLE = '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'

# What TensorFlow raises where another worker is gone, by how it went and who noticed.
WORKER_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
)


class SummedAdam(keras.optimizers.Adam):
    """Adam for gradients that are summed over the replicas already; Keras would clip each replica's, then sum them.

    It does Keras's arithmetic in one pass over each weight where Keras makes a dozen, and touches no gradients whose
    norm is within `global_clipnorm`.
    """

    def _all_reduce_sum_gradients(self, grads_and_vars):
        return grads_and_vars

    def _clip_gradients(self, gradients):
        # As in Keras, a word's parts of the embedding's gradient count one by one.
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


@contextlib.contextmanager
def replicas(config, devices=None):
    """Compute on what `config.strategy` says; only the chief prints. Comes before anything that TensorFlow computes.

    Args:
      devices: list of str, what to compute on; the GPUs of this machine if not given.

    Raises:
      UserError: what open_strategy raises, or another worker stopped.
    """
    strategy = open_strategy(config, devices)
    try:
        with strategy.scope(), contextlib.redirect_stdout(sys.stdout if is_chief() else None):
            yield
    except WORKER_LOST as error:
        if config.strategy != "multiworker":
            raise
        reason = re.search(r"aborted by: (.*)", error.message) or re.search("(.*)", error.message)
        raise UserError(
            "another worker stopped or cannot be reached: run the same command on every worker, "
            f"which continues from the last checkpoint ({reason[1][:200]})"
        ) from error


def open_strategy(config, devices=None):
    """The tf.distribute.Strategy of `config.strategy`; arguments as in `replicas`.

    Raises:
      UserError: `mirrored` without several GPUs, or `multiworker` without a TF_CONFIG that can be used.
    """
    if config.strategy == "multiworker":
        check_tf_config()
        print("waiting for all workers of TF_CONFIG")
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
        except (tf.errors.OpError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{error}".splitlines()[0]
            raise UserError(f"this worker cannot start ({reason}): correct its address in TF_CONFIG") from error
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # TensorFlow has made itself deaf to it
        return strategy
    devices = devices or [device.name for device in tf.config.list_logical_devices("GPU")]
    if len(devices) > 1:
        return tf.distribute.MirroredStrategy(devices)
    if config.strategy == "mirrored":
        raise UserError(
            f"--strategy mirrored is for several GPUs, and TensorFlow finds {len(devices)} here: "
            "run the same command with --strategy auto"
        )
    return tf.distribute.get_strategy()


def check_tf_config():
    """Raise UserError unless the environment variable TF_CONFIG lists the workers and says which one this is."""
    mend = f"set it on every worker, on the first to TF_CONFIG='{TF_CONFIG_EXAMPLE}'"
    if "TF_CONFIG" not in os.environ:
        raise UserError(f"--strategy multiworker needs the environment variable TF_CONFIG: {mend}")
    try:
        value = json.loads(os.environ["TF_CONFIG"])
        workers, index = value["cluster"][value["task"]["type"]], int(value["task"]["index"])
        fits = isinstance(workers, list) and 0 <= index < len(workers) and {*value["cluster"]} <= {"chief", "worker"}
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"TF_CONFIG does not list the workers and say which of them this one is: {mend}")


def own_replicas():
    """Numbers of the replicas that this process computes, list of int; the process of replica 0 is the chief."""
    strategy = tf.distribute.get_strategy()
    numbers = strategy.experimental_distribute_values_from_function(lambda replica: replica.replica_id_in_sync_group)
    return [int(number) for number in strategy.experimental_local_results(numbers)]


def is_chief():
    """Whether it is this process that prints and writes files."""
    return 0 in own_replicas()


def check_same_everywhere(number, message):
    """Raise UserError with `message` where `number`, a float, is not the same in all processes."""
    strategy = tf.distribute.get_strategy()
    numbers = strategy.experimental_distribute_values_from_function(lambda replica: tf.constant(number))
    if float(strategy.reduce("MEAN", numbers, axis=None)) != number:
        raise UserError(message)


def share_batches(order, batch_size):
    """The part of an epoch's captions that this process reads: those of its replicas, of every batch.

    Args:
      order: int (N,), positions of captions; each `batch_size` in a row are a batch.

    Returns:
      int (batches, R*b): the positions for each of the R own replicas, the same number b for each replica there is and
      in each batch; -1 where the batch has no caption left for it. They are dealt out in turn, so that of captions in
      order of length all replicas have the same work.
    """
    replicas, size = tf.distribute.get_strategy().num_replicas_in_sync, min(batch_size, len(order))
    batches = np.append(order, np.full(-len(order) % size, -1, order.dtype)).reshape(-1, size)
    batches = np.pad(batches, ((0, 0), (0, -size % replicas)), constant_values=-1)
    dealt = batches.reshape(len(batches), -1, replicas).transpose(0, 2, 1)  # (batches, all replicas, b)
    return dealt[:, own_replicas()].reshape(len(batches), -1)


def own_rows(batch):
    """The rows of this replica, of a batch for all R replicas of its process. Tensor (R*b, ...) -> (b, ...)."""
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return batch
    count = len(replica.strategy.extended.worker_devices)  # R
    with tf.device("CPU:0"):  # a GPU is sent its own rows only
        rows = tf.shape(batch)[0] // count
        first = replica.replica_id_in_sync_group % count * rows
        return batch[first : first + rows]


def sum_replicas(values):
    """The sum over all replicas of a tensor, or of each tensor of a list."""
    return tf.distribute.get_replica_context().all_reduce("SUM", values)


def run_replicas(function, *args):
    """Call `function` on every replica; its result must be the same on all, and is returned once."""
    strategy = tf.distribute.get_strategy()
    return strategy.experimental_local_results(strategy.run(function, args))[0]
