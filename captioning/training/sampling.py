"""Sampled captions: each word is drawn by its probability."""

import numpy as np
import tensorflow as tf

from captioning.decoder.edited_model import following_model
from captioning.decoder.nucleus_sampling import draw_words
from captioning.decoder.rules import ban_words, has_ended
from captioning.vocabulary import PAD, START
from support.distribution import replica_rows, run_on_each

_LONGEST_SAMPLE = 20  # words; hardly any caption is longer, and one that has not ended by then scores lower


# --- Sampling ---------------------------------------------------------------------------------------------------


@following_model("self-critical training", "or give --self_critical_epochs 0")
def sample_captions(state, features, positions, config):
    """Sample captions word by word.

    The draws depend on the seed, the optimizer's step and an image's place in the batch. So a continued run draws the
    same, with any number of replicas.

    Args:
      state: TrainingState
      features: float (R b, P, F), for the R replicas of this process.
      positions: int (R b,), of the images; -1 is no image, whose samples are <pad> alone.

    Returns:
      int (R b S, T): <start>, words, <end> if it fits, then <pad>; the rows of one replica after those
      of the other
    """
    step = _sample_step.get_concrete_function(state, tf.TensorSpec((None, *features.shape[1:]), features.dtype), config)
    parts = [part.numpy() for part in step(state, features, config)]
    longest = max(part.shape[1] for part in parts)  # T
    captions = np.concatenate([np.pad(part, ((0, 0), (0, longest - part.shape[1]))) for part in parts])  # (R b S, T)
    absent = np.tile(positions.reshape(len(parts), 1, -1) < 0, (1, config.samples_per_image, 1))  # (R, S, b)
    return np.where(absent.reshape(-1, 1), PAD, captions)


@tf.function
def _sample_step(state, features, config):
    return run_on_each(_sample_replica, state, features, config)


def _sample_replica(state, features, config):
    """A replica's part of sample_captions. float (R b, P, F) -> int (b S, T)."""
    features, decoder = replica_rows(features), state.decoder
    encoded_features = state.encoder(features)  # (b, P, D)
    keys = decoder.attention.key_layer(encoded_features)  # (b, P, U)
    hidden = decoder.initial_hidden(encoded_features)  # (b, U)
    repeat = lambda x: tf.tile(x, (config.samples_per_image, *[1] * (x.shape.rank - 1)))  # noqa: E731
    given = tf.nest.map_structure(repeat, (encoded_features, keys, hidden))
    encoded_features, keys, hidden = given  # (b S, P, D), (b S, P, U), (b S, U)
    chances = _draw_chances(tf.shape(features)[0], state.optimizer.iterations, config)  # (T-1, b S)

    def one_word(words, hidden):
        # No dropout, though the gradient is taken with it: rewards are for captions as generated in use. So the samples
        # are of a slightly different model than the one that is differentiated.
        logits, hidden, _ = decoder(words[:, -1:], encoded_features, hidden, keys)
        probabilities = tf.nn.softmax(ban_words(logits))  # (b S, V)
        drawn = draw_words(probabilities, chances[tf.shape(words)[1] - 1])  # (b S,)
        drawn = tf.where(has_ended(words), PAD, drawn)  # (b S,)
        return tf.concat((words, drawn[:, tf.newaxis]), 1), hidden  # (b S, t + 2), (b S, U)

    words, _ = tf.while_loop(
        lambda words, _: ~tf.reduce_all(has_ended(words)),
        one_word,
        (tf.fill((tf.shape(keys)[0], 1), START), hidden),
        shape_invariants=(tf.TensorShape((None, None)), tf.nest.map_structure(lambda x: x.shape, hidden)),
        maximum_iterations=longest_sample(config.max_words),
    )
    return words


def longest_sample(max_words):
    return min(_LONGEST_SAMPLE, max_words)


def _draw_chances(images, step, config):
    """A uniform number for each word of each sample of this replica's images, from those of the whole batch.

    Returns:
      float (T-1, b S), T-1 being the most words of a sample
    """
    replica, samples = tf.distribute.get_replica_context(), config.samples_per_image
    count = replica.num_replicas_in_sync
    seed = tf.stack((tf.constant(config.seed, tf.int64), tf.cast(step, tf.int64)))  # (2,)
    longest = longest_sample(config.max_words)
    chances = tf.random.stateless_uniform((images * count, samples, longest), seed)
    chances = tf.transpose(chances[replica.replica_id_in_sync_group :: count], (2, 1, 0))  # (T-1, S, b)
    return tf.reshape(chances, (longest, -1))  # (T-1, b S)
