"""Script 2: train the captioner on what data_utils.py prepared; the same command continues a run that stopped.

python train_image_caption_model.py [--dataset coco|demo] [--<field> VALUE ...]
"""

import csv
import dataclasses
import os
import pathlib
import shutil
import time
import zlib

from command_line import UserError, interrupts_held_back, parse_command_line, run_script
from data_utils import CHANNELS, LOCATIONS, feature_path, has_fast_bfloat16, load_prepared, read_feature
from files import free_space, locked, read_json, remove_leftovers, replacing, write_csv, write_json
from model import attention_loss, build_captioner, caption_loss

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

# What the weights' shapes depend on, besides the vocabulary: a run continues only with the same values.
MODEL_SETTINGS = ("encoder_dim", "embedding_dim", "units")


def main(argv):
    config, _ = parse_command_line(argv, __doc__)
    prepared = load_prepared(config)
    with locked(config.run_dir):
        run = open_run(prepared, config)
        history = read_history(run, config)
        train = collect_captions(prepared.train, config)
        validation = collect_captions(prepared.validation, config)

        try:
            with interrupts_held_back() as stop_if_asked:
                train_epochs(run, history, train, validation, stop_if_asked, config)
        except KeyboardInterrupt:
            save_last(run, config)
            print(f"stopped in epoch {int(run.epoch) + 1}, after {int(run.captions_done)} captions: saved")
            raise
    print(
        f"trained {int(run.epoch)} epochs; the best is {int(run.best_epoch)}, {float(run.best_loss):.3f} nats per word"
    )
    print(f"checkpoints, history.csv and loss.png are in {config.run_dir}")


# --- The run folder ---------------------------------------------------------------------------------------------


def open_run(prepared, config):
    """Build models and optimiser, and restore the last checkpoint of `run_dir` if there is one.

    Returns:
      tf.train.Checkpoint with encoder, decoder, optimizer, epoch (epochs finished), best_epoch and best_loss. The
      random state is in it as `epoch` and the optimiser's step count: every shuffle is drawn from (seed, epoch) and
      every dropout mask from (seed, step). Of the epoch begun last it has the order (as a checksum), captions_done,
      and the sums of loss (nats), words and seconds so far; saves numbers the checkpoints.

    Raises:
      UserError: the folder holds a run with another vocabulary or other sizes, or no checkpoint in it can be read.
    """
    folder = pathlib.Path(config.run_dir)
    if checkpoints(folder / "last"):
        check_run_fits(folder, config, prepared.vocabulary)
    remove_leftovers(folder)
    write_json(folder / "config.json", dataclasses.asdict(config), indent=1)
    write_json(folder / "vocabulary.json", prepared.vocabulary)

    precision = config.precision
    if precision == "auto":
        precision = "mixed_bfloat16" if has_fast_bfloat16() else "float32"
    encoder, decoder = build_captioner(
        config, len(prepared.vocabulary), prepared.feature_mean, prepared.feature_std, precision
    )
    optimizer = keras.optimizers.Adam(config.learning_rate, global_clipnorm=config.clip_norm)
    optimizer.build(encoder.trainable_variables + decoder.trainable_variables)
    run = tf.train.Checkpoint(
        encoder=encoder,
        decoder=decoder,
        optimizer=optimizer,
        epoch=tf.Variable(0, dtype=tf.int64),
        best_epoch=tf.Variable(0, dtype=tf.int64),
        best_loss=tf.Variable(np.inf, dtype=tf.float64),
        order=tf.Variable(0, dtype=tf.int64),
        captions_done=tf.Variable(0, dtype=tf.int64),
        nats=tf.Variable(0, dtype=tf.float64),
        words=tf.Variable(0, dtype=tf.float64),
        seconds=tf.Variable(0, dtype=tf.float64),
        saves=tf.Variable(0, dtype=tf.int64),
    )
    if restore_newest(run, folder / "last"):
        optimizer.learning_rate.assign(config.learning_rate)
        print(f"continuing {folder} after epoch {int(run.epoch)}")
    return run


def check_run_fits(folder, config, vocabulary):
    """Raise UserError where the run in `folder` has another vocabulary or other sizes than are asked for."""
    mend = "give another --run_dir, or delete that folder, and run python train_image_caption_model.py again"
    saved = read_json(folder / "config.json", mend, dict)
    for name in MODEL_SETTINGS:
        if saved.get(name) != getattr(config, name):
            raise UserError(
                f"{folder} was trained with --{name} {saved.get(name)}, not {getattr(config, name)}: {mend}"
            )
    known = read_json(folder / "vocabulary.json", mend, list)
    if known != vocabulary:
        raise UserError(
            f"{folder} was trained with another vocabulary ({len(known)} words) "
            f"than {config.data_dir}'s ({len(vocabulary)} words): {mend}"
        )


def read_history(run, config):
    """The rows of history.csv up to the restored epoch: a later row's epoch was not saved and is trained again."""
    path = pathlib.Path(config.run_dir, "history.csv")
    if not path.exists() or not int(run.epoch):
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        rows = [{**row, "epoch": int(row["epoch"])} for row in rows if row["epoch"] <= int(run.epoch)]
        if not rows or not all({"train_loss", "validation_loss"} <= row.keys() for row in rows):
            raise ValueError("epochs or losses are missing")
    except (ValueError, TypeError, KeyError, OverflowError, OSError, csv.Error) as error:
        print(f"{path} cannot be read ({error}): it begins anew after epoch {int(run.epoch)}")
        return []
    return rows


def save_epoch(run, history, config):
    """Write history.csv, loss.png, and the checkpoints: `best` if this epoch is, and `last`, which ends the epoch."""
    folder = pathlib.Path(config.run_dir)
    row = history[-1]
    write_csv(folder / "history.csv", history)
    plot_losses(history, folder / "loss.png")
    run.epoch.assign(row["epoch"])
    if row["validation_loss"] < run.best_loss:
        run.best_loss.assign(row["validation_loss"])
        run.best_epoch.assign(row["epoch"])
        weights = tf.train.Checkpoint(encoder=run.encoder, decoder=run.decoder)
        save_checkpoint(weights, folder / "best", row["epoch"])
    save_last(run, config)


def save_last(run, config):
    run.saves.assign_add(1)
    save_checkpoint(run, pathlib.Path(config.run_dir, "last"), int(run.saves))


def save_checkpoint(objects, folder, number):
    """Write a tf.train.Checkpoint's objects as `folder`/ckpt-`number`, and keep the one before it and no others.

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    path = folder / f"ckpt-{number}"
    try:
        objects.write(path)
    except tf.errors.OpError as error:
        reason = error.message.rpartition("; ")[2].partition(" [Op")[0]
        raise UserError(f"cannot write {path}: {reason} ({free_space(folder)})") from error
    finally:
        kept = [checkpoint.name for checkpoint in checkpoints(folder) if checkpoint_number(checkpoint) <= number][:2]
        for file in folder.glob("ckpt-*"):
            if file.is_dir():  # of a save that was killed or failed
                shutil.rmtree(file)
            elif file.name.partition(".")[0] not in kept:
                file.unlink()


def restore_newest(objects, folder):
    """Restore a tf.train.Checkpoint's objects from the newest checkpoint in `folder` that can be read.

    Returns:
      bool, whether there was one.

    Raises:
      UserError: there are some, and none can be read.
    """
    damaged = []
    for path in checkpoints(folder):
        try:
            objects.read(path).assert_existing_objects_matched().expect_partial()
        except Exception as error:  # TensorFlow raises many kinds for damaged files
            reason = str(error).partition("\n")[0]
            damaged.append(f"{path} cannot be read ({reason})")
            continue
        for problem in damaged:
            print(f"{problem}: {path.name} is taken instead")
        return True
    if damaged:
        raise UserError(f"{damaged[0]}: delete {folder.parent} and run python train_image_caption_model.py again")
    return False


def checkpoints(folder):
    """The paths of the checkpoints in a folder, without endings, the newest first."""
    return sorted((path.with_suffix("") for path in folder.glob("ckpt-*.index")), key=checkpoint_number, reverse=True)


def checkpoint_number(path):
    return int(path.name.removeprefix("ckpt-"))


def plot_losses(history, path):
    """Draw training and validation loss by epoch as a PNG file, without a display."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss (nats per word)")
    epochs = [row["epoch"] for row in history]
    for name, label in (("train_loss", "training"), ("validation_loss", "validation")):
        axes.plot(epochs, [row[name] for row in history], marker=".", label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


# --- Batches ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Captions:
    """The N captions of a split: the path of each one's features, its words' ids, and how many they are."""

    paths: tf.Tensor  # (N,) string
    words: tf.RaggedTensor  # (N, T) int32
    lengths: np.ndarray  # (N,)


def collect_captions(images, config):
    ids = [words for image in images for words in image["ids"]]
    lengths = np.array([len(words) for words in ids])
    return Captions(
        paths=tf.constant([str(feature_path(image, config)) for image in images for _ in image["ids"]]),
        words=tf.RaggedTensor.from_row_lengths(np.concatenate(ids).astype(np.int32), lengths),
        lengths=lengths,
    )


def plan_batches(lengths, batch_size, rng):
    """The order of an epoch: every caption once, those of a batch of similar length, the batches in random order.

    Args:
      lengths: int (N,), words of each caption.
      batch_size: int, B.
      rng: np.random.Generator

    Returns:
      int (N,): positions of captions; each B in a row are a batch. The last, smaller one takes any lengths.
    """
    order = rng.permutation(len(lengths))
    full = len(order) - len(order) % batch_size
    batches = order[:full][np.argsort(lengths[order[:full]], kind="stable")].reshape(-1, batch_size)
    return np.concatenate([rng.permutation(batches).ravel(), order[full:]])


def caption_batches(captions, order, config):
    """A tf.data pipeline of (features (B, P, F), captions (B, T)), each batch padded to its longest caption."""

    def read(position):
        return read_feature(captions.paths[position], config.feature_dtype), captions.words[position]

    dataset = tf.data.Dataset.from_tensor_slices(order).map(read, num_parallel_calls=os.cpu_count())
    tuning = tf.data.Options()
    tuning.autotune.enabled = False  # its thread can hold up the end of an epoch for many seconds
    return dataset.padded_batch(config.batch_size).prefetch(2).with_options(tuning)


def batch_shapes(config):
    """Shapes and types of a batch of any size and length, so that one graph serves them all."""
    features = tf.TensorSpec((None, LOCATIONS, CHANNELS), config.feature_dtype)  # (B, P, F)
    return features, tf.TensorSpec((None, None), tf.int32)  # (B, T)


# --- Steps ------------------------------------------------------------------------------------------------------


def train_epochs(run, history, train, validation, stop_if_asked, config):
    """Train, validate and save until `epochs` are done or validation has not got better for `patience` epochs."""
    for epoch in range(int(run.epoch), config.epochs):
        if epoch - int(run.best_epoch) >= config.patience:
            print(f"no better validation loss for {config.patience} epochs (--patience): stopping")
            break
        row = train_epoch(run, train, epoch, config, stop_if_asked)
        row["validation_loss"] = validate(run, validation, config, stop_if_asked)
        history.append(row)
        save_epoch(run, history, config)


def train_epoch(run, captions, epoch, config, stop_if_asked=lambda: None):
    """Train one pass over the captions, or what is left of it where the epoch was stopped.

    Args:
      stop_if_asked: function called before each batch, as interrupts_held_back gives.

    Returns:
      dict: epoch (counted from 1), train_loss (nats per word, dropout on), captions_per_second.

    Raises:
      UserError: the loss is not finite.
    """
    order = plan_batches(captions.lengths, config.batch_size, np.random.default_rng((config.seed, epoch)))
    if int(run.order) != zlib.crc32(order.tobytes()):  # the epoch begins, or its batches are no longer the same
        run.order.assign(zlib.crc32(order.tobytes()))
        for counter in (run.captions_done, run.nats, run.words, run.seconds):
            counter.assign(0)
    done = int(run.captions_done)
    step = train_step.get_concrete_function(run, *batch_shapes(config), config)  # traced at the first call only
    losses, tokens, start = [], [], time.perf_counter()
    with tqdm(total=len(order), initial=done, desc=f"epoch {epoch + 1}/{config.epochs}", unit=" captions") as bar:
        for features, words in caption_batches(captions, order[done:], config):
            stop_if_asked()
            losses.append(float(step(features, words)))
            if not np.isfinite(losses[-1]):
                batch = -(-(int(run.captions_done) + len(words)) // config.batch_size)
                raise UserError(
                    f"the loss is {losses[-1]} at batch {batch} of epoch {epoch + 1}: lower --learning_rate or "
                    "--clip_norm and run the same command, which continues from the last good checkpoint"
                )
            tokens.append(int(tf.math.count_nonzero(words[:, 1:])))
            run.captions_done.assign_add(len(words))
            run.nats.assign_add(losses[-1] * tokens[-1])
            run.words.assign_add(tokens[-1])
            run.seconds.assign_add(time.perf_counter() - start)
            start = time.perf_counter()
            bar.set_postfix(loss=f"{np.average(losses[-50:], weights=tokens[-50:]):.3f}", refresh=False)
            bar.update(len(words))
    return {
        "epoch": epoch + 1,
        "train_loss": float(run.nats / run.words),
        "captions_per_second": round(len(order) / float(run.seconds), 1),
    }


@tf.function
def train_step(run, features, captions, config):
    """One optimiser step. features (B, P, F), captions (B, T) -> loss (), nats per word."""
    dropout_seed = tf.stack((tf.constant(config.seed, tf.int64), tf.cast(run.optimizer.iterations, tf.int64)))  # (2,)
    weights = run.encoder.trainable_variables + run.decoder.trainable_variables
    with tf.GradientTape() as tape:
        logits, attention_weights = run.decoder.teach(captions, run.encoder(features), dropout_seed)
        loss = caption_loss(captions, logits)
        total = loss + config.doubly_stochastic * attention_loss(captions, attention_weights)
    run.optimizer.apply_gradients(zip(tape.gradient(total, weights), weights, strict=True))
    return loss


def validate(run, captions, config, stop_if_asked=lambda: None):
    """The loss over all captions, dropout off, in nats per word."""
    order = np.argsort(captions.lengths, kind="stable")
    step = validation_step.get_concrete_function(run, *batch_shapes(config))
    losses, tokens = [], []
    for features, words in caption_batches(captions, order, config):
        stop_if_asked()
        losses.append(float(step(features, words)))
        tokens.append(int(tf.math.count_nonzero(words[:, 1:])))
    return float(np.average(losses, weights=tokens))


@tf.function
def validation_step(run, features, captions):
    logits, _ = run.decoder.teach(captions, run.encoder(features))
    return caption_loss(captions, logits)


if __name__ == "__main__":
    run_script(main)
