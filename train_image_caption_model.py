"""Script 2: train the captioner on what data_utils.py prepared; the same command continues a run that stopped.

python train_image_caption_model.py [--dataset coco|demo|karpathy|table] [--data_dir DIR] [--<setting> VALUE ...]
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import contextlib
import dataclasses
import pathlib
import time

import keras
import numpy as np
import tensorflow as tf

from captioning import settings
from captioning.data import prepared_data
from captioning.decoder.basic_layers import in_training
from captioning.decoder.word_detector import detection_loss
from captioning.features.cache import features_folder, load_data
from captioning.features.cnn import CNNS
from captioning.features.feature_files import reading_features
from captioning.training import batches, checkpoints, epochs, optimizer, run_folder, saving
from captioning.training import self_critical, start_from, workers
from captioning.training.model_check import check_model
from captioning.training.samples import Samples, choose_samples, save_and_show
from captioning.training.state import LOWER_RATE, EpochRow, TrainingState, announce_end, announce_start
from captioning.training.tensorboard import tensorboard_log
from captioning.vocabulary import log_frequency_bias
from config import Config
from model import attention_loss, build_captioner, caption_loss
from support import devices, distribution
from support.command_line import parse_command_line
from support.errors import UserError
from support.files import locked, remove_leftovers
from support.forecast import Forecast
from support.process import interrupts_held_back, run_script


def main(argv):
    given, _ = parse_command_line(argv, __doc__, Config)
    config = settings.make_config(given)
    with settings.naming_commands(config):
        saved = prepared_data.read_prepared_settings(config.data_dir)
        # The data bring the settings that they were made with. With another CNN, say, their features would not fit.
        config = settings.adopt_settings(given, saved, settings.DATA_SETTINGS, config.data_dir)
        config = start_from.adopt_start(given, config)
    # Before anything is computed: afterwards TensorFlow takes no settings of devices any more.
    devices.set_up_devices()
    with settings.naming_commands(config), distribution.replicas(config.strategy):
        train_captioner(config)


def train_captioner(config):
    """Train as the settings say, or continue to; all processes of a run that has several call this."""
    prepared = load_data(config)
    start = start_from.read_start(prepared, config)
    prepared = start_from.choose_words(prepared, start, config)
    # Workers with other data would train as one without a word, and learn from a mixture.
    workers.check_same_training(prepared, config, start)
    features_dir = features_folder(config)
    train = batches.collect_captions(prepared.train, features_dir)
    validation = batches.collect_captions(prepared.validation, features_dir)
    # Two trainings in one folder would delete each other's checkpoints.
    with locked(config.run_dir) if distribution.is_chief() else contextlib.nullcontext():
        state = open_run(prepared, config, start)
        progress = state.progress
        measure_loss = lambda: validate(state, validation, config, stop_if_asked)  # noqa: E731
        try:
            # Ctrl-C waits until a batch is done: weights, optimizer and counters must be of the same step when saved.
            with interrupts_held_back() as stop_if_asked, reading_features(), tensorboard_log(config) as writer:
                samples = Samples(choose_samples(prepared.validation, config), prepared.vocabulary, writer)
                start_from.measure_start(state, measure_loss, config)
                train_epochs(state, train, validation, samples, stop_if_asked, config)
                if config.self_critical_epochs:
                    self_critical.train_epochs(state, prepared, measure_loss, samples, stop_if_asked, config)
        except KeyboardInterrupt:
            saving.save_last(state, config.run_dir)
            print(f"stopped in epoch {progress.epoch + 1}, after {progress.captions_done} captions: saved")
            raise
    announce_end(progress, config.run_dir)


# --- The run folder ---------------------------------------------------------------------------------------------


def open_run(prepared, config, start=None):
    """Build models and optimizer, and restore the last checkpoint of `run_dir` if there is one.

    Args:
      start: Captioner whose weights a new run begins with, or None.

    Returns:
      TrainingState

    Raises:
      UserError: the folder holds a run with another vocabulary, network or sizes, or one that cannot be continued, no
        checkpoint in it can be read, or it is not the same for all workers.
    """
    folder = pathlib.Path(config.run_dir)
    saved = [f"{kind}/{path.name}" for kind in ("best", "last") for path in checkpoints.list_checkpoints(folder / kind)]
    holds = ", ".join(saved) or "no checkpoint"
    distribution.check_same_everywhere(
        {"what --run_dir holds": holds}, "set --run_dir to one folder that all of them share"
    )
    # All checks come before the first file is written, so that a run that is refused stays as it was.
    if any(name.startswith("last") for name in saved):
        run_folder.check_run_fits(folder, config, prepared)
    else:
        run_folder.check_new_run(folder, config.data_dir)
    precision = config.precision
    if precision == "auto":
        precision = "mixed_bfloat16" if devices.has_fast_bfloat16() else "float32"
    state = build_state(prepared, precision, config)
    # `last` and not `best`: only there are the optimizer, and how far the training had come.
    restored = checkpoints.restore_newest(state, [folder / "last"])
    if distribution.is_chief():
        remove_leftovers(folder)
        run_folder.begin_run(prepared, config)
    if start and not restored:
        start_from.take_weights(state, start, prepared.vocabulary, config)
    if precision == "mixed_float16":  # after restoring: a checkpoint of another precision has no loss scale
        state.loss_scale = keras.optimizers.LossScaleOptimizer(state.optimizer)
        state.loss_scale.build(state.trainable_variables)
    announce_start(state, restored, config)
    saving.write_history(state.progress.history, folder)  # it may have been impossible before
    return state


def build_state(prepared, precision, config):
    """A TrainingState whose weights are drawn from the seed."""
    normalisation = prepared.feature_mean, prepared.feature_std
    encoder, decoder = build_captioner(config, len(prepared.vocabulary), *normalisation, precision)
    if not tf.distribute.has_strategy():  # only inside of a replica is there a gradient of its weights
        check_model(encoder, decoder, CNNS[config.cnn].feature_shape, len(prepared.vocabulary))
    # Without this, much of the first epoch is spent on learning which words are frequent.
    train = [caption for image in prepared.train for caption in image.encoded_captions]
    if (bias := getattr(getattr(decoder, "output_layer", None), "bias", None)) is not None:  # an edit may have none
        bias.assign(log_frequency_bias(train, len(prepared.vocabulary)))
    # The detector's weights are the last: captions must be the same with it and without.
    apart = len(decoder.detector.trainable_variables)
    adam = optimizer.SummedAdam(config.learning_rate, apart=apart, global_clipnorm=config.clip_norm)
    state = TrainingState(encoder, decoder, adam)
    adam.build(state.trainable_variables)  # now, so that a checkpoint finds its moments to restore
    return state


# --- Training ---------------------------------------------------------------------------------------------------


def train_epochs(state, train, validation, samples, stop_if_asked, config):
    """Train, validate and save until `epochs` are done or validation has not got better for `patience` epochs.

    Args:
      state: TrainingState
      train, validation: CaptionSets.
      samples: Samples, captioned after each epoch.
      stop_if_asked: function called before each batch, as interrupts_held_back gives.
    """
    progress = state.progress
    if progress.cross_entropy_epochs >= 0:
        return  # the self-critical epochs have begun
    left = config.epochs - progress.epoch
    forecast = Forecast("training", left * len(train.lengths) - progress.captions_done, "captions")
    for epoch in range(progress.epoch, config.epochs):
        # On few captions the validation loss soon rises again, while the training loss goes on falling.
        if epoch - progress.best_epoch >= config.patience:
            print(f"no better validation loss for {config.patience} epochs (--patience): stopping")
            break
        row = train_epoch(state, train, epoch, config, stop_if_asked, forecast)
        row = dataclasses.replace(row, validation_loss=validate(state, validation, config, stop_if_asked))
        save_and_show(state, row, samples, config)


def train_epoch(state, captions, epoch, config, stop_if_asked=lambda: None, forecast=None):
    """Train one pass over the captions, or what is left of it where the epoch was stopped.

    Args:
      captions: CaptionSet
      epoch: int, epochs finished before.
      stop_if_asked: function called before each batch, as interrupts_held_back gives.
      forecast: Forecast of all epochs, which is told of each batch.

    Returns:
      EpochRow, not yet validated

    Raises:
      UserError: the loss is not finite.
    """
    progress = state.progress
    # From seed and epoch alone: a run that was stopped in mid-epoch goes on in the same order.
    order = batches.bucket_by_length(captions.lengths, config.batch_size, np.random.default_rng((config.seed, epoch)))
    epochs.begin_epoch(progress, epoch, order)
    remaining = order[progress.captions_done :]
    before = saved = time.perf_counter()
    with epochs.epoch_bar(progress, epoch, config.epochs, len(order)) as bar:
        for features, words, num_tokens in batches.counted_batches(captions, remaining, config):
            stop_if_asked()
            # The rate follows the captions, not the steps, so that another batch size keeps the schedule.
            epochs_done = epoch + progress.captions_done / len(order)
            state.optimizer.learning_rate = optimizer.scheduled_rate(config, epochs_done)
            loss = float(train_step(state, features, words, config))
            epochs.check_loss(loss, progress, config.batch_size)

            done = min(config.batch_size, len(order) - progress.captions_done)  # the last batch may be smaller
            now = time.perf_counter()
            progress.add_batch(done, now - before, nats=loss * num_tokens, words=num_tokens)
            before = now
            bar.set_postfix(loss=f"{progress.nats / progress.words:.3f}", refresh=False)
            bar.update(done)
            if forecast and distribution.is_chief():
                forecast.add(done)

            # An epoch of COCO in full takes hours, and a machine may go down in one.
            if now - saved > 60 * config.checkpoint_minutes:
                saving.save_last(state, config.run_dir)
                saved = now
    rate = round(len(order) / progress.seconds, 1)
    return EpochRow(epoch + 1, train_loss=progress.nats / progress.words, captions_per_second=rate)


@tf.function(reduce_retracing=True)  # one graph for captions of all lengths
def train_step(state, features, captions, config):
    """One optimizer step on a batch. Returns the loss, float (), without the attention term.

    Args:
      features: float (B, P, F)
      captions: int (B, T)
    """
    return distribution.run_replicas(train_replica, state, features, captions, config)


def train_replica(state, features, captions, config):
    """A replica's part of train_step: what is summed over the replicas is what one replica would compute."""
    features, captions = distribution.replica_rows(features), distribution.replica_rows(captions)
    # A mean over this replica's words counts by its share of all words: replicas have longer and shorter captions.
    word_share, caption_share = batches.shares_of_batch(captions)
    with tf.GradientTape() as tape:
        seed = state.dropout_seed(config.seed)
        # Layers of Keras that users put into model.py, such as Dropout, have to know that this is training.
        encoded_features = state.encoder(features, dropout_seed=seed, training=True)  # (B, P, D)
        logits, attention_weights = in_training(state.decoder.teacher_forcing, captions, encoded_features, seed)
        loss = caption_loss(captions, logits) * word_share
        terms = config.doubly_stochastic * attention_loss(captions, attention_weights) * caption_share
        # The detector learns beside the captioner: its gradient reaches its own weights only.
        terms += detection_loss(state.decoder.detector, captions, encoded_features, state.optimizer.iterations)
        # float16 rounds small gradients to 0. Scaled up they survive, and the optimizer scales them back.
        total = state.scaled_optimizer.scale_loss(loss + terms)
    # The loss that is shown has no terms, so that it can be compared with the validation loss.
    return optimizer.apply_gradients(state, tape.gradient(total, state.trainable_variables), loss)


# --- Validation -------------------------------------------------------------------------------------------------


def validate(state, captions, config, stop_if_asked=lambda: None):
    """The loss over all captions, dropout off, in nats per word.

    Raises:
      UserError: it is not finite.
    """
    # Captions of one length together: the order changes no loss, and little is computed for <pad>.
    order = np.argsort(captions.lengths, kind="stable")
    nats = num_tokens = 0.0
    for features, words, count in batches.counted_batches(captions, order, config):
        stop_if_asked()
        # Batches have unlike numbers of words, so the mean of their means would not be that of the words.
        nats += float(validation_step(state, features, words)) * count
        num_tokens += count
    loss = nats / num_tokens
    if not np.isfinite(loss):
        raise UserError(f"the validation loss is {loss}: {LOWER_RATE}")
    return loss


@tf.function(reduce_retracing=True)
def validation_step(state, features, captions):
    return distribution.run_replicas(validate_replica, state, features, captions)


def validate_replica(state, features, captions):
    features, captions = distribution.replica_rows(features), distribution.replica_rows(captions)
    word_share, _ = batches.shares_of_batch(captions)
    logits, _ = state.decoder.teacher_forcing(captions, state.encoder(features))
    return distribution.sum_replicas(caption_loss(captions, logits) * word_share)


if __name__ == "__main__":
    run_script(main)
