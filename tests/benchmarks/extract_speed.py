"""Extraction speed, image files in, .npy files out: the usual script's way against ours, in alternation.

PYTHONPATH=. python tests/benchmarks/extract_speed.py [--rounds N] [--count N] [--folder DIR] [--<setting> VALUE ...]

It draws photograph-like noise as JPEG files of 640x480; --folder takes the images of a folder instead. The usual way,
written here as a short reference, is that of TensorFlow's tutorial on image captioning: tf.data reads, decodes and
resizes; Keras's model is called eagerly in float32; each image's features are a .npy file. The two networks' features
of the same pixels are compared first, in float32 and in the number type that is measured.
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import dataclasses
import pathlib
import tempfile
import time

import numpy as np
import tensorflow as tf
from drawn_data import describe_machine, draw_photographs, print_table

from captioning.features.cnn import CNNS, preprocess
from captioning.features.extraction import extract_features
from captioning.features.feature_files import write_features
from captioning.features.image_files import load_image
from captioning.features.network import extraction_graphs, feature_network, load_cnn, network_identity
from captioning.features.random_weights import set_random_weights, set_statistics
from captioning.settings import read_settings
from support.devices import set_up_devices
from support.errors import UserError
from support.process import run_script


def add_options(parser):
    parser.add_argument("--rounds", type=int, default=3, help="times that each way is measured (default: 3)")
    parser.add_argument("--count", type=int, default=160, help="images a round (default: 160)")
    parser.add_argument("--folder", type=pathlib.Path, help="take the .jpg files of this folder")


def main(argv):
    config, options = read_settings(["--inception_weights", "random", *argv], __doc__, add_options)
    set_up_devices()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        config = dataclasses.replace(config, features_dir=str(folder / "features"))
        paths = sorted(options.folder.glob("*.jpg")) if options.folder else draw_photographs(folder, options.count)
        paths = paths[: options.count]
        if not paths:
            raise UserError(f"no .jpg file is in {options.folder}: give another --folder")
        statistics = folder / "random_statistics.npz"
        exact = dataclasses.replace(config, extract_precision="float32")
        with extraction_graphs(exact):
            network = feature_network(exact, statistics, paths[:64])
            inception = usual_network(config, statistics)
            similarity = compare(network, inception, paths[:32], CNNS[config.cnn])
            assert similarity > 0.9999, similarity
        with extraction_graphs(config):  # a rewriting of graphs, which leaves eager calls as they are
            network = feature_network(config, statistics)
            similarity = compare(network, inception, paths[:32], CNNS[config.cnn])
            # Random weights, unlike trained ones, make errors of rounding grow from layer to layer.
            assert similarity > 0.999 or config.inception_weights == "random", similarity
            rates = measure(network, inception, paths, folder, options.rounds, config)
    print(f"{len(paths)} images, batch {config.extract_batch}, precision {config.extract_precision}")
    print(f"mean cosine between the two networks' features, per location: {similarity:.5f}")
    print(describe_machine())
    print_table("extraction", "images/s", rates)


def measure(network, inception, paths, folder, rounds, config):
    """Each way's images/s in each round: dict of name to list of float."""
    side = CNNS[config.cnn].image_size
    ready = tf.constant(np.stack([load_image(path, side) for path in paths[: config.extract_batch]]))
    rates = {"usual": [], "ours": [], "the CNN alone, our graph": []}
    for _ in range(rounds + 1):  # the first round warms up
        rates["usual"].append(rate(len(paths), extract_the_usual_way, inception, paths, folder, CNNS[config.cnn]))
        rates["ours"].append(rate(len(paths), extract_our_way, network, paths, folder, config))
        rates["the CNN alone, our graph"].append(rate(len(ready) * 5, call_often, network, ready, 5))
    return rates


def usual_network(config, statistics):
    model = load_cnn(CNNS[config.cnn], config.inception_weights, "float32")
    if config.inception_weights == "random":
        set_random_weights(model, config.seed)
        set_statistics(model, statistics, network_identity(config))
    return model


def usual_pixels(path, cnn):
    pixels = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
    pixels = tf.image.resize(pixels, (cnn.image_size, cnn.image_size))
    return preprocess(pixels, cnn), path


def extract_the_usual_way(inception, paths, folder, cnn):
    dataset = tf.data.Dataset.from_tensor_slices([str(path) for path in paths])
    dataset = dataset.map(lambda path: usual_pixels(path, cnn), num_parallel_calls=tf.data.AUTOTUNE).batch(16)
    for pixels, names in dataset:
        features = inception(pixels)
        features = tf.reshape(features, (features.shape[0], -1, features.shape[3]))
        for feature, name in zip(features, names, strict=True):
            np.save(folder / (pathlib.Path(name.numpy().decode()).stem + ".usual.npy"), feature.numpy())


def extract_our_way(network, paths, folder, config):
    for done, features, _ in extract_features(network, CNNS[config.cnn], paths, config.extract_batch):
        write_features([folder / (path.stem + ".npy") for path in done], features, config.feature_dtype)


def call_often(network, ready, times):
    for _ in range(times):
        network(ready).numpy()


def rate(count, function, *args):
    start = time.perf_counter()
    function(*args)
    return count / (time.perf_counter() - start)


def compare(network, inception, paths, cnn):
    """The mean cosine between the two networks' features of the same pixels."""
    pixels = np.stack([load_image(path, cnn.image_size) for path in paths])
    ours = network(tf.constant(pixels)).numpy()
    theirs = tf.reshape(inception(preprocess(tf.constant(pixels, tf.float32), cnn), training=False), ours.shape).numpy()
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    return ((ours * theirs).sum(-1) / np.maximum(norms, 1e-9)).mean()


if __name__ == "__main__":
    run_script(main)
