"""Self-critical training (Rennie et al., 2017, arXiv 1612.00563): captions taught by the score that people report.

Cross-entropy teaches the next word of one reference. Here the decoder says several captions of each picture by chance.
Each is scored against all references. Those that score above the picture's other samples become likelier, and those
that score below become less likely. A reference of each picture is learned beside its samples (for both together see
Paulus et al., 2017, arXiv 1705.04304, equation 16). Without it the score of training pictures rises and that of others
hardly does.

Letters of shapes as in model.py; S is the number of samples of a picture. Samples of B pictures come in this order: the
first sample of each picture, then the second of each, and so on.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from captioning.captioner import Captioner, caption_batch
from captioning.decoder.basic_layers import softmax_cross_entropy
from captioning.decoder.rules import ban_words
from captioning.evaluation.metrics import quick_score
from captioning.features.cache import cached_batches, feature_path
from captioning.training.cider_reward import CiderReward
from captioning.training.sampling import longest_sample
from captioning.vocabulary import PAD, UNK
from support.distribution import local_replica_ids

COLLAPSE = 0.8  # a validation CIDEr below this share of the best means that the captions have broken down


@dataclasses.dataclass(frozen=True, eq=False)
class PictureSet:
    """The N training pictures.

    Attributes:
      feature_paths: string (N,)
      reward: CiderReward, which knows the pictures by their positions.
      captions: list of each picture's lists of token ids, with <start> and <end>.
    """

    feature_paths: tf.Tensor
    reward: CiderReward
    captions: list


def collect_pictures(images, vocabulary, config):
    """The PictureSet of a list of prepared images."""
    paths = tf.constant([str(feature_path(image, config)) for image in images])
    reward = CiderReward([image.references for image in images], vocabulary)
    return PictureSet(paths, reward, [image.encoded_captions for image in images])


# --- Reward and loss --------------------------------------------------------------------------------------------


def score_samples(pictures, positions, captions, samples, with_end=True):
    """CIDEr-D of sampled captions.

    Args:
      pictures: PictureSet
      positions: int (R b,), of the sampled pictures, for the R replicas of this process; -1 is no picture.
      captions: int (R b S, T), as `sample_captions` returns them.
      samples: int, S.
      with_end: bool, as CiderReward.score takes it.

    Returns:
      float (R S, b): a row for each replica's first, second, ... samples; 0 where there is no picture
    """
    replicas = len(local_replica_ids())
    said = captions[:, 1:].reshape(replicas, samples, len(positions) // replicas, -1)  # (R, S, b, T-1)
    said = said.transpose(0, 2, 1, 3).reshape(len(positions), samples, -1)  # (R b, S, T-1)
    known = np.flatnonzero(positions >= 0)
    scores = np.zeros((len(positions), samples))
    if len(known):
        scores[known] = pictures.reward.score(positions[known].tolist(), said[known].tolist(), with_end)
    return scores.reshape(replicas, -1, samples).transpose(0, 2, 1).reshape(replicas * samples, -1)  # (R S, b)


def compare_samples(scores, samples):
    """How much better each sample is than the mean of the picture's others. float (R S, b) -> float32 (R b S,)."""
    scores = scores.reshape(-1, samples, scores.shape[1])  # (R, S, b)
    better = (scores - scores.mean(axis=1, keepdims=True)) * samples / (samples - 1)  # (R, S, b)
    return better.astype(np.float32).ravel()


def add_references(pictures, positions, captions, advantages, epoch, config):
    """Put a reference of each picture behind its samples, to be learned like a sample of a given advantage.

    Each epoch takes another of a picture's references, in turn. Words of a reference beyond the longest sample are cut.

    Args:
      pictures: PictureSet
      positions: int (R b,), as in `score_samples`.
      captions: int (R b S, T), as `sample_captions` returns them.
      advantages: float32 (R b S,)
      epoch: int, epochs finished before.
      config: Config, whose `reference_weight` is the advantage of a reference; at 0 nothing is added.

    Returns:
      captions: int (R b (S + 1), T)
      advantages: float32 (R b (S + 1),)
    """
    if not config.reference_weight:
        return captions, advantages
    choices = [pictures.captions[position] if position >= 0 else [[]] for position in positions]
    references = [choice[epoch % len(choice)][: 1 + longest_sample(config)] for choice in choices]
    longest = max(captions.shape[1], *map(len, references))
    captions = np.pad(captions, ((0, 0), (0, longest - captions.shape[1])), constant_values=PAD)  # (R b S, T)
    references = np.array([words + [PAD] * (longest - len(words)) for words in references], captions.dtype)  # (R b, T)
    weights = np.full(len(references), config.reference_weight, np.float32)  # (R b,)
    return behind_samples(captions, references), behind_samples(advantages, weights)


def behind_samples(of_samples, of_references):
    """Join rows of each replica of this process. (R b S, ...), (R b, ...) -> (R b (S + 1), ...)."""
    split = lambda rows: rows.reshape(len(local_replica_ids()), -1, *rows.shape[1:])  # noqa: E731
    joined = np.concatenate((split(of_samples), split(of_references)), axis=1)  # (R, b (S + 1), ...)
    return joined.reshape(-1, *joined.shape[2:])  # (R b (S + 1), ...)


def policy_gradient_loss(captions, logits, advantages):
    """REINFORCE: the cross-entropy of each word times the advantage of its caption, averaged over the words.

    What sampling may not say is barred from the softmax here too. Otherwise these words, which no sample ever has,
    would gain whenever a sample loses, until they have all the probability. So <unk>, which references hold, cannot be
    learned and is left out.

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


def validation_cider(state, pictures, vocabulary, config, stop_if_asked=lambda: None):
    """CIDEr of greedy captions, on the project's own tokens.

    Args:
      state: TrainingState
      pictures: list of Pictures with references and cached features.
      stop_if_asked: function called before each batch, as interrupts_held_back gives.
    """
    captioner = Captioner(state.encoder, state.decoder, vocabulary, "")
    greedy = dataclasses.replace(config, beam_width=1)
    captions = []
    for batch, features in cached_batches(pictures, greedy):
        stop_if_asked()
        captions += caption_batch(captioner, batch, features, greedy)
    predicted = {caption.image_id: caption.caption for caption in captions}
    return quick_score(predicted, {picture.image_id: picture.references for picture in pictures})["CIDEr"]
