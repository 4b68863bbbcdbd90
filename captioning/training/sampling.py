"""Captions sampled for self-critical training, the same with any number of replicas."""

import numpy as np
import tensorflow as tf

from captioning.decoder.edited_model import following_model
from captioning.decoder.nucleus_sampling import sample_decode
from captioning.vocabulary import PAD, START
from support.distribution import replica_rows, run_on_each

_LONGEST_SAMPLE = 20  # words; hardly any caption is longer, and one that has not ended by then scores lower


def longest_sample(max_words):
    return min(_LONGEST_SAMPLE, max_words)


@following_model("self-critical training", "or give --self_critical_epochs 0")
def sample_captions(state, features, positions, config):
    """Sample captions word by word, from the probabilities of all words.

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
    features, replica = replica_rows(features), tf.distribute.get_replica_context()
    # Drawn for the whole batch, of which each replica takes what is its own.
    count = replica.num_replicas_in_sync
    shape = count * tf.shape(features)[0], config.samples_per_image, longest_sample(config.max_words)
    seed = tf.stack((tf.constant(config.seed, tf.int64), tf.cast(state.optimizer.iterations, tf.int64)))  # (2,)
    chances = tf.random.stateless_uniform(shape, seed)[replica.replica_id_in_sync_group :: count]  # (b, S, T-1)
    # No dropout, though the gradient is taken with it: rewards are for captions as generated in use. So the samples
    # are of a slightly different model than the one that is differentiated.
    words = sample_decode(state.encoder, state.decoder, features, chances).words  # (b, S, T-1)
    words = tf.pad(tf.transpose(words, (1, 0, 2)), ((0, 0), (0, 0), (1, 0)), constant_values=START)  # (S, b, T)
    return tf.reshape(words, (-1, tf.shape(words)[2]))  # (b S, T)
