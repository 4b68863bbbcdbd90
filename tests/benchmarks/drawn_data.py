"""What the benchmarks run on when no prepared data set is named: made-up features, captions as long as people's."""

import pathlib
import platform
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))

from data_utils import CHANNELS, END, LOCATIONS, START

import keras
import numpy as np
import tensorflow as tf


def draw_images(folder, count, vocab_size, seed=0):
    """`count` images of five captions each, their features (91 % zeros, as InceptionV3's) written below `folder`."""
    rng = np.random.default_rng(seed)
    images = []
    for number in range(count):
        features = rng.standard_normal((LOCATIONS, CHANNELS), np.float32) - 1.34
        np.save(folder / f"{number:06d}.npy", features.clip(0).astype(np.float16))
        lengths = np.clip(rng.gamma(8, 1.35, 5).astype(int), 2, 37)  # mean 10.3 words, a few beyond 25
        ids = [[START, *rng.integers(END + 1, vocab_size, length).tolist(), END] for length in lengths]
        images.append({"image_id": number, "file_name": f"{number:06d}.jpg", "ids": ids})
    return images


def describe_machine():
    cores = len(tf.config.experimental.list_logical_devices("CPU")), platform.machine()
    processor = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), cores[1]
    )
    return f"{processor}, {__import__('os').cpu_count()} cores; TensorFlow {tf.__version__}, Keras {keras.__version__}"
