"""Training batches: captions of similar lengths together, read ahead with their images' features."""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from captioning.features.cache import feature_path
from captioning.features.cnn import CNNS
from captioning.features.feature_files import parallel_map, read_feature
from captioning.vocabulary import PAD
from support.devices import usable_cores
from support.distribution import share_batches, sum_replicas

_READ_AHEAD = 1_000_000_000  # bytes of features, at the most, that are read before they are needed


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionSet:
    """The N captions of a split, and behind them an empty one.

    Attributes:
      feature_paths: string (N + 1,), of each caption's image.
      words: ragged int32 (N + 1, T), <start>, words, <end>.
      lengths: int (N,), words of each caption, <start> and <end> among them.
    """

    feature_paths: tf.Tensor
    words: tf.RaggedTensor
    lengths: np.ndarray


def collect_captions(images, features_dir):
    """The CaptionSet of a list of prepared images."""
    encoded = [caption for image in images for caption in image.encoded_captions]
    paths = [str(feature_path(image, features_dir)) for image in images for _ in image.encoded_captions]
    lengths = np.array([len(caption) for caption in encoded])
    return CaptionSet(
        feature_paths=tf.constant([*paths, paths[-1]]),
        words=tf.RaggedTensor.from_row_lengths(np.concatenate(encoded).astype(np.int32), [*lengths, 0]),
        lengths=lengths,
    )


def bucket_by_length(lengths, batch_size, rng):
    """The order of an epoch: every caption once, two lengths in a batch, the batches in random order.

    The first half of a batch has captions of one length, longer than most. The other half has captions of another
    length, shorter than most. So there is little padding, and no batch has long captions only.

    Args:
      lengths: int (N,), words of each caption.
      batch_size: int, B.
      rng: np.random.Generator

    Returns:
      int (N,): positions of captions; each B in a row are a batch. The last, smaller batch takes any lengths.
    """
    order = rng.permutation(len(lengths))
    count, short = len(order) // batch_size, batch_size // 2
    full = count * batch_size
    by_length = order[:full][np.argsort(lengths[order[:full]], kind="stable")]
    shorter = by_length[: count * short].reshape(count, short)
    longer = by_length[count * short :].reshape(count, batch_size - short)
    batches = np.concatenate([rng.permutation(longer), rng.permutation(shorter)], axis=1)
    return np.concatenate([batches.ravel(), order[full:]])


def caption_batches(captions, order, config):
    """A tf.data pipeline of (features (B, P, F), captions (B, T)), each batch padded to its longest caption.

    The last batch is filled up with empty captions, as a graph is made for each size of a batch. Of several processes
    each reads its share of every batch.

    Args:
      captions: CaptionSet
      order: int (N,), positions of captions.
    """

    def read(positions, longest):
        features = _read_features(tf.gather(captions.feature_paths, positions), config)  # (B, P, F)
        words = tf.gather(captions.words, positions).to_tensor(PAD, shape=tf.stack((-1, longest)))  # (B, T)
        return features, words

    positions = share_batches(order, config.batch_size) % len(captions.feature_paths)  # -1 is the last, the empty one
    longest = np.maximum.reduceat(captions.lengths[order], batch_starts(len(order), config.batch_size))
    return parallel_map(read, (positions, longest), _parallel_batches(config.batch_size, config)).prefetch(2)


def image_batches(feature_paths, order, config):
    """A tf.data pipeline of (features (B, P, F), positions int (B,)); -1 is no image, with features of the last one.

    Of several processes each reads its share of every batch.

    Args:
      feature_paths: string (N,), of each image.
      order: int (N,), positions of images.
    """

    def read(positions):
        paths = tf.gather(feature_paths, positions % len(feature_paths))  # (B,)
        return _read_features(paths, config), positions

    workers = _parallel_batches(config.images_per_step, config)
    return parallel_map(read, share_batches(order, config.images_per_step), workers).prefetch(2)


def _read_features(paths, config):
    """Read cached features as numbers of `feature_dtype`. string (B,), Config -> (B, P, F)."""
    shape, dtype = CNNS[config.cnn].feature_shape, tf.as_dtype(config.feature_dtype)
    return tf.map_fn(lambda path: read_feature(path, shape, dtype), paths, fn_output_signature=dtype)  # (B, P, F)


def _parallel_batches(batch_size, config):
    """How many batches are read at a time: one on each core, but no more than fit in _READ_AHEAD."""
    batch_bytes = batch_size * math.prod(CNNS[config.cnn].feature_shape) * tf.as_dtype(config.feature_dtype).size
    return max(1, min(usable_cores(), _READ_AHEAD // batch_bytes))


def batch_starts(count, batch_size):
    return np.arange(0, count, batch_size)


def _count_tokens(captions, order, batch_size):
    """The words to predict in each batch, with <end>. Returns float (number of batches,)."""
    return np.add.reduceat(captions.lengths[order] - 1.0, batch_starts(len(order), batch_size))


def counted_batches(captions, order, config):
    """`caption_batches` with the number of words to predict in each: (features (B, P, F), captions (B, T), float)."""
    if len(order):
        counts = _count_tokens(captions, order, config.batch_size)
        for (features, words), num_tokens in zip(caption_batches(captions, order, config), counts, strict=True):
            yield features, words, float(num_tokens)


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
