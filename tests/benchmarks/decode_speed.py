"""Decoding speed, cached features in, captions out: the usual script's way against ours, in alternation.

PYTHONPATH=. python tests/benchmarks/decode_speed.py [--rounds N] [--prepared] [--run_dir DIR] [--<setting> VALUE ...]

It makes up features, and weights that never say <end>, for captions of 10 words; with --prepared it takes the trained
run that the settings name and its validation images. The usual way, written here as a short reference: one image
at a time, one word at a time in Python, keys computed anew for each. Both must give the same captions.
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import dataclasses
import pathlib
import tempfile
import time

import numpy as np
import tensorflow as tf
from drawn_data import describe_machine, draw_images, print_table

from captioning.captioner import Captioner, caption_batch
from captioning.features.cnn import CNNS
from captioning.features.cache import cached_batches, dataset_images, load_data
from captioning.settings import make_config
from captioning.training.run_folder import load_captioner, run_settings
from captioning.vocabulary import END, PAD, START, UNK
from config import Config
from model import build_captioner
from support.command_line import parse_command_line
from support.devices import set_up_devices
from support.process import run_script


def add_options(parser):
    parser.add_argument("--rounds", type=int, default=3, help="times that each way is measured (default: 3)")
    parser.add_argument("--count", type=int, default=400, help="images that are made up (default: 400)")
    parser.add_argument("--prepared", action="store_true", help="take the run that the settings name, and its data")


def main(argv):
    given, options = parse_command_line(argv, __doc__, Config, add_options)
    config = make_config(given)
    set_up_devices()
    with tempfile.TemporaryDirectory() as folder:
        if options.prepared:
            config = run_settings(given, config.run_dir)
            images = load_data(config).validation
            captioner = load_captioner(config)
        else:
            config = dataclasses.replace(config, features_dir=folder, max_words=10)
            images = draw_images(pathlib.Path(folder), options.count, config.vocab_size, CNNS[config.cnn].feature_shape)
            captioner = make_up_captioner(config)
        wanted = dataset_images(images, config)
        few = wanted[:10]
        compare(captioner, few, wanted, config)
        rates = {"usual": [], "ours": []}
        for _ in range(options.rounds + 1):  # the first round warms up
            rates["usual"].append(rate(few, decode_the_usual_way, captioner, config))
            rates["ours"].append(rate(wanted, decode_our_way, captioner, config))
    print(f"{len(images)} images, {config.decode_batch} at a time, greedy")
    print(describe_machine())
    print_table("decoding", "images/s", rates)


def make_up_captioner(config):
    encoder, decoder = build_captioner(config, config.vocab_size, np.zeros(CNNS[config.cnn].channels, np.float32))
    decoder.output_layer.bias.assign(tf.one_hot(END, config.vocab_size, on_value=-1e6))
    return Captioner(encoder, decoder, [f"word{i}" for i in range(config.vocab_size)], "none")


def decode_the_usual_way(captioner, images, config):
    captions = []
    for image in images:
        features = tf.constant(np.load(image.feature_path).astype(np.float32)[np.newaxis])
        encoded_features = captioner.encoder(features)
        hidden = captioner.decoder.initial_hidden(encoded_features)
        words = [START]
        while words[-1] != END and len(words) <= config.max_words:
            logits, hidden, _ = captioner.decoder(tf.constant([words[-1:]]), encoded_features, hidden)
            logits = logits[0].numpy()
            logits[[PAD, UNK, START, *repeats(words, config.repeat_block)]] = -np.inf
            words.append(int(logits.argmax()))
        captions.append(" ".join(captioner.vocabulary[word] for word in words[1:] if word != END))
    return captions


def repeats(words, length):
    """The words that would say a sequence of `length` words, 2 or more, for the second time; none for 0."""
    ends = range(length - 1, len(words)) if length else ()
    return [words[end] for end in ends if words[end - length + 1 : end] == words[len(words) - length + 1 :]]


def decode_our_way(captioner, images, config):
    batches = cached_batches(images, config)
    return [caption.caption for batch in batches for caption in caption_batch(captioner, *batch, config)]


def compare(captioner, few, images, config):
    usual, ours = decode_the_usual_way(captioner, few, config), decode_our_way(captioner, images, config)
    assert usual == ours[: len(few)], (usual, ours[: len(few)])


def rate(images, function, captioner, config):
    start = time.perf_counter()
    function(captioner, images, config)
    return len(images) / (time.perf_counter() - start)


if __name__ == "__main__":
    run_script(main)
