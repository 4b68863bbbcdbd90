"""Self-critical training (Rennie et al., 2017, arXiv 1612.00563): training on the score itself, CIDEr.

Cross-entropy teaches the next word of one reference. Here the decoder samples several captions of each image, and each
is scored against all references. Samples that score above the image's other samples become more likely, and those that
score below become less likely. One reference of each image is learned beside its samples (for both together see
Paulus et al., 2017, arXiv 1705.04304, equation 16). Without it the score rises on training images but hardly on others.

Letters of shapes as in model.py; S is the number of samples of an image. Samples of B images come in this order: the
first sample of each image, then the second of each, and so on.
"""

import dataclasses
import time

import numpy as np
import tensorflow as tf

from captioning.captioner import Captioner, caption_cached, greedy_settings
from captioning.decoder.basic_layers import in_training, softmax_cross_entropy
from captioning.decoder.rules import ban_words
from captioning.evaluation.metrics import cider_by_image
from captioning.features.cache import dataset_images, feature_path, features_folder
from captioning.training.batches import image_batches, shares_of_batch
from captioning.training.cider_reward import CiderReward
from captioning.training.epochs import begin_epoch, check_loss, epoch_bar
from captioning.training.optimizer import apply_gradients, self_critical_rate
from captioning.training.samples import save_and_show
from captioning.training.sampling import longest_sample, sample_captions
from captioning.training.saving import restore_best, return_to_best, save_last
from captioning.training.state import SELF_CRITICAL, EpochRow
from captioning.vocabulary import PAD, UNK
from model import attention_loss
from support.distribution import is_chief, local_replica_ids, replica_rows, run_replicas, sum_processes, value_of_chief
from support.forecast import Forecast

_COLLAPSE = 0.8  # below this share of the best validation CIDEr, training has collapsed


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """The N training images.

    Attributes:
      feature_paths: string (N,)
      reward: CiderReward, which knows the images by their positions.
      captions: list of each image's lists of token ids, with <start> and <end>.
    """

    feature_paths: tf.Tensor
    reward: CiderReward
    captions: list


def _collect_images(images, vocabulary, features_dir):
    """The ImageSet of a list of prepared images."""
    paths = tf.constant([str(feature_path(image, features_dir)) for image in images])
    reward = CiderReward([image.references for image in images], vocabulary)
    return ImageSet(paths, reward, [image.encoded_captions for image in images])


# --- The epochs -------------------------------------------------------------------------------------------------


def train_epochs(state, prepared, measure_loss, samples, stop_if_asked, config):
    """Train `self_critical_epochs` on the CIDEr of sampled captions, after the epochs of cross-entropy.

    Args:
      state: TrainingState
      prepared: Prepared, whose training images are sampled.
      measure_loss: function that returns the validation loss, in nats per word.
      samples: Samples, captioned after each epoch.
      stop_if_asked: function called before each batch, as interrupts_held_back gives.
    """
    progress = state.progress
    images = _collect_images(prepared.train, prepared.vocabulary, features_folder(config))
    shown = dataset_images(prepared.validation, config)
    measure_cider = lambda: _validation_cider(state, shown, prepared.vocabulary, config, stop_if_asked)  # noqa: E731
    if progress.cross_entropy_epochs < 0:
        _begin(state, measure_cider, config.run_dir)
    last = progress.cross_entropy_epochs + config.self_critical_epochs
    captions = len(images.captions) * config.samples_per_image  # of an epoch
    forecast = Forecast("training", (last - progress.epoch) * captions - progress.captions_done, "captions")
    for epoch in range(progress.epoch, last):
        row = _train_epoch(state, images, epoch, config, stop_if_asked, forecast)
        loss, cider = measure_loss(), value_of_chief(measure_cider)
        print(f"validation CIDEr {cider:.3f}, of the sampled captions {row.sampled_cider:.3f}")
        if cider < _COLLAPSE * progress.best_cider:
            return_to_best(state, cider, config.run_dir)
        save_and_show(state, dataclasses.replace(row, validation_loss=loss, validation_cider=cider), samples, config)


def _begin(state, measure_cider, run_dir):
    """End the epochs of cross-entropy: continue from the best of them, whose CIDEr is the one to beat."""
    progress = state.progress
    restored = restore_best(state, run_dir)
    progress.best_cider = value_of_chief(measure_cider)
    progress.cross_entropy_epochs = progress.epoch
    print(
        f"self-critical epochs begin with the weights of best/{restored.name}, "
        f"at a validation CIDEr of {progress.best_cider:.3f}"
    )


def _train_epoch(state, images, epoch, config, stop_if_asked=lambda: None, forecast=None):
    """One pass over the images, or what is left of it: sample captions, compare them, and learn from that.

    Args:
      images: ImageSet
      epoch: int, epochs finished before.
      stop_if_asked: function called before each batch, as interrupts_held_back gives.
      forecast: Forecast of all epochs, which is told of each batch.

    Returns:
      EpochRow, not yet validated

    Raises:
      UserError: the loss is not finite.
    """
    progress, samples = state.progress, config.samples_per_image
    order = np.random.default_rng((config.seed, epoch)).permutation(len(images.feature_paths))
    begin_epoch(progress, epoch, order, samples)
    remaining, total = order[progress.captions_done // samples :], len(order) * samples
    size = config.images_per_step * samples  # captions of a batch
    last = progress.cross_entropy_epochs + config.self_critical_epochs
    before = saved = time.perf_counter()
    with epoch_bar(progress, epoch, last, total) as bar:
        for features, positions in image_batches(images.feature_paths, remaining, config) if len(remaining) else ():
            stop_if_asked()
            epochs_done = epoch + progress.captions_done / total - progress.cross_entropy_epochs
            state.optimizer.learning_rate = progress.rate_factor * self_critical_rate(config, epochs_done)
            loss, ciders = _sample_and_learn(state, images, features, positions.numpy(), epoch, config)
            check_loss(loss, progress, size)

            done = min(size, total - progress.captions_done)
            now = time.perf_counter()
            progress.add_batch(done, now - before, ciders=ciders)
            before = now
            bar.set_postfix(cider=f"{progress.ciders / progress.captions_done:.3f}", refresh=False)
            bar.update(done)
            if forecast and is_chief():
                forecast.add(done)

            if now - saved > 60 * config.checkpoint_minutes:
                save_last(state, config.run_dir)
                saved = now
    rate = round(total / progress.seconds, 1)
    return EpochRow(epoch + 1, SELF_CRITICAL, sampled_cider=progress.ciders / total, captions_per_second=rate)


def _sample_and_learn(state, images, features, positions, epoch, config):
    """One optimizer step on a batch of images.

    Args:
      images: ImageSet
      features: float (R b, P, F), for the R replicas of this process.
      positions: int (R b,), of the images; -1 is no image.

    Returns:
      the loss, float, and the sum of the CIDErs of all processes' samples, float
    """
    samples = config.samples_per_image
    captions = sample_captions(state, features, positions, config)  # (R b S, T)
    ciders = _score_samples(images, positions, captions, samples, with_end=False)  # (R S, b)
    rewards = _score_samples(images, positions, captions, samples)  # (R S, b)
    advantages = _compare_samples(rewards, samples)  # (R b S,)
    captions, advantages = _add_references(images, positions, captions, advantages, epoch, config)
    loss = _policy_step(state, features, tf.constant(captions), tf.constant(advantages), config)
    return float(loss), sum_processes(ciders.sum())


@tf.function(reduce_retracing=True)  # one graph for captions of all lengths
def _policy_step(state, features, captions, advantages, config):
    """One optimizer step. Returns the loss, float (), without the attention term.

    Args:
      features: float (B, P, F)
      captions: int (B (S + 1), T), as `_add_references` returns them.
      advantages: float (B (S + 1),), how much likelier each caption should become.
    """
    return run_replicas(_policy_replica, state, features, captions, advantages, config)


def _policy_replica(state, features, captions, advantages, config):
    """A replica's part of _policy_step: what is summed over the replicas is what one replica would compute."""
    features, captions, advantages = map(replica_rows, (features, captions, advantages))
    word_share, caption_share = shares_of_batch(captions, left_out=UNK)
    copies = tf.shape(captions)[0] // tf.shape(features)[0]  # S + 1
    with tf.GradientTape() as tape:
        seed = state.dropout_seed(config.seed)
        encoded_features = state.encoder(features, dropout_seed=seed, training=True)  # (B, P, D)
        encoded_features = tf.tile(encoded_features, (copies, 1, 1))  # (B (S + 1), P, D)
        logits, attention_weights = in_training(state.decoder.teacher_forcing, captions, encoded_features, seed)
        loss = _policy_gradient_loss(captions, logits, advantages) * word_share
        term = config.doubly_stochastic * attention_loss(captions, attention_weights) * caption_share
        total = state.scaled_optimizer.scale_loss(loss + term)
    # The detector gets no gradient: a sampled caption does not prove what an image shows.
    return apply_gradients(state, tape.gradient(total, state.trainable_variables), loss)


# --- Reward and loss --------------------------------------------------------------------------------------------


def _score_samples(images, positions, captions, samples, with_end=True):
    """CIDEr-D of sampled captions, `with_end` as CiderReward.score takes it.

    Args:
      images: ImageSet
      positions: int (R b,), of the sampled images, for the R replicas of this process; -1 is no image.
      captions: int (R b S, T), as `sample_captions` returns them.
      samples: int, S.

    Returns:
      float (R S, b): a row for each replica's first, second, ... samples; 0 where there is no image
    """
    replicas = len(local_replica_ids())
    said = captions[:, 1:].reshape(replicas, samples, len(positions) // replicas, -1)  # (R, S, b, T-1)
    said = said.transpose(0, 2, 1, 3).reshape(len(positions), samples, -1)  # (R b, S, T-1)
    known = np.flatnonzero(positions >= 0)
    scores = np.zeros((len(positions), samples))
    if len(known):
        scores[known] = images.reward.score(positions[known].tolist(), said[known].tolist(), with_end)
    return scores.reshape(replicas, -1, samples).transpose(0, 2, 1).reshape(replicas * samples, -1)  # (R S, b)


def _compare_samples(scores, samples):
    """How much better each sample is than the mean of the image's others. float (R S, b) -> float32 (R b S,)."""
    scores = scores.reshape(-1, samples, scores.shape[1])  # (R, S, b)
    better = (scores - scores.mean(axis=1, keepdims=True)) * samples / (samples - 1)  # (R, S, b)
    return better.astype(np.float32).ravel()


def _add_references(images, positions, captions, advantages, epoch, config):
    """Put a reference of each image behind its samples, to be learned like a sample of a given advantage.

    Each epoch takes another of an image's references, in turn. Words of a reference beyond the longest sample are cut.

    Args:
      images, positions, captions: as for `_score_samples`.
      advantages: float32 (R b S,)
      epoch: int, epochs finished before.
      config: Config, whose `reference_weight` is the advantage of a reference; at 0 nothing is added.

    Returns:
      captions: int (R b (S + 1), T)
      advantages: float32 (R b (S + 1),)
    """
    if not config.reference_weight:
        return captions, advantages
    choices = [images.captions[position] if position >= 0 else [[]] for position in positions]
    references = [choice[epoch % len(choice)][: 1 + longest_sample(config.max_words)] for choice in choices]
    longest = max(captions.shape[1], *map(len, references))  # T
    captions = np.pad(captions, ((0, 0), (0, longest - captions.shape[1])))  # (R b S, T)
    references = np.array([words + [PAD] * (longest - len(words)) for words in references], captions.dtype)  # (R b, T)
    weights = np.full(len(references), config.reference_weight, np.float32)  # (R b,)
    return _behind_samples(captions, references), _behind_samples(advantages, weights)


def _behind_samples(of_samples, of_references):
    """Join rows of each replica of this process. (R b S, ...), (R b, ...) -> (R b (S + 1), ...)."""
    split = lambda rows: rows.reshape(len(local_replica_ids()), -1, *rows.shape[1:])  # noqa: E731
    joined = np.concatenate((split(of_samples), split(of_references)), axis=1)  # (R, b (S + 1), ...)
    return joined.reshape(-1, *joined.shape[2:])  # (R b (S + 1), ...)


def _policy_gradient_loss(captions, logits, advantages):
    """REINFORCE: the cross-entropy of each word times the advantage of its caption, averaged over the words.

    Mask the same banned words as in sampling; otherwise they gain probability whenever a sample loses. <unk> is one of
    them, so where a reference has it, it is left out.

    Args:
      captions: int (B, T), samples and references: <start>, words, <end> where it is not cut off, then <pad>.
      logits: float (N, V), for the N words behind <start>, as RNN_Decoder.teacher_forcing returns them.
      advantages: float (B,), of each caption.

    Returns: float ()
    """
    words = tf.transpose(captions[:, 1:])  # (T-1, B)
    is_target = words != PAD  # (T-1, B)
    by_word = tf.boolean_mask(tf.broadcast_to(advantages, tf.shape(words)), is_target)  # (N,)
    words = tf.boolean_mask(words, is_target)  # (N,)
    is_learned = tf.cast(words != UNK, logits.dtype)  # (N,)
    losses = softmax_cross_entropy(ban_words(logits), words) * is_learned  # (N,)
    return tf.math.divide_no_nan(tf.reduce_sum(losses * by_word), tf.reduce_sum(is_learned))


# --- Validation -------------------------------------------------------------------------------------------------


def _validation_cider(state, images, vocabulary, config, stop_if_asked=lambda: None):
    """CIDEr of greedy captions of a list of ImageToCaption, on the project's own tokens."""
    captioner, generated = Captioner(state.encoder, state.decoder, vocabulary, ""), {}
    for caption in caption_cached(captioner, images, greedy_settings(config)):
        stop_if_asked()
        generated[caption.image_id] = caption.caption
    ciders = cider_by_image(generated, {image.image_id: image.references for image in images})
    return float(np.mean(list(ciders.values())))
