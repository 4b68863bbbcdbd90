"""Script 2: train the captioner on what data_utils.py prepared; the same command continues a run that stopped.

python train_image_caption_model.py [--dataset coco|demo|karpathy|table] [--data_dir DIR] [--<setting> VALUE ...]
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import contextlib
import dataclasses
import pathlib

import keras
import numpy as np
import tensorflow as tf

from captioning.training.batches import batch_shapes
from captioning.training.batches import bucket_by_length
from captioning.training.batches import caption_batches
from captioning.training.batches import collect_captions
from captioning.training.batches import count_tokens
from captioning.training.batches import picture_batches
from captioning.features.cache import dataset_pictures
from captioning.training.state import TrainingState
from captioning.training.checkpoints import list_checkpoints
from captioning.training.checkpoints import restore_newest
from support.devices import has_fast_bfloat16
from support.devices import set_up_devices
from support.distribution import check_same_everywhere
from support.distribution import check_same_training
from support.distribution import is_chief
from support.distribution import replica_rows
from support.distribution import replicas
from support.distribution import run_replicas
from support.distribution import sum_processes
from support.distribution import sum_replicas
from support.distribution import value_of_chief
from captioning.training.epochs import begin_epoch
from captioning.training.epochs import check_loss
from captioning.training.epochs import each_batch
from captioning.features.feature_files import reading_features
from captioning.training.optimizer import SummedAdam
from captioning.data.prepared_data import load_prepared
from captioning.data.prepared_data import read_prepared_settings
from captioning.training.run_folder import begin_run
from captioning.training.run_folder import check_new_run
from captioning.training.run_folder import check_run_fits
from captioning.training.run_folder import other_folder
from captioning.training.self_critical import COLLAPSE
from captioning.training.self_critical import add_references
from captioning.training.self_critical import collect_pictures
from captioning.training.self_critical import compare_samples
from captioning.training.self_critical import policy_gradient_loss
from captioning.training.sampling import sample_captions
from captioning.training.self_critical import score_samples
from captioning.training.self_critical import validation_cider
from captioning.settings import DATA_SETTINGS
from captioning.settings import adopt_settings
from captioning.settings import make_config
from captioning.settings import prepare_command
from captioning.training.tensorboard import tensorboard_log
from captioning.training.state import LOWER_RATE
from captioning.training.state import SELF_CRITICAL
from captioning.training.state import EpochRow
from captioning.training.state import announce_end
from captioning.training.state import announce_start
from captioning.training.state import last_epoch
from captioning.training.saving import restore_best
from captioning.training.saving import return_to_best
from captioning.training.saving import save_epoch
from captioning.training.saving import save_last
from captioning.training.saving import warning_only
from captioning.training.saving import write_history
from captioning.training.samples import Samples
from captioning.training.samples import choose_samples
from captioning.training.samples import show_samples
from captioning.vocabulary import PAD
from captioning.vocabulary import UNK
from captioning.vocabulary import log_frequency_bias
from captioning.decoder.word_detector import detection_loss
from config import Config
from model import attention_loss, build_captioner, caption_loss
from support.command_line import parse_command_line
from support.errors import UserError
from support.files import locked, remove_leftovers
from support.process import interrupts_held_back, run_script


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
    check_same_training(prepared, config)
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
                if config.self_critical_epochs:
                    self_critical_epochs(state, prepared, validation, samples, stop_if_asked, config)
        except KeyboardInterrupt:
            save_last(state, config)
            print(f"stopped in epoch {progress.epoch + 1}, after {progress.captions_done} captions: saved")
            raise
    announce_end(progress, config)


# --- The run folder ---------------------------------------------------------------------------------------------


def open_run(prepared, config):
    """Build models and optimizer, and restore the last checkpoint of `run_dir` if there is one.

    Returns:
      TrainingState

    Raises:
      UserError: the folder holds a run with another vocabulary, network or sizes, or one that cannot be continued, no
        checkpoint in it can be read, or it is not the same for all workers.
    """
    folder = pathlib.Path(config.run_dir)
    saved = [f"{kind}/{path.name}" for kind in ("best", "last") for path in list_checkpoints(folder / kind)]
    holds = ", ".join(saved) or "no checkpoint"
    check_same_everywhere({"what --run_dir holds": holds}, "set --run_dir to one folder that all of them share")
    if any(name.startswith("last") for name in saved):
        check_run_fits(folder, config, prepared)
    else:
        check_new_run(folder, config)
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
    # The detector's weights are the last: captions must be the same with it and without.
    apart = len(decoder.detector.trainable_variables)
    optimizer = SummedAdam(config.learning_rate, apart=apart, global_clipnorm=config.clip_norm)
    state = TrainingState(encoder, decoder, optimizer)
    optimizer.build(state.trainable_variables)
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
        return
    for epoch in range(progress.epoch, last_epoch(progress, config)):
        if epoch - progress.best_epoch >= config.patience:
            print(f"no better validation loss for {config.patience} epochs (--patience): stopping")
            break
        row = train_epoch(state, train, epoch, config, stop_if_asked)
        row = dataclasses.replace(row, validation_loss=validate(state, validation, config, stop_if_asked))
        save_and_show(state, row, samples, config)


def self_critical_epochs(state, prepared, validation, samples, stop_if_asked, config):
    """Raise the CIDEr of sampled captions for `self_critical_epochs`, behind the epochs of cross-entropy.

    Args:
      prepared: Prepared, whose training pictures are sampled.
      state, validation, samples, stop_if_asked: as in `train_epochs`.
    """
    progress = state.progress
    pictures = collect_pictures(prepared.train, prepared.vocabulary, config)
    shown = dataset_pictures(prepared.validation, config)
    measure = lambda: validation_cider(state, shown, prepared.vocabulary, config, stop_if_asked)  # noqa: E731
    if progress.cross_entropy_epochs < 0:
        begin_self_critical(state, measure, config)
    for epoch in range(progress.epoch, last_epoch(progress, config)):
        row = self_critical_epoch(state, pictures, epoch, config, stop_if_asked)
        loss, cider = validate(state, validation, config, stop_if_asked), value_of_chief(measure)
        print(f"validation CIDEr {cider:.3f}, of the sampled captions {row.sampled_cider:.3f}")
        if cider < COLLAPSE * progress.best_cider:
            return_to_best(state, cider, config)
        save_and_show(state, dataclasses.replace(row, validation_loss=loss, validation_cider=cider), samples, config)


def begin_self_critical(state, measure, config):
    """End the epochs of cross-entropy: go on from the best of them, whose CIDEr is then to be beaten."""
    progress = state.progress
    restored = restore_best(state, config)
    progress.best_cider = value_of_chief(measure)
    progress.cross_entropy_epochs = progress.epoch
    print(
        f"self-critical epochs begin with the weights of best/{restored.name}, "
        f"at a validation CIDEr of {progress.best_cider:.3f}"
    )


def save_and_show(state, row, samples, config):
    save_epoch(state, row, config)
    if is_chief():
        with warning_only():
            show_samples(samples, state, state.progress.history[-1], config)


def train_epoch(state, captions, epoch, config, stop_if_asked=lambda: None):
    """Train one pass over the captions, or what is left of it where the epoch was stopped.

    Args:
      captions: CaptionSet
      epoch: int, epochs finished before.
      stop_if_asked: function called before each batch, as interrupts_held_back gives.

    Returns:
      EpochRow, not yet validated

    Raises:
      UserError: the loss is not finite.
    """
    progress = state.progress
    order = bucket_by_length(captions.lengths, config.batch_size, np.random.default_rng((config.seed, epoch)))
    begin_epoch(progress, epoch, order)
    remaining = order[progress.captions_done :]
    tokens = count_tokens(captions, remaining, config)
    # Traced at the first call only. It is called with all arguments: without those that are no tensors TensorFlow first
    # makes up an error message, with the whole batch in it, at each call.
    step = train_step.get_concrete_function(state, *batch_shapes(config), config, None)
    batches = caption_batches(captions, remaining, config) if len(remaining) else ()
    counted = zip(tokens, batches, strict=True)
    for count, (features, words) in each_batch(
        state, epoch, counted, config.batch_size, len(order), stop_if_asked, config
    ):
        loss = float(step(state, features, words, config, None))
        check_loss(loss, progress, config.batch_size)
        progress.nats += loss * float(count)
        progress.words += float(count)
    rate = round(len(order) / progress.seconds, 1)
    return EpochRow(epoch + 1, train_loss=progress.nats / progress.words, captions_per_second=rate)


def self_critical_epoch(state, pictures, epoch, config, stop_if_asked=lambda: None):
    """One pass over the pictures, or what is left of it: say captions by chance, compare them, and learn from that.

    Args, Returns, Raises: as in `train_epoch`, but with a PictureSet.
    """
    progress, samples = state.progress, config.samples_per_picture
    order = np.random.default_rng((config.seed, epoch)).permutation(len(pictures.feature_paths))
    begin_epoch(progress, epoch, order, samples)
    remaining, total = order[progress.captions_done // samples :], len(order) * samples
    step = train_step.get_concrete_function(state, *batch_shapes(config), config, tf.TensorSpec((None,)))
    batches = picture_batches(pictures.feature_paths, remaining, config) if len(remaining) else ()
    size = config.pictures_per_step * samples
    for features, positions in each_batch(state, epoch, batches, size, total, stop_if_asked, config):
        positions = positions.numpy()  # (R b,)
        captions = sample_captions(state, features, positions, config)  # (R b S, T)
        ciders = score_samples(pictures, positions, captions, samples, with_end=False)  # (R S, b)
        scores = score_samples(pictures, positions, captions, samples)  # (R S, b)
        advantages = compare_samples(scores, samples)  # (R b S,)
        captions, advantages = add_references(pictures, positions, captions, advantages, epoch, config)
        check_loss(float(step(state, features, tf.constant(captions), config, tf.constant(advantages))), progress, size)
        progress.ciders += sum_processes(ciders.sum())
    rate = round(total / progress.seconds, 1)
    return EpochRow(epoch + 1, SELF_CRITICAL, sampled_cider=progress.ciders / total, captions_per_second=rate)


@tf.function
def train_step(state, features, captions, config, advantages=None):
    """One optimizer step.

    Args:
      features: float (B, P, F)
      captions: int (B, T); with advantages (B (S + 1), T), as `add_references` returns them.
      advantages: float (B (S + 1),), how much likelier each caption should become, or None for cross-entropy.

    Returns: the loss, float (), without the attention term
    """
    return run_replicas(train_replica, state, features, captions, config, advantages)


def train_replica(state, features, captions, config, advantages):
    """A replica's part of train_step: what is summed over the replicas is what one replica would compute."""
    features, captions = replica_rows(features), replica_rows(captions)
    word_share, caption_share = shares_of_batch(captions, PAD if advantages is None else UNK)
    dropout_seed = tf.stack((tf.constant(config.seed, tf.int64), tf.cast(state.optimizer.iterations, tf.int64)))  # (2,)
    weights, optimizer = state.trainable_variables, state.scaled_optimizer
    with tf.GradientTape() as tape:
        encoded_features = state.encoder(features)  # (B, P, D)
        if advantages is not None:
            copies = tf.shape(captions)[0] // tf.shape(features)[0]
            encoded_features = tf.tile(encoded_features, (copies, 1, 1))  # (B (S + 1), P, D)
        logits, attention_weights = state.decoder.teacher_forcing(captions, encoded_features, dropout_seed)
        terms = config.doubly_stochastic * attention_loss(captions, attention_weights) * caption_share
        if advantages is None:
            loss = caption_loss(captions, logits) * word_share
            terms += detection_loss(state.decoder.detector, captions, encoded_features, state.optimizer.iterations)
        else:  # what the model says itself is no proof of what a picture shows: the detector learns nothing from it
            loss = policy_gradient_loss(captions, logits, replica_rows(advantages)) * word_share
        total = optimizer.scale_loss(loss + terms)
    gradients = zip(tape.gradient(total, weights), weights, strict=True)
    gradients = [tf.zeros(weight.shape) if gradient is None else gradient for gradient, weight in gradients]
    loss, *gradients = sum_replicas([loss, *gradients])
    optimizer.apply_gradients(zip(gradients, weights, strict=True))
    return loss


def shares_of_batch(captions, left_out=PAD):
    """This replica's share of the words and of the captions of the whole batch.

    Args:
      captions: int (B, T)
      left_out: int, a word that the loss leaves out, besides <pad>.

    Returns:
      words, captions: float () each
    """
    is_word = captions[:, 1:] != PAD  # (B, T-1)
    learned, real = is_word & (captions[:, 1:] != left_out), tf.reduce_any(is_word, axis=1)  # (B, T-1), (B,)
    counts = tf.stack([tf.reduce_sum(tf.cast(x, tf.float32)) for x in (learned, real)])  # (2,)
    return tf.unstack(tf.math.divide_no_nan(counts, sum_replicas(counts)))


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
