"""Training speed: the usual captioning script's way against ours, in alternation on the same captions.

PYTHONPATH=. python tests/benchmarks/train_speed.py [--rounds N] [--prepared] [--dataset NAME] [--<setting> VALUE ...]
PYTHONPATH=. python tests/benchmarks/train_speed.py --prepared --losses EPOCHS [--dataset NAME] [--<setting> VALUE ...]

It makes up captions as long as people's, and features; with --prepared it takes the prepared data set that the
settings name. With --losses it compares what they learn instead. The usual way, written here as a short reference:
features of each caption loaded by numpy, captions in any order and padded to the longest of the data set, and keys,
embedding and output layer inside a loop unrolled over all words; Keras's Adam. Before anything is measured, both ways'
losses and gradients are compared, at weights that have been trained for some steps.
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import dataclasses
import pathlib
import tempfile
import time

import keras
import numpy as np
import tensorflow as tf
import train_image_caption_model as training
from drawn_data import describe_machine, draw_prepared, print_table

from captioning.data.prepared_data import read_prepared_settings
from captioning.features.cache import load_data, features_folder
from captioning.features.cnn import CNNS
from captioning.settings import DATA_SETTINGS, adopt_settings, make_config
from captioning.training.batches import batch_starts, collect_captions
from captioning.vocabulary import PAD
from config import Config
from model import caption_loss
from support.command_line import parse_command_line
from support.devices import set_up_devices
from support.errors import UserError
from support.process import run_script

COMPARED_AFTER = 20  # steps; at the first weights attention is uniform, and a wrong one might pass
WORST_LOSS, WORST_GRADIENT = 1e-3, 0.05  # relative differences, as ours may multiply in bfloat16


def add_options(parser):
    parser.add_argument("--rounds", type=int, default=3, help="times that each way is measured (default: 3)")
    parser.add_argument("--count", type=int, default=2000, help="images of five captions each (default: 2000)")
    parser.add_argument("--prepared", action="store_true", help="take the prepared data set that the settings name")
    parser.add_argument(
        "--losses", type=int, metavar="EPOCHS", help="print each way's losses of so many epochs instead"
    )


def main(argv):
    given, options = parse_command_line(argv, __doc__, Config, add_options)
    if options.losses and not options.prepared:
        raise UserError("made-up captions have nothing to learn: --losses takes --prepared too")
    set_up_devices()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        config = make_config(given)
        if options.prepared:
            data_dir = config.data_dir
            config = adopt_settings(given, read_prepared_settings(data_dir), DATA_SETTINGS, data_dir)
            prepared = load_data(config)
        else:
            config = dataclasses.replace(config, features_dir=name)
            prepared = draw_prepared(folder, options.count, config)
        usual_state, state = open_runs(prepared, folder, config)
        captions = collect_captions(prepared.train, features_folder(config))
        usual = iter(usual_batches(captions, config))
        check_same_gradients(usual_state, state, usual, config)
        if options.losses:
            validation = collect_captions(prepared.validation, features_folder(config))
            compare_losses(usual_state, state, usual, captions, validation, options.losses, config)
        else:
            compare_speed(usual_state, state, usual, captions, options.rounds, config)


def open_runs(prepared, folder, config):
    """The TrainingStates of the usual way and of ours, which begin at the same weights."""
    usual = dataclasses.replace(config, run_dir=str(folder / "usual"), precision="float32")
    ours = dataclasses.replace(config, run_dir=str(folder / "ours"))
    usual_state, state = training.open_run(prepared, usual), training.open_run(prepared, ours)
    usual_state.optimizer = keras.optimizers.Adam(config.learning_rate, global_clipnorm=config.clip_norm)
    usual_state.optimizer.build(usual_weights(usual_state))
    return usual_state, state


def compare_speed(usual_state, state, usual, captions, rounds, config):
    rates = {"usual": [], "ours": []}
    for number in range(rounds + 1):  # the first round warms up
        count, start = 0, time.perf_counter()
        for _ in range(5):
            features, words = next(usual)
            float(usual_step(usual_state, features, words))
            count += len(words)
        rates["usual"].append(count / (time.perf_counter() - start))
        rates["ours"].append(training.train_epoch(state, captions, number, config).captions_per_second)
    print(f"{len(captions.lengths)} captions, longest {captions.lengths.max() - 2} words, batch {config.batch_size}")
    print(f"precision {config.precision}; {describe_machine()}")
    print_table("training", "captions/s", rates)


def compare_losses(usual_state, state, usual, captions, validation, epochs, config):
    """The usual way's output layer starts at zeros, as is usual."""
    usual_state.decoder.output_layer.bias.assign(tf.zeros_like(usual_state.decoder.output_layer.bias))
    print("| epoch | usual: training | validation | ours: training | validation |")
    print("|---|---|---|---|---|")
    for epoch in range(epochs):
        batches = len(batch_starts(len(captions.lengths), config.batch_size))
        losses = [np.mean([float(usual_step(usual_state, *next(usual))) for _ in range(batches)])]
        losses.append(training.validate(usual_state, validation, config))
        losses.append(training.train_epoch(state, captions, epoch, config).train_loss)
        losses.append(training.validate(state, validation, config))
        print(f"| {epoch + 1} | " + " | ".join(f"{loss:.3f}" for loss in losses) + " |", flush=True)


# --- The same computation ---------------------------------------------------------------------------------------


def check_same_gradients(usual_state, state, usual, config):
    """Raise AssertionError unless both ways have the same loss and gradients, without dropout, on one batch.

    They are compared at weights that the usual way has trained for some steps; the runs then begin at the first ones.
    """
    first = [weight.numpy() for weight in state.trainable_variables]
    optimizer = keras.optimizers.Adam(config.learning_rate)
    optimizer.build(usual_weights(usual_state))
    for _ in range(COMPARED_AFTER):
        _, gradients = usual_gradients(usual_state, *next(usual))
        optimizer.apply_gradients(zip(gradients, usual_weights(usual_state), strict=True))
    for weight, trained in zip(state.trainable_variables, usual_state.trainable_variables, strict=True):
        weight.assign(trained)
    features, words = next(usual)
    usual_loss, theirs = usual_gradients(usual_state, features, words)
    loss, ours = our_gradients(state, tf.cast(features, config.feature_dtype), words)
    np.testing.assert_allclose(loss, usual_loss, rtol=WORST_LOSS)
    for weight, our, their in zip(usual_weights(state), ours, theirs, strict=True):
        our, their = tf.convert_to_tensor(our), tf.convert_to_tensor(their)  # the embedding's is in parts
        difference = float(tf.norm(our - their) / tf.norm(their))
        assert difference < WORST_GRADIENT, f"{weight.path}: the gradients differ by {difference:.2%}"
    for weights in (state.trainable_variables, usual_state.trainable_variables):
        for weight, value in zip(weights, first, strict=True):
            weight.assign(value)


@tf.function
def our_gradients(state, features, words):
    """Loss () and gradients of our way, without dropout, attention term and detection."""
    with tf.GradientTape() as tape:
        logits, _ = state.decoder.teacher_forcing(words, state.encoder(features))
        loss = caption_loss(words, logits)
    return loss, tape.gradient(loss, usual_weights(state))


# --- The usual way ----------------------------------------------------------------------------------------------


def usual_weights(state):
    """All trainable weights but the detector's, which the usual way does not have."""
    apart = {weight.path for weight in state.decoder.detector.trainable_variables}
    return [weight for weight in state.trainable_variables if weight.path not in apart]


def usual_batches(captions, config):
    words = captions.words[:-1].to_tensor(PAD)  # (N, the longest)

    def load(path, caption):
        features = tf.numpy_function(lambda name: np.load(name.decode()).astype(np.float32), [path], tf.float32)
        return tf.ensure_shape(features, CNNS[config.cnn].feature_shape), caption

    dataset = tf.data.Dataset.from_tensor_slices((captions.feature_paths[:-1], words))
    dataset = dataset.shuffle(len(words), seed=config.seed).map(load, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.repeat().batch(config.batch_size).prefetch(tf.data.AUTOTUNE)


def usual_loss(state, features, words):
    encoded_features = state.encoder(features)
    hidden = state.decoder.initial_hidden(encoded_features)
    total, count = 0.0, 0.0
    for t in range(words.shape[1] - 1):
        logits, hidden, _ = state.decoder(words[:, t : t + 1], encoded_features, hidden)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(words[:, t + 1], logits)
        real = tf.cast(words[:, t + 1] != PAD, tf.float32)
        total += tf.reduce_sum(losses * real)
        count += tf.reduce_sum(real)
    return total / count


@tf.function
def usual_gradients(state, features, words):
    """Loss () and gradients of the usual way."""
    with tf.GradientTape() as tape:
        loss = usual_loss(state, features, words)
    return loss, tape.gradient(loss, usual_weights(state))


@tf.function
def usual_step(state, features, words):
    loss, gradients = usual_gradients(state, features, words)
    state.optimizer.apply_gradients(zip(gradients, usual_weights(state), strict=True))
    return loss


if __name__ == "__main__":
    run_script(main)
