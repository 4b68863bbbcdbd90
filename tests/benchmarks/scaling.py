"""How training scales: 1 and 2 worker processes of TF_CONFIG on this machine, pinned to a core each, in alternation.

PYTHONPATH=. python tests/benchmarks/scaling.py [--rounds N] [--count N] [--<setting> VALUE ...]

It makes up captions as long as people's, and features, and trains two epochs; the second one's captions/s are printed.
Both take the same steps of `batch_size` captions, of which each of 2 workers computes half.
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import csv
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import numpy as np
from drawn_data import describe_machine, draw_images

from captioning.data.prepared_data import save_prepared
from captioning.features.cnn import CNNS
from captioning.features.cache import measure_features, cached_network, features_folder
from captioning.features.missing import find_missing
from captioning.settings import read_settings
from model import build_captioner
from support.process import run_script


def add_options(parser):
    parser.add_argument("--rounds", type=int, default=3, help="times that each way is measured (default: 3)")
    parser.add_argument("--count", type=int, default=400, help="images of five captions each (default: 400)")


def main(argv):
    config, options = read_settings(argv, __doc__, add_options)
    cores = sorted(os.sched_getaffinity(0))[:2]
    rates = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, data_dir=folder, features_dir=f"{folder}/features", num_examples=None)
        images = prepare(pathlib.Path(folder), options.count, config)
        for number in range(options.rounds):
            for workers, measured in rates.items():
                measured.append(train(config, f"{folder}/run-{workers}-{number}", cores[:workers]))
    print(f"{5 * len(images)} captions, batch {config.batch_size}, precision {config.precision}; {describe_machine()}")
    print_reduced(images, config)
    print("\n| workers | captions/s, median (min-max) |\n|---|---|")
    for workers, measured in rates.items():
        print(f"| {workers} | {np.median(measured):.1f} ({min(measured):.1f}-{max(measured):.1f}) |")
    print(f"| **2 / 1** | **{np.median(rates[2]) / np.median(rates[1]):.2f}** |")


def prepare(folder, count, config):
    """Write what data_utils.py would leave for training. Returns the training images, list of CaptionedImage."""
    images = draw_images(folder / "features", count, config.vocab_size, CNNS[config.cnn].feature_shape)
    find_missing(images, config)  # writes down that the features were made elsewhere
    splits, measured = {"train": images, "validation": images[:20]}, measure_features(images, features_folder(config))
    save_prepared(splits, {}, *measured, cached_network(features_folder(config)), config)
    return images


def train(config, run_dir, cores):
    """Captions/s of one worker on each of `cores`, together."""
    settings = dataclasses.asdict(config) | {"run_dir": run_dir, "strategy": "multiworker", "epochs": 2}
    argv = [part for name, value in settings.items() if value != "" for part in (f"--{name}", str(value))]
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in cores]
    cluster = {"worker": [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]}
    for each in sockets:
        each.close()
    processes = []
    for index, core in enumerate(cores):
        task = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        command = ["taskset", "-c", str(core), sys.executable, "train_image_caption_model.py", *argv]
        environment = {**os.environ, "TF_CONFIG": json.dumps(task)}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    try:
        if any([process.wait() for process in processes]):
            raise SystemExit("a worker failed")
    finally:
        for process in processes:
            process.kill()
    with open(f"{run_dir}/history.csv", newline="") as file:
        return float(list(csv.DictReader(file))[1]["captions_per_second"])


def print_reduced(images, config):
    """Print how many bytes of gradients all workers exchange in a step."""
    encoder, decoder = build_captioner(config, config.vocab_size, np.zeros(CNNS[config.cnn].channels, np.float32))
    weights = sum(int(np.prod(weight.shape)) for weight in encoder.trainable_variables + decoder.trainable_variables)
    embedding = int(np.prod(decoder.embedding.embeddings.shape))
    lengths = [len(caption.split()) + 1 for image in images for caption in image.captions]  # with <end>
    words = np.mean(lengths) * config.batch_size
    print(
        f"per step: {4e-6 * (weights - embedding):.1f} MB of gradients all-reduced, and the word embeddings' rows "
        f"gathered, {4e-6 * words * config.embedding_dim:.2f} MB ({weights / 1e6:.2f} million weights in all)"
    )


if __name__ == "__main__":
    run_script(main)
