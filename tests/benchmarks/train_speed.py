"""Training speed: the usual captioning script's way against ours, in alternation on the same captions.

PYTHONPATH=. python tests/benchmarks/train_speed.py [--rounds N] [--prepared] [--dataset NAME] [--<field> VALUE ...]
PYTHONPATH=. python tests/benchmarks/train_speed.py --prepared --losses EPOCHS [--dataset NAME] [--<field> VALUE ...]

It makes up captions as long as people's, and features; with --prepared it takes the prepared data set that the
settings name. With --losses it compares what they learn instead. The usual way, written here as a short reference:
features of each caption loaded by numpy, captions in any order and padded to the longest of the data set, and keys,
embedding and output layer inside a loop unrolled over all words; Keras's Adam. Both compute the same loss from the
same weights, which is checked first.
"""

import dataclasses
import pathlib
import tempfile
import time

import train_image_caption_model as training
from command_line import UserError, parse_command_line, run_script
from data_utils import CHANNELS, LOCATIONS, PAD, Prepared, load_prepared
from drawn_data import describe_machine, draw_images, print_table

import keras
import numpy as np
import tensorflow as tf


def add_options(parser):
    parser.add_argument("--rounds", type=int, default=3, help="times that each way is measured (default: 3)")
    parser.add_argument("--prepared", action="store_true", help="take the prepared data set that the settings name")
    parser.add_argument(
        "--losses", type=int, metavar="EPOCHS", help="print each way's losses of so many epochs instead"
    )


def main(argv):
    config, options = parse_command_line(argv, __doc__, add_options)
    if options.losses and not options.prepared:
        raise UserError("made-up captions have nothing to learn: --losses takes --prepared too")
    with tempfile.TemporaryDirectory() as folder:
        if options.prepared:
            prepared = load_prepared(config)
        else:
            config = dataclasses.replace(config, features_dir=folder)
            images = draw_images(pathlib.Path(folder), 2000, config.vocab_size)
            prepared = Prepared(
                images, [], [], [str(i) for i in range(config.vocab_size)], np.zeros(CHANNELS, np.float32), 1.0
            )
        ours = dataclasses.replace(config, run_dir=str(pathlib.Path(folder, "ours")))
        usual = dataclasses.replace(config, run_dir=str(pathlib.Path(folder, "usual")), precision="float32")
        runs = training.open_run(prepared, usual), training.open_run(prepared, ours)
        runs[0].optimizer = keras.optimizers.Adam(config.learning_rate, global_clipnorm=config.clip_norm)
        runs[0].optimizer.build(runs[0].encoder.trainable_variables + runs[0].decoder.trainable_variables)
        captions = training.collect_captions(prepared.train, config)
        check_same_loss(*runs, captions, config)
        if options.losses:
            validation = training.collect_captions(prepared.validation, config)
            compare_losses(*runs, captions, validation, options.losses, config)
        else:
            compare(*runs, captions, options.rounds, config)


def compare(usual_run, run, captions, rounds, config):
    usual = iter(usual_batches(captions, config))
    rates = {"usual": [], "ours": []}
    for number in range(rounds + 1):  # the first round warms up
        count, start = 0, time.perf_counter()
        for _ in range(5):
            features, words = next(usual)
            float(usual_step(usual_run, features, words))
            count += len(words)
        rates["usual"].append(count / (time.perf_counter() - start))

        rates["ours"].append(training.train_epoch(run, captions, number, config)["captions_per_second"])
    print(f"{len(captions.lengths)} captions, longest {captions.lengths.max() - 2} words, batch {config.batch_size}")
    print(f"precision {config.precision}; {describe_machine()}")
    print_table("training", "captions/s", rates)


def compare_losses(usual_run, run, captions, validation, epochs, config):
    """The usual way's output layer starts at zeros, as is usual."""
    usual_run.decoder.make_logits.bias.assign(tf.zeros_like(usual_run.decoder.make_logits.bias))
    usual = iter(usual_batches(captions, config))
    print("| epoch | usual: training | validation | ours: training | validation |")
    print("|---|---|---|---|---|")
    for epoch in range(epochs):
        batches = len(training.batch_starts(captions.lengths, config))
        losses = [np.mean([float(usual_step(usual_run, *next(usual))) for _ in range(batches)])]
        losses.append(training.validate(usual_run, validation, config))
        losses.append(training.train_epoch(run, captions, epoch, config)["train_loss"])
        losses.append(training.validate(run, validation, config))
        print(f"| {epoch + 1} | " + " | ".join(f"{loss:.3f}" for loss in losses) + " |", flush=True)


def check_same_loss(usual_run, run, captions, config):
    """Both ways without dropout on one batch: the usual loop's loss must be ours."""
    features, words = next(iter(usual_batches(captions, config)))
    theirs = usual_loss(usual_run, features, words)
    ours = training.validation_step(run, tf.cast(features, config.feature_dtype), words)
    np.testing.assert_allclose(theirs, ours, rtol=1e-3)  # ours may multiply in bfloat16


def usual_batches(captions, config):
    words = captions.words[:-1].to_tensor(PAD)  # (N, the longest)

    def load(path, caption):
        features = tf.numpy_function(lambda name: np.load(name.decode()).astype(np.float32), [path], tf.float32)
        return tf.ensure_shape(features, (LOCATIONS, CHANNELS)), caption

    dataset = tf.data.Dataset.from_tensor_slices((captions.paths[:-1], words)).shuffle(len(words), seed=config.seed)
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.repeat().batch(config.batch_size).prefetch(tf.data.AUTOTUNE)


def usual_loss(run, features, words):
    encoded_features = run.encoder(features)
    hidden = run.decoder.initial_hidden(encoded_features)
    total, count = 0.0, 0.0
    for t in range(words.shape[1] - 1):
        logits, hidden, _ = run.decoder(words[:, t : t + 1], encoded_features, hidden)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(words[:, t + 1], logits)
        real = tf.cast(words[:, t + 1] != PAD, tf.float32)
        total += tf.reduce_sum(losses * real)
        count += tf.reduce_sum(real)
    return total / count


@tf.function
def usual_step(run, features, words):
    weights = run.encoder.trainable_variables + run.decoder.trainable_variables
    with tf.GradientTape() as tape:
        loss = usual_loss(run, features, words)
    run.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
    return loss


if __name__ == "__main__":
    run_script(main)
