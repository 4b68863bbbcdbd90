"""What the benchmarks share: made-up data for when no prepared data set is named, and the table that they print."""

import pathlib
import platform

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from captioning.data.captioned_images import CaptionedImage
from captioning.data.prepared_data import Prepared, encode_images
from captioning.features.cnn import CNNS
from captioning.features.feature_files import write_features
from captioning.vocabulary import SPECIAL_WORDS
from support.devices import usable_cores


def draw_images(folder, count, vocab_size, shape=CNNS["InceptionV3"].feature_shape, seed=0):
    """Images of five captions each, of made-up words, and their features.

    Args:
      folder: pathlib.Path to write the features to.
      count: int, how many images.
      vocab_size: int, V; there are as many different words, without the special ones.
      shape: (P, F)

    Returns:
      list of CaptionedImage
    """
    rng = np.random.default_rng(seed)
    images = []
    for number in range(count):
        features = rng.standard_normal(shape, np.float32) - 1.34  # 91 % zeros, as InceptionV3's
        write_features([folder / f"{number:06d}.npy"], features.clip(0)[np.newaxis], "float16")
        lengths = rng.lognormal(2.32, 0.34, 5).round().clip(2, 37).astype(int)  # as Flickr8k's: mean 10.8 words
        drawn = [rng.integers(vocab_size - len(SPECIAL_WORDS), size=length) for length in lengths]
        captions = [" ".join(f"w{word}" for word in words) for words in drawn]
        images.append(CaptionedImage(number, f"{number:06d}.jpg", captions=captions, references=captions))
    return images


def draw_prepared(folder, count, config):
    """Prepared data of `draw_images`, all of them to train on and ten to validate."""
    words = [f"w{word}" for word in range(config.vocab_size - len(SPECIAL_WORDS))]
    vocabulary = [*SPECIAL_WORDS, *words]
    images = encode_images(draw_images(folder, count, config.vocab_size, CNNS[config.cnn].feature_shape), vocabulary)
    mean = np.zeros(CNNS[config.cnn].channels, np.float32)
    return Prepared(images, images[:10], [], vocabulary, mean, feature_std=1.0, network="made up")


def draw_photographs(folder, count):
    """JPEG files of 640x480 with smooth noise of many scales, which compresses about as well as photographs.

    Returns:
      list of pathlib.Path
    """
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        pixels = np.zeros((480, 640, 3), np.float32)
        for scale in (4, 16, 60, 120):
            noise = rng.integers(0, 256, (480 // scale, 640 // scale, 3), np.uint8)
            pixels += np.asarray(Image.fromarray(noise).resize((640, 480)), np.float32) / 4
        paths.append(folder / f"{number:06d}.jpg")
        Image.fromarray(pixels.astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def describe_machine():
    names = pathlib.Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.machine()
    return f"{processor}, {usable_cores()} cores; TensorFlow {tf.__version__}, Keras {keras.__version__}"


def print_table(stage, unit, rates):
    """Print a Markdown table of each way's rate and of the ratio of `ours` to `usual`, leaving out the first round."""
    print(f"\n| {stage} | {unit}, median (min-max) |\n|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {np.median(values[1:]):.1f} ({min(values[1:]):.1f}-{max(values[1:]):.1f}) |")
    ratios = np.array(rates["ours"][1:]) / np.array(rates["usual"][1:])
    print(f"| **ours / usual** | **{np.median(ratios):.2f}** ({ratios.min():.2f}-{ratios.max():.2f}) |")
