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

from captioning.captioner import Captioner, cached_batches, caption_batch
from captioning.cider_reward import CiderReward
from captioning.decoding_rules import ban_words, has_ended
from captioning.distribution import local_replica_ids, replica_rows, run_on_each
from captioning.feature_cache import feature_path
from captioning.kernels import softmax_cross_entropy
from captioning.metrics import quick_score
from captioning.vocabulary import PAD, START, UNK

LONGEST_SAMPLE = 20  # words; hardly any caption is longer, and one that has not ended by then scores lower
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


# --- Sampling ---------------------------------------------------------------------------------------------------


def sample_captions(state, features, positions, config):
    """Say captions word by word, each word drawn by its probability.

    The draws depend on the seed, the optimizer's step and a picture's place in the batch. So a run that is continued
    draws the same, and so does any number of replicas.

    Args:
      state: TrainingState
      features: float (R b, P, F), for the R replicas of this process.
      positions: int (R b,), of the pictures; -1 is no picture, whose samples are <pad> alone.

    Returns:
      int (R b S, T): <start>, words, <end> if there was room for it, then <pad>; the rows of one replica after those
      of the other
    """
    step = sample_step.get_concrete_function(state, tf.TensorSpec((None, *features.shape[1:]), features.dtype), config)
    parts = [part.numpy() for part in step(state, features, config)]
    longest = max(part.shape[1] for part in parts)
    captions = np.concatenate([np.pad(part, ((0, 0), (0, longest - part.shape[1]))) for part in parts])
    absent = np.tile(positions.reshape(len(parts), 1, -1) < 0, (1, config.samples_per_picture, 1))  # (R, S, b)
    return np.where(absent.reshape(-1, 1), PAD, captions)


@tf.function
def sample_step(state, features, config):
    return run_on_each(sample_replica, state, features, config)


def sample_replica(state, features, config):
    """A replica's part of sample_captions. float (R b, P, F) -> int (b S, T)."""
    features, decoder = replica_rows(features), state.decoder
    encoded_features = state.encoder(features)  # (b, P, D)
    keys = decoder.attention.key_layer(encoded_features)  # (b, P, U)
    hidden = decoder.initial_hidden(encoded_features)  # (b, U)
    repeat = lambda x: tf.tile(x, (config.samples_per_picture, *[1] * (x.shape.rank - 1)))  # noqa: E731
    encoded_features, keys, hidden = map(repeat, (encoded_features, keys, hidden))  # (b S, P, D), (b S, P, U), (b S, U)
    chances = draw_chances(tf.shape(features)[0], state.optimizer.iterations, config)  # (T-1, b S)

    def one_word(words, hidden):
        # No dropout, though the gradient is taken with it: rewards are for what the model says in use, and dropout is
        # against learning by heart. So the draws are of a slightly other model than the one that is differentiated.
        logits, hidden, _ = decoder(words[:, -1:], encoded_features, hidden, keys)
        probabilities = tf.nn.softmax(ban_words(logits))  # (b S, V)
        drawn = draw_words(probabilities, chances[tf.shape(words)[1] - 1])  # (b S,)
        drawn = tf.where(has_ended(words), PAD, drawn)  # (b S,)
        return tf.concat((words, drawn[:, tf.newaxis]), 1), hidden  # (b S, t + 2), (b S, U)

    words, _ = tf.while_loop(
        lambda words, _: ~tf.reduce_all(has_ended(words)),
        one_word,
        (tf.fill((tf.shape(hidden)[0], 1), START), hidden),
        shape_invariants=(tf.TensorShape((None, None)), hidden.shape),
        maximum_iterations=longest_sample(config),
    )
    return words


def longest_sample(config):
    return min(LONGEST_SAMPLE, config.max_words)


def draw_chances(pictures, step, config):
    """A uniform number for each word of each sample of this replica's pictures, from those of the whole batch.

    Returns:
      float (T-1, b S), T-1 being the most words of a sample
    """
    replica, samples = tf.distribute.get_replica_context(), config.samples_per_picture
    count = replica.num_replicas_in_sync
    seed = tf.stack((tf.constant(config.seed, tf.int64), tf.cast(step, tf.int64)))  # (2,)
    chances = tf.random.stateless_uniform((pictures * count, samples, longest_sample(config)), seed)
    chances = tf.transpose(chances[replica.replica_id_in_sync_group :: count], (2, 1, 0))  # (T-1, S, b)
    return tf.reshape(chances, (longest_sample(config), -1))  # (T-1, b S)


def draw_words(probabilities, chances):
    """The word at which the probabilities, added up, pass the chance. float (N, V), (N,) -> int (N,)."""
    cumulative = tf.cumsum(probabilities, axis=1)  # (N, V)
    thresholds = chances * cumulative[:, -1]  # (N,)
    words = tf.reduce_sum(tf.cast(cumulative <= thresholds[:, tf.newaxis], tf.int32), axis=1)  # (N,)
    return tf.minimum(words, tf.shape(probabilities)[1] - 1)  # (N,)


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
