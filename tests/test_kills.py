"""A few kills at random moments, of the many that tests/soak.py causes."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

import data_utils
import soak
import train_image_caption_model as training
from conftest import options, write_coco


@pytest.mark.slow
def test_the_soak_starts_by_the_command_that_it_names():
    environment = {**os.environ, "PYTHONPATH": "."}
    subprocess.run([sys.executable, "tests/soak.py", "--help"], cwd=soak.ROOT, env=environment, check=True)


@pytest.mark.slow
def test_preparing_survives_a_kill(tmp_path):
    write_coco(tmp_path / "coco")
    start = time.perf_counter()
    data_utils.main(options(tmp_path))
    seconds = time.perf_counter() - start
    rng = np.random.default_rng(4)
    assert soak.bear_kills("preparing", tmp_path, tmp_path / "data", [], 1, seconds, rng) == (1, [])


@pytest.mark.slow
def test_training_survives_kills(trained, tmp_path):
    settings = ["--epochs", "6", "--patience", "99", "--checkpoint_minutes", "0.01", "--precision", "float32"]
    training.main([*options(trained), *settings, "--run_dir", str(tmp_path)])
    rng = np.random.default_rng(28)
    assert soak.bear_kills("training", trained, tmp_path, settings, 2, 9.0, rng) == (2, [])
