"""What the scripts compute on: GPUs or the CPU, said in one line, and the number types that are fast there."""

import contextlib
import functools
import os
import pathlib
import shutil
import sys
import time

import tensorflow as tf


def set_up_devices():
    """Let TensorFlow take GPU memory as it needs it, and print one line that says what this script computes on.

    Without the first, a training would hold all memory of a GPU, and captioning beside it would fail. Must come before
    anything that TensorFlow computes.
    """
    for gpu in tf.config.list_physical_devices("GPU"):
        with contextlib.suppress(RuntimeError):  # a notebook has computed before, and holds what it holds
            tf.config.experimental.set_memory_growth(gpu, True)
    print(describe_devices())


def describe_devices():
    """One line: what TensorFlow computes on, and how to mend it where a GPU of this machine is left idle."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        names = [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus]
        return f"computing on {len(gpus)} GPU{'s' * (len(gpus) > 1)}: {', '.join(names)}"
    line = f"computing on the CPU, {usable_cores()} cores"
    if _has_idle_gpu():
        mending = "pip install 'tensorflow[and-cuda]' mends that"
        if sys.platform == "win32":
            mending = f"it uses GPUs under Linux only, which WSL2 runs on Windows; there {mending}"
        line += f"; TensorFlow cannot use the GPU of this machine: {mending}"
    return line


def _has_idle_gpu():
    """Whether the machine has an NVIDIA GPU that TensorFlow does not find, though nobody hid it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and (pathlib.Path("/proc/driver/nvidia/gpus").is_dir() or shutil.which("nvidia-smi") is not None)


def has_fast_bfloat16():
    """Whether the device that TensorFlow computes on multiplies bfloat16 faster than float32.

    A CPU is asked by multiplying: some that have the instructions take twice as long with them.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return compute_capability(gpus[0]) >= (8, 0)
    try:
        flags = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux; float32 is right everywhere
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"}) and _multiplies_bfloat16_faster()


@functools.cache
def _multiplies_bfloat16_faster():
    pairs = [(_time_product(tf.bfloat16), _time_product(tf.float32)) for _ in range(6)]
    bfloat16, float32 = map(min, zip(*pairs, strict=True))
    return bfloat16 < 0.8 * float32


def compute_capability(gpu):
    """Which number types an NVIDIA GPU is fast with: (major, minor), or (0, 0) where it is not known."""
    return tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0))


def _time_product(dtype):
    """Seconds of the processor that a product of two square matrices takes, whatever else the machine does."""
    x = tf.ones((1024, 1024), dtype)
    start = time.process_time()
    tf.matmul(x, x)
    return time.process_time() - start


def usable_cores():
    """The cores that this process may use: a container's share, where there is one, not the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(min(cores, round(int(quota) / int(period))), 1)
    except (OSError, ValueError):  # no such limit
        return cores
