"""Decoding speed, cached features in, captions out: the usual script's way against ours, in alternation.

PYTHONPATH=. python tests/benchmarks/decode_speed.py [--rounds N] [--prepared] [--dataset NAME] [--<field> VALUE ...]

It makes up features, and weights that never say <end>, for captions of 10 words; with --prepared it takes the data set
and the trained run that the settings name. The usual way, written here as a short reference: one image
at a time, one word at a time in Python, keys computed anew for each. Both must give the same captions.
"""

import dataclasses
import pathlib
import tempfile
import time

import inference_image_caption as inference
from command_line import parse_command_line, run_script
from data_utils import END, PAD, START, UNK, feature_path, load_prepared
from drawn_data import describe_machine, draw_images, print_table
from model import build_captioner

import numpy as np
import tensorflow as tf


def add_options(parser):
    parser.add_argument("--rounds", type=int, default=3, help="times that each way is measured (default: 3)")
    parser.add_argument("--prepared", action="store_true", help="take the data set and run that the settings name")


def main(argv):
    config, options = parse_command_line(argv, __doc__, add_options)
    with tempfile.TemporaryDirectory() as folder:
        if options.prepared:
            images = load_prepared(config).validation
            captioner = inference.load_captioner(config)
        else:
            config = dataclasses.replace(config, features_dir=folder, max_words=10)
            images = draw_images(pathlib.Path(folder), 400, config.vocab_size)
            captioner = make_up_captioner(config)
        few = images[:10]
        compare(captioner, few, images, config)
        rates = {"usual": [], "ours": []}
        for _ in range(options.rounds + 1):  # the first round warms up
            rates["usual"].append(rate(few, decode_the_usual_way, captioner, config))
            rates["ours"].append(rate(images, decode_our_way, captioner, config))
    print(f"{len(images)} images, {config.decode_batch} at a time, greedy")
    print(describe_machine())
    print_table("decoding", "images/s", rates)


def make_up_captioner(config):
    encoder, decoder = build_captioner(config, config.vocab_size)
    decoder.make_logits.bias.assign(tf.one_hot(END, config.vocab_size, on_value=-1e6))
    return inference.Captioner(encoder, decoder, [f"word{i}" for i in range(config.vocab_size)])


def decode_the_usual_way(captioner, images, config):
    captions = []
    for image in images:
        features = tf.constant(np.load(feature_path(image, config)).astype(np.float32)[np.newaxis])
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
    batches = inference.cached_batches(images, config)
    return [caption["caption"] for batch in batches for caption in inference.caption_batch(captioner, *batch, config)]


def compare(captioner, few, images, config):
    usual, ours = decode_the_usual_way(captioner, few, config), decode_our_way(captioner, images, config)
    assert usual == ours[: len(few)], (usual, ours[: len(few)])


def rate(images, function, captioner, config):
    start = time.perf_counter()
    function(captioner, images, config)
    return len(images) / (time.perf_counter() - start)


if __name__ == "__main__":
    run_script(main)
