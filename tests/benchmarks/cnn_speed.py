"""How fast the CNNs of --cnn are, each by the graph that extraction runs, on batches that are ready in memory.

PYTHONPATH=. python tests/benchmarks/cnn_speed.py [--networks NAME ...] [--rounds N] [--<setting> VALUE ...]

The networks take turns, and the median round counts. Weights are random, which takes the same time.
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import dataclasses
import pathlib
import tempfile
import time

import numpy as np
import tensorflow as tf
from drawn_data import describe_machine, draw_photographs

from captioning.features.cnn import CNNS
from captioning.features.image_files import load_image
from captioning.features.network import extraction_graphs, extraction_precision, feature_network
from captioning.settings import read_settings
from support.devices import set_up_devices
from support.process import run_script

_NETWORKS = ("InceptionV3", "MobileNetV3Large", "EfficientNetV2B0", "EfficientNetV2B2")
_NETWORKS += ("EfficientNetV2S", "ResNet50V2", "DenseNet121", "VGG16")


def add_options(parser):
    parser.add_argument("--networks", nargs="+", choices=list(CNNS), default=_NETWORKS, help="(default: eight of them)")
    parser.add_argument("--rounds", type=int, default=5, help="batches that each network computes (default: 5)")


def main(argv):
    config, options = read_settings(["--inception_weights", "random", *argv], __doc__, add_options)
    set_up_devices()
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_photographs(pathlib.Path(folder), config.extract_batch)
        timers = {name: make_timer(dataclasses.replace(config, cnn=name), paths) for name in options.networks}
        seconds = [{name: timer() for name, timer in timers.items()} for _ in range(options.rounds)]
    print(describe_machine())
    print(f"batches of {len(paths)}, the median of {options.rounds}")
    for name in options.networks:
        rate = len(paths) / np.median([of_round[name] for of_round in seconds])
        precision = extraction_precision(dataclasses.replace(config, cnn=name))
        print(f"{name:18} {rate:6.1f} images/s  {precision}")


def make_timer(config, paths):
    """A function that returns the seconds which the CNN takes for one batch; it has computed one already."""
    pixels = tf.constant(np.stack([load_image(path, CNNS[config.cnn].image_size) for path in paths]))
    network = feature_network(config, paths[0].with_name(f"{config.cnn}.npz"), paths)

    def timer():
        with extraction_graphs(config):
            start = time.perf_counter()
            network(pixels).numpy()
            return time.perf_counter() - start

    timer()  # compiles the graph
    return timer


if __name__ == "__main__":
    run_script(main)
