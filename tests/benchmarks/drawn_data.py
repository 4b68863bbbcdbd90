"""What the benchmarks share: made-up data for when no prepared data set is named, and the table that they print."""

import os
import pathlib
import platform

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
        lengths = rng.lognormal(2.32, 0.34, 5).round().clip(2, 37).astype(int)  # as Flickr8k's: mean 10.8 words
        ids = [[START, *rng.integers(END + 1, vocab_size, length).tolist(), END] for length in lengths]
        texts = {"captions": [""] * 5, "references": []}
        images.append({"image_id": number, "file_name": f"{number:06d}.jpg", **texts, "ids": ids})
    return images


def describe_machine():
    names = pathlib.Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    processor = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{processor}, {os.cpu_count()} cores; TensorFlow {tf.__version__}, Keras {keras.__version__}"


def print_table(stage, unit, rates):
    """Print a Markdown table of each way's rate and of the ratio of `ours` to `usual`, leaving out the first round."""
    print(f"\n| {stage} | {unit}, median (min-max) |\n|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {np.median(values[1:]):.1f} ({min(values[1:]):.1f}-{max(values[1:]):.1f}) |")
    ratios = np.array(rates["ours"][1:]) / np.array(rates["usual"][1:])
    print(f"| **ours / usual** | **{np.median(ratios):.2f}** ({ratios.min():.2f}-{ratios.max():.2f}) |")
