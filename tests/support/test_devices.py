import os
import pathlib
import shutil
import time

import pytest
import tensorflow as tf

from support import devices
from support.devices import _has_idle_gpu, describe_devices, has_fast_bfloat16, set_up_devices, usable_cores


class Gpu:
    """What tf.config tells of a GPU."""

    def __init__(self, number, device_name, capability):
        self.name = f"/physical_device:GPU:{number}"
        self.details = {"device_name": device_name, "compute_capability": capability}


A100, V100 = Gpu(0, "NVIDIA A100", (8, 0)), Gpu(1, "Tesla V100", (7, 0))


def pretend_gpus(monkeypatch, *gpus):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: list(gpus) if kind == "GPU" else [])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: gpu.details)


def pretend_files(monkeypatch, **texts):
    """Let files whose paths end in these names, written with _ for /, have these texts. None: they are not there."""
    real = pathlib.Path.read_text

    def read_text(path, *args, **kwargs):
        for name, text in texts.items():
            if str(path).replace("/", "_").replace(".", "_").endswith(name):
                if text is None:
                    raise FileNotFoundError(path)
                return text
        return real(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "read_text", read_text)


def test_every_gpu_lets_memory_grow_and_all_are_named(monkeypatch, capsys):
    pretend_gpus(monkeypatch, A100, V100)
    grown = []
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, on: grown.append((gpu, on)))
    set_up_devices()
    assert grown == [(A100, True), (V100, True)]
    assert capsys.readouterr().out == "computing on 2 GPUs: NVIDIA A100, Tesla V100\n"


def test_a_single_gpu_is_one(monkeypatch):
    pretend_gpus(monkeypatch, A100)
    assert describe_devices() == "computing on 1 GPU: NVIDIA A100"


def test_a_cpu_is_named_with_its_cores(monkeypatch):
    pretend_gpus(monkeypatch)
    monkeypatch.setattr(devices, "usable_cores", lambda: 3)
    monkeypatch.setattr(devices, "_has_idle_gpu", lambda: False)
    assert describe_devices() == "computing on the CPU, 3 cores"


def test_a_gpu_that_tensorflow_cannot_use_is_named_with_the_line_that_mends_it(monkeypatch):
    pretend_gpus(monkeypatch)
    monkeypatch.setattr(devices, "_has_idle_gpu", lambda: True)
    line = describe_devices()
    assert line.startswith("computing on the CPU") and "\n" not in line
    assert "pip install 'tensorflow[and-cuda]'" in line and "WSL2" not in line
    monkeypatch.setattr(devices.sys, "platform", "win32")
    assert "under Linux only, which WSL2 runs on Windows; there pip install" in describe_devices()


def test_memory_that_a_notebook_has_taken_already_is_no_error(monkeypatch, capsys):
    pretend_gpus(monkeypatch, A100)

    def refuse(gpu, on):
        raise RuntimeError("Physical devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", refuse)
    set_up_devices()
    assert capsys.readouterr().out == "computing on 1 GPU: NVIDIA A100\n"


@pytest.mark.parametrize(
    ("folder", "program", "visible", "idle"),
    [
        (True, None, None, True),
        (False, "/usr/bin/nvidia-smi", None, True),
        (False, None, None, False),
        (True, None, "0", True),
        (True, None, "", False),  # hidden on purpose
        (True, None, "-1", False),
    ],
)
def test_a_gpu_is_idle_if_the_machine_has_one_that_nobody_hid(monkeypatch, folder, program, visible, idle):
    monkeypatch.setattr(pathlib.Path, "is_dir", lambda path: folder)
    monkeypatch.setattr(shutil, "which", lambda name: program)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _has_idle_gpu() == idle


@pytest.fixture
def measured_anew(monkeypatch):
    """What this process knows of its CPU stays as it is: other tests compute by it."""
    monkeypatch.setattr(devices, "_multiplies_bfloat16_faster", devices._multiplies_bfloat16_faster.__wrapped__)


@pytest.mark.usefixtures("measured_anew")
@pytest.mark.parametrize(
    ("gpus", "flags", "seconds", "fast"),
    [
        ([A100], "", 1.0, True),
        ([V100], "amx_bf16", 0.1, False),  # the GPU computes, whatever the CPU can do
        ([], "fpu avx512f amx_bf16 sse", 0.3, True),
        ([], "fpu avx512_bf16", 0.5, True),
        ([], "fpu avx512_bf16", 1.8, False),  # it has the instructions, and they are slow
        ([], "fpu avx512f", 0.1, False),
        ([], None, 0.1, False),  # not Linux
    ],
)
def test_bfloat16_is_fast_where_the_device_multiplies_it_faster(monkeypatch, gpus, flags, seconds, fast):
    monkeypatch.setattr(devices, "_time_product", lambda dtype: seconds if dtype == tf.bfloat16 else 1.0)
    pretend_gpus(monkeypatch, *gpus)
    pretend_files(monkeypatch, proc_cpuinfo=flags if flags is None else f"processor : 0\nflags : {flags}\n")
    assert has_fast_bfloat16() == fast


@pytest.mark.usefixtures("measured_anew")
@pytest.mark.parametrize(("slow", "fast"), [(tf.float32, True), (tf.bfloat16, False)])
def test_what_other_programs_take_of_the_cpu_does_not_count(monkeypatch, slow, fast):
    """Products of the quicker type are kept waiting."""

    def multiply(x, _):
        if x.dtype != slow:
            time.sleep(0.03)
        end = time.process_time() + (0.008 if x.dtype == slow else 0.002)
        while time.process_time() < end:
            pass

    pretend_gpus(monkeypatch)
    pretend_files(monkeypatch, proc_cpuinfo="flags : avx512_bf16")
    monkeypatch.setattr(tf, "matmul", multiply)
    assert has_fast_bfloat16() == fast


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("50000 100000\n", 1),
        ("6400000 100000\n", 8),
        (None, 8),
        ("", 8),
        ("no numbers", 8),
    ],
)
def test_a_containers_share_of_the_cores_counts(monkeypatch, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    pretend_files(monkeypatch, sys_fs_cgroup_cpu_max=limit)
    assert usable_cores() == cores


def test_without_affinity_the_machines_cores_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    pretend_files(monkeypatch, sys_fs_cgroup_cpu_max=None)
    assert usable_cores() == 5
