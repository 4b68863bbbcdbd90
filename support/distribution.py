"""Training on several devices or hosts: one replica on each device, and all take the same step (tf.distribute).

Outside of `replicas` there is one replica, and the functions below work as well.
"""

import contextlib
import json
import os
import re
import signal
import sys

import numpy as np
import tensorflow as tf

from support.errors import UserError
from support.process import set_handler

_TF_CONFIG_EXAMPLE = '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'

_FACTS_BYTES = 8_192  # of a process's facts, which are all sent in this size

# What TensorFlow raises when another worker is gone; it depends on how that one went and on who noticed.
_WORKER_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
)


@contextlib.contextmanager
def replicas(strategy, devices=None):
    """Compute where `strategy` says; only the chief prints. TensorFlow must not have computed anything before.

    Args:
      strategy: str, the setting.
      devices: list of str, what to compute on; the GPUs of this machine if not given.

    Raises:
      UserError: what `_open_strategy` raises, or another worker stopped.
    """
    opened = _open_strategy(strategy, devices)
    try:
        with opened.scope(), contextlib.redirect_stdout(sys.stdout if is_chief() else None):
            yield
    except _WORKER_LOST as error:
        if strategy != "multiworker":
            raise
        reason = re.search(r"aborted by: (.*)", error.message) or re.search("(.*)", error.message)
        raise UserError(
            "another worker stopped or cannot be reached: run the same command on every worker, "
            f"which continues from the last checkpoint ({reason[1][:200]})"
        ) from error


def _open_strategy(name, devices=None):
    """The tf.distribute.Strategy that the setting `strategy` names; arguments as in `replicas`.

    Raises:
      UserError: `mirrored` without several GPUs, or `multiworker` without a TF_CONFIG that can be used.
    """
    if name == "multiworker":
        _check_tf_config()
        print("waiting for all workers of TF_CONFIG")
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
        except (tf.errors.OpError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{error}".splitlines()[0]
            raise UserError(f"this worker cannot start ({reason}): correct its address in TF_CONFIG") from error
        set_handler(signal.SIGTERM, signal.SIG_DFL)  # TensorFlow has made the process ignore it
        return strategy
    devices = devices or [device.name for device in tf.config.list_logical_devices("GPU")]
    if len(devices) > 1:
        return tf.distribute.MirroredStrategy(devices)
    if name == "mirrored":
        raise UserError(
            f"--strategy mirrored is for several GPUs, and TensorFlow finds {len(devices)} here: "
            "run the same command with --strategy auto"
        )
    return tf.distribute.get_strategy()


def _check_tf_config():
    """Raise UserError unless the environment variable TF_CONFIG lists the workers and says which one this is."""
    remedy = f"set it on every worker, on the first to TF_CONFIG='{_TF_CONFIG_EXAMPLE}'"
    if "TF_CONFIG" not in os.environ:
        raise UserError(f"--strategy multiworker needs the environment variable TF_CONFIG: {remedy}")
    try:
        value = json.loads(os.environ["TF_CONFIG"])
        workers, index = value["cluster"][value["task"]["type"]], int(value["task"]["index"])
        fits = isinstance(workers, list) and 0 <= index < len(workers) and {*value["cluster"]} <= {"chief", "worker"}
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"TF_CONFIG does not list the workers and say which of them this one is: {remedy}")


def local_replica_ids():
    """The numbers of the replicas that this process computes, list of int. The process of replica 0 is the chief."""
    strategy = tf.distribute.get_strategy()
    numbers = strategy.experimental_distribute_values_from_function(lambda replica: replica.replica_id_in_sync_group)
    return [int(number) for number in strategy.experimental_local_results(numbers)]


def is_chief():
    """Whether this is the process that prints and writes files."""
    return 0 in local_replica_ids()


def check_same_everywhere(facts, remedy):
    """Raise UserError where the processes do not have the same facts. All must call this.

    Args:
      facts: dict of name to a value that JSON can hold.
      remedy: str, what the user can do. It ends the message, which names the first fact that differs, and two workers.
    """
    first, *others = map(json.loads, _gather_texts(json.dumps(facts)))
    for name in first:
        for number, other in enumerate(others, 1):
            if other.get(name) != first[name]:
                labels = _worker_labels()
                raise UserError(
                    f"{name} is not the same on every worker ({first[name]} on {labels[0]}, "
                    f"{other.get(name)} on {labels[number]}): {remedy}"
                )


def _worker_labels():
    """What to call each process of TF_CONFIG, such as `worker 1 (host2:2222)`, in the order of their replicas."""
    cluster = json.loads(os.environ["TF_CONFIG"])["cluster"]
    return [f"{job} {i} ({host})" for job in ("chief", "worker") for i, host in enumerate(cluster.get(job, []))]


def _gather_texts(text):
    """The texts of all processes, in the order of their replicas. All must call this. str -> list of str, none empty"""
    data = np.frombuffer(text.encode().ljust(_FACTS_BYTES), np.uint8)
    texts = np.zeros((tf.distribute.get_strategy().num_replicas_in_sync, _FACTS_BYTES))
    texts[local_replica_ids()[0]] = data  # all others are 0, so the sum has each process's text in a row of its own
    rows = _add_processes(texts).astype(np.uint8)
    return [row.tobytes().decode().rstrip() for row in rows if row.any()]


def share_batches(order, batch_size):
    """The part of an epoch's captions that this process reads: those of its replicas, of every batch.

    Args:
      order: int (N,), positions of captions; each `batch_size` in a row are a batch.

    Returns:
      int (batches, R*b): positions for each of this process's R replicas. Every replica gets the same number b in each
      batch; -1 stands where the batch has no caption left for it. Captions are dealt out in turn, so that the replicas
      have the same work where captions are in order of length.
    """
    replicas, size = tf.distribute.get_strategy().num_replicas_in_sync, min(batch_size, len(order))
    batches = np.append(order, np.full(-len(order) % size, -1, order.dtype)).reshape(-1, size)
    batches = np.pad(batches, ((0, 0), (0, -size % replicas)), constant_values=-1)
    dealt = batches.reshape(len(batches), -1, replicas).transpose(0, 2, 1)  # (batches, all replicas, b)
    return dealt[:, local_replica_ids()].reshape(len(batches), -1)


def replica_rows(batch):
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


def run_on_each(function, *args):
    """Call `function` on every replica. Returns a tuple of the results of this process's replicas."""
    strategy = tf.distribute.get_strategy()
    return strategy.experimental_local_results(strategy.run(function, args))


def run_replicas(function, *args):
    """Call `function` on every replica; its result must be the same on all, and is returned once."""
    return run_on_each(function, *args)[0]


def sum_processes(number):
    """The sum over all processes of a float that each of them has. All must call this."""
    return float(_add_processes(np.float64(number)))


def _add_processes(array):
    """The sum over all processes of an array that each of them has, float64 (...) -> (...). All must call this."""
    strategy, first = tf.distribute.get_strategy(), local_replica_ids()[0]
    given = strategy.experimental_distribute_values_from_function(
        lambda replica: tf.constant(array if replica.replica_id_in_sync_group == first else np.zeros_like(array))
    )
    return strategy.reduce("SUM", given, axis=None).numpy()


def value_of_chief(compute):
    """What `compute` returns on the chief, a float, in all processes. The others do not call it."""
    return sum_processes(float(compute()) if is_chief() else 0.0)


def wait_for_chief():
    """Return when the chief calls this too, and so has written what it was to write before."""
    value_of_chief(lambda: 0.0)
