"""Extraction speed, image files in, .npy files out: the usual script's way against ours, in alternation.

PYTHONPATH=. python tests/benchmarks/extract_speed.py [--rounds N] [--count N] [--folder DIR] [--<field> VALUE ...]

It draws photograph-like noise as JPEG files of 640x480; --folder takes the images of a folder instead. The usual way,
written here as a short reference: tf.data reads, decodes and resizes; Keras's model is called eagerly in float32.
The two ways' features are compared first.
"""

import dataclasses
import pathlib
import tempfile
import time

import data_utils
from command_line import UserError, parse_command_line, run_script
from drawn_data import describe_machine, print_table

import keras
import numpy as np
import tensorflow as tf
from PIL import Image


def add_options(parser):
    parser.add_argument("--rounds", type=int, default=3, help="times that each way is measured (default: 3)")
    parser.add_argument("--count", type=int, default=160, help="images a round (default: 160)")
    parser.add_argument("--folder", type=pathlib.Path, help="take the .jpg files of this folder")


def main(argv):
    config, options = parse_command_line(["--inception_weights", "random", *argv], __doc__, add_options)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        config = dataclasses.replace(config, features_dir=str(folder / "features"))
        paths = sorted(options.folder.glob("*.jpg")) if options.folder else draw_photographs(folder, options.count)
        paths = paths[: options.count]
        if not paths:
            raise UserError(f"no .jpg file is in {options.folder}: give another --folder")
        with data_utils.extraction_graphs(config):  # a rewriting of graphs, which leaves eager calls as they are
            similarity, rates = measure(paths, folder, options.rounds, config)
    print(f"{len(paths)} images, batch {config.extract_batch}, precision {config.extract_precision}")
    print(f"mean cosine between the two ways' features, per location: {similarity:.5f}")
    print(describe_machine())
    print_table("extraction", "images/s", rates)


def measure(paths, folder, rounds, config):
    network = data_utils.feature_network(config, paths)
    inception = usual_network(config, paths)
    similarity = compare(network, inception, paths[:32])
    ready = tf.constant(np.stack([data_utils.load_image(path) for path in paths[: config.extract_batch]]))
    rates = {"usual": [], "ours": [], "InceptionV3 alone, our graph": []}
    for _ in range(rounds + 1):  # the first round warms up
        rates["usual"].append(rate(len(paths), extract_the_usual_way, inception, paths, folder))
        rates["ours"].append(rate(len(paths), extract_our_way, network, paths, folder, config))
        rates["InceptionV3 alone, our graph"].append(rate(len(ready) * 5, call_often, network, ready, 5))
    return similarity, rates


def draw_photographs(folder, count):
    """Smooth noise of many scales, which JPEG compresses about as well as photographs."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        pixels = sum(
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (480 // scale, 640 // scale, 3), np.uint8)).resize((640, 480)),
                np.float32,
            )
            for scale in (4, 16, 60, 120)
        )
        paths.append(folder / f"{number:06d}.jpg")
        Image.fromarray((pixels / 4).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def usual_network(config, paths):
    weights = config.inception_weights
    model = keras.applications.InceptionV3(
        include_top=False, weights=None if weights == "random" else weights, input_shape=(299, 299, 3)
    )
    if weights == "random":
        data_utils.set_random_weights(model, config, paths)
    return model


def usual_pixels(path):
    pixels = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
    return tf.image.resize(pixels, (299, 299), antialias=True) / 127.5 - 1, path


def extract_the_usual_way(inception, paths, folder):
    for pixels, names in data_utils.parallel_map(usual_pixels, [str(path) for path in paths]).batch(16):
        features = inception(pixels, training=False)
        for name, feature in zip(names.numpy(), tf.reshape(features, (-1, 64, 2048)).numpy(), strict=True):
            np.save(folder / (pathlib.Path(name.decode()).stem + ".usual.npy"), feature)


def extract_our_way(network, paths, folder, config):
    for done, features, _ in data_utils.extract_features(network, paths, config.extract_batch):
        data_utils.write_features([folder / (path.stem + ".npy") for path in done], features, config)


def call_often(network, ready, times):
    for _ in range(times):
        network(ready).numpy()


def rate(count, function, *args):
    start = time.perf_counter()
    function(*args)
    return count / (time.perf_counter() - start)


def compare(network, inception, paths):
    pixels = np.stack([data_utils.load_image(path) for path in paths])
    ours = network(tf.constant(pixels)).numpy()
    theirs = tf.reshape(inception(pixels / np.float32(127.5) - 1, training=False), ours.shape).numpy()
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    similarity = ((ours * theirs).sum(-1) / np.maximum(norms, 1e-9)).mean()
    assert similarity > 0.999, similarity
    return similarity


if __name__ == "__main__":
    run_script(main)
