"""Script 2: train the captioner on what data_utils.py prepared; the same command continues a run that stopped.

python train_image_caption_model.py [--dataset coco|demo|karpathy] [--data_dir DIR] [--<setting> VALUE ...]
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import contextlib
import pathlib
import time
import zlib

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from captioning.batches import batch_shapes, bucket_by_length, caption_batches, collect_captions, count_tokens
from captioning.checkpoints import TrainingState, check_finite, checkpoint_number, list_checkpoints
from captioning.checkpoints import restore_newest, save_checkpoint
from captioning.devices import has_fast_bfloat16, set_up_devices
from captioning.distribution import check_same_everywhere, is_chief, replica_rows, replicas, run_replicas, sum_replicas
from captioning.feature_cache import reading_features
from captioning.figures import plot_losses
from captioning.optimizer import SummedAdam, scheduled_rate
from captioning.prepared_data import load_prepared, read_prepared_settings
from captioning.run_folder import begin_run, check_run_fits, other_folder
from captioning.settings import DATA_SETTINGS, adopt_settings, make_config, prepare_command
from captioning.tensorboard_log import tensorboard_log
from captioning.training_samples import Samples, choose_samples, show_samples
from captioning.vocabulary import PAD, log_frequency_bias
from captioning.word_detector import detection_loss
from config import Config
from model import attention_loss, build_captioner, caption_loss
from support.command_line import parse_command_line
from support.errors import UserError
from support.files import locked, remove_leftovers, write_csv
from support.process import interrupts_held_back, run_script

LOWER_RATE = (
    "lower --learning_rate or --clip_norm and run the same command, "
    "which continues from the last checkpoint, if there is one"
)


def main(argv):
    given, _ = parse_command_line(argv, __doc__, Config)
    data_dir = make_config(given).data_dir
    config = adopt_settings(given, read_prepared_settings(data_dir), DATA_SETTINGS, data_dir)
    set_up_devices()
    with replicas(config):
        train_captioner(config)


def train_captioner(config):
    """Train as the settings say, or continue to; all processes of a run that has several call this."""
    prepared = load_prepared(config)
    train = collect_captions(prepared.train, config)
    validation = collect_captions(prepared.validation, config)
    with locked(config.run_dir) if is_chief() else contextlib.nullcontext():
        state = open_run(prepared, config)
        progress = state.progress
        try:
            with (
                interrupts_held_back() as stop_if_asked,
                reading_features(prepare_command(config)),
                tensorboard_log(config) as writer,
            ):
                samples = Samples(choose_samples(prepared.validation, config), prepared.vocabulary, writer)
                train_epochs(state, train, validation, samples, stop_if_asked, config)
        except KeyboardInterrupt:
            save_last(state, config)
            print(f"stopped in epoch {progress.epoch + 1}, after {progress.captions_done} captions: saved")
            raise
    print(f"trained {progress.epoch} epochs; the best is {progress.best_epoch}, {progress.best_loss:.3f} nats per word")
    print(f"checkpoints, history.csv, loss.png and samples.html are in {config.run_dir}")


# --- The run folder ---------------------------------------------------------------------------------------------


def open_run(prepared, config):
    """Build models and optimizer, and restore the last checkpoint of `run_dir` if there is one.

    Returns:
      TrainingState

    Raises:
      UserError: the folder holds a run with another vocabulary, network or sizes, no checkpoint in it can be read, or
        it is not the same for all workers.
    """
    folder = pathlib.Path(config.run_dir)
    saved = list_checkpoints(folder / "last")
    check_same_everywhere(
        float(checkpoint_number(saved[0])) if saved else 0.0,
        f"{folder} does not hold the same on every worker: set --run_dir to one folder that all of them share",
    )
    if saved:
        check_run_fits(folder, config, prepared)
    if is_chief():
        remove_leftovers(folder)
        begin_run(prepared, config)
    precision = config.precision
    if precision == "auto":
        precision = "mixed_bfloat16" if has_fast_bfloat16() else "float32"
    state = build_state(prepared, precision, config)
    restored = restore_newest(state, [folder / "last"], other_folder(config))
    if precision == "mixed_float16":  # after restoring: a checkpoint of another precision has no loss scale
        state.loss_scale = keras.optimizers.LossScaleOptimizer(state.optimizer)
        state.loss_scale.build(state.trainable_variables)
    announce_start(state, restored, config)
    write_history(state.progress.history, folder)  # it may have been impossible before
    return state


def build_state(prepared, precision, config):
    """A TrainingState whose weights are drawn from the seed."""
    normalisation = prepared.feature_mean, prepared.feature_std
    encoder, decoder = build_captioner(config, len(prepared.vocabulary), *normalisation, precision)
    # Without this, much of the first epoch is spent on learning which words are frequent.
    train = [caption for image in prepared.train for caption in image.encoded_captions]
    decoder.output_layer.bias.assign(log_frequency_bias(train, len(prepared.vocabulary)))
    optimizer = SummedAdam(config.learning_rate, global_clipnorm=config.clip_norm)
    state = TrainingState(encoder, decoder, optimizer)
    optimizer.build(state.trainable_variables)
    return state


def announce_start(state, restored, config):
    """Say where the training goes on, and at which learning rate."""
    folder, progress = config.run_dir, state.progress
    rate = f"learning rate {scheduled_rate(config, progress.epoch):.2g}, {config.schedule} over {config.epochs} epochs"
    if restored:
        print(f"continuing {folder} after epoch {progress.epoch}; {rate}")
    elif pathlib.Path(folder, "history.csv").exists():
        print(f"no checkpoint is in {folder}/last: training begins anew; {rate}")
    else:
        print(f"training begins; {rate}")


def save_epoch(state, row, config):
    """Write the checkpoints, `best` if this epoch is, and then history.csv and loss.png."""
    folder, progress = pathlib.Path(config.run_dir), state.progress
    check_finite(state, LOWER_RATE)
    progress.epoch = row["epoch"]
    progress.history.append(row)
    if row["validation_loss"] < progress.best_loss:
        progress.best_loss, progress.best_epoch = row["validation_loss"], row["epoch"]
        save_checkpoint(state.captioner(), folder / "best", row["epoch"])
    save_last(state, config)
    write_history(progress.history, folder)


def write_history(history, folder):
    """Write history.csv and loss.png, from a list of a dict for each epoch. Only the checkpoints must not fail."""
    if not history or not is_chief():
        return
    with warning_only():
        write_csv(folder / "history.csv", history)
    with warning_only():
        plot_losses(history, folder / "loss.png")


@contextlib.contextmanager
def warning_only():
    """Print a UserError of the block as a warning: another program may hold a file open, and training goes on."""
    try:
        yield
    except UserError as error:
        print(f"warning: {error}")


def save_last(state, config):
    """Write the checkpoint that the same command continues from."""
    check_finite(state, LOWER_RATE)
    state.progress.saves += 1
    save_checkpoint(state, pathlib.Path(config.run_dir, "last"), state.progress.saves)


# --- Training ---------------------------------------------------------------------------------------------------


def train_epochs(state, train, validation, samples, stop_if_asked, config):
    """Train, validate and save until `epochs` are done or validation has not got better for `patience` epochs.

    Args:
      state: TrainingState
      train, validation: CaptionSets.
      samples: Samples, captioned after each epoch.
      stop_if_asked: function called before each batch, as interrupts_held_back gives.
    """
    for epoch in range(state.progress.epoch, config.epochs):
        if epoch - state.progress.best_epoch >= config.patience:
            print(f"no better validation loss for {config.patience} epochs (--patience): stopping")
            break
        row = train_epoch(state, train, epoch, config, stop_if_asked)
        row["validation_loss"] = validate(state, validation, config, stop_if_asked)
        save_epoch(state, row, config)
        if is_chief():
            with warning_only():
                show_samples(samples, state, row, config)


def train_epoch(state, captions, epoch, config, stop_if_asked=lambda: None):
    """Train one pass over the captions, or what is left of it where the epoch was stopped.

    Args:
      captions: CaptionSet
      epoch: int, epochs finished before.
      stop_if_asked: function called before each batch, as interrupts_held_back gives.

    Returns:
      dict: epoch (counted from 1), train_loss (nats per word, dropout on), captions_per_second.

    Raises:
      UserError: the loss is not finite.
    """
    progress = state.progress
    order = bucket_by_length(captions.lengths, config.batch_size, np.random.default_rng((config.seed, epoch)))
    begin_epoch(progress, zlib.crc32(order.tobytes(), epoch))
    total, remaining = len(order), order[progress.captions_done :]
    tokens = count_tokens(captions, remaining, config)
    # Traced at the first call only. It is called with all arguments: without those that are no tensors TensorFlow first
    # makes up an error message, with the whole batch in it, at each call.
    step = train_step.get_concrete_function(state, *batch_shapes(config), config)
    losses, start, saved = [], time.perf_counter(), time.perf_counter()
    title = f"epoch {epoch + 1}/{config.epochs}"
    batches = caption_batches(captions, remaining, config) if len(remaining) else ()
    bar = tqdm(total=total, initial=progress.captions_done, desc=title, unit=" captions", disable=not is_chief())
    with bar:
        for count, (features, words) in zip(tokens, batches, strict=True):
            stop_if_asked()
            if time.perf_counter() - saved > 60 * config.checkpoint_minutes:
                save_last(state, config)
                saved = time.perf_counter()
            state.optimizer.learning_rate = scheduled_rate(config, epoch + progress.captions_done / total)
            losses.append(float(step(state, features, words, config)))
            check_loss(losses[-1], progress, config)
            size = min(config.batch_size, total - progress.captions_done)
            progress.captions_done += size
            progress.nats += losses[-1] * float(count)
            progress.words += float(count)
            progress.seconds += time.perf_counter() - start
            start = time.perf_counter()
            recent = np.average(losses[-50:], weights=tokens[: len(losses)][-50:])
            bar.set_postfix(loss=f"{recent:.3f}", refresh=False)
            bar.update(size)
    return {
        "epoch": epoch + 1,
        "train_loss": progress.nats / progress.words,
        "captions_per_second": round(total / progress.seconds, 1),
    }


def begin_epoch(progress, order):
    """Start the counters of an epoch anew, unless it is the one that was stopped, with the same batches."""
    if progress.order != order:
        progress.order, progress.captions_done = order, 0
        progress.nats = progress.words = progress.seconds = 0.0


def check_loss(loss, progress, config):
    if not np.isfinite(loss):
        batch = progress.captions_done // config.batch_size + 1
        raise UserError(f"the loss is {loss} at batch {batch} of epoch {progress.epoch + 1}: {LOWER_RATE}")


@tf.function
def train_step(state, features, captions, config):
    """One optimizer step. features (B, P, F), captions (B, T) -> loss (), nats per word."""
    return run_replicas(train_replica, state, features, captions, config)


def train_replica(state, features, captions, config):
    """A replica's part of train_step: what is summed over the replicas is what one replica would compute."""
    features, captions = replica_rows(features), replica_rows(captions)
    word_share, caption_share = shares_of_batch(captions)
    dropout_seed = tf.stack((tf.constant(config.seed, tf.int64), tf.cast(state.optimizer.iterations, tf.int64)))  # (2,)
    weights, optimizer = state.trainable_variables, state.scaled_optimizer
    with tf.GradientTape() as tape:
        encoded_features = state.encoder(features)  # (B, P, D)
        logits, attention_weights = state.decoder.teacher_forcing(captions, encoded_features, dropout_seed)
        loss = caption_loss(captions, logits) * word_share
        attention_term = attention_loss(captions, attention_weights) * caption_share
        detection = detection_loss(state.decoder.detector, captions, encoded_features, state.optimizer.iterations)
        total = optimizer.scale_loss(loss + config.doubly_stochastic * attention_term + detection)
    loss, *gradients = sum_replicas([loss, *tape.gradient(total, weights)])
    optimizer.apply_gradients(zip(gradients, weights, strict=True))
    return loss


def shares_of_batch(captions):
    """This replica's share of the words and of the captions of the whole batch. int (B, T) -> float (), float ()."""
    words = tf.cast(captions[:, 1:] != PAD, tf.float32)  # (B, T-1)
    counts = tf.stack((tf.reduce_sum(words), tf.reduce_sum(tf.reduce_max(words, axis=1))))  # (2,)
    return tf.unstack(counts / sum_replicas(counts))


# --- Validation -------------------------------------------------------------------------------------------------


def validate(state, captions, config, stop_if_asked=lambda: None):
    """The loss over all captions, dropout off, in nats per word.

    Raises:
      UserError: it is not finite.
    """
    order = np.argsort(captions.lengths, kind="stable")
    step = validation_step.get_concrete_function(state, *batch_shapes(config))
    losses = []
    for features, words in caption_batches(captions, order, config):
        stop_if_asked()
        losses.append(float(step(state, features, words)))
    loss = float(np.average(losses, weights=count_tokens(captions, order, config)))
    if not np.isfinite(loss):
        raise UserError(f"the validation loss is {loss}: {LOWER_RATE}")
    return loss


@tf.function
def validation_step(state, features, captions):
    return run_replicas(validate_replica, state, features, captions)


def validate_replica(state, features, captions):
    features, captions = replica_rows(features), replica_rows(captions)
    word_share, _ = shares_of_batch(captions)
    logits, _ = state.decoder.teacher_forcing(captions, state.encoder(features))
    return sum_replicas(caption_loss(captions, logits) * word_share)


if __name__ == "__main__":
    run_script(main)
