"""Training batches: captions of similar lengths together, read ahead with their images' features."""

import dataclasses

import numpy as np
import tensorflow as tf

from captioning.features.cache import feature_path
from captioning.features.cnn import CHANNELS, LOCATIONS
from captioning.features.feature_files import parallel_map, read_feature
from captioning.vocabulary import PAD
from support.devices import usable_cores
from support.distribution import share_batches, sum_replicas

_READ_AHEAD = 1_000_000_000  # bytes of features, at the most, that are read before they are needed
_LENGTH_STEP = 4  # words


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


def collect_captions(images, config):
    """The CaptionSet of a list of prepared images."""
    encoded = [caption for image in images for caption in image.encoded_captions]
    paths = [str(feature_path(image, config)) for image in images for _ in image.encoded_captions]
    lengths = np.array([len(caption) for caption in encoded])
    return CaptionSet(
        feature_paths=tf.constant([*paths, paths[-1]]),
        words=tf.RaggedTensor.from_row_lengths(np.concatenate(encoded).astype(np.int32), [*lengths, 0]),
        lengths=lengths,
    )


def bucket_by_length(lengths, batch_size, rng):
    """The order of an epoch: every caption once, two lengths in a batch, the batches in random order.

    The first half of a batch has captions of one length, longer than most. The other half has captions of another
    length, shorter than most. So little is computed for padding, and no batch teaches that all captions are long.

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

    A graph is made for each size of a batch, so there must be few. T is a multiple of _LENGTH_STEP, and the last batch
    is filled up with empty captions. Of several processes each reads its share of every batch.

    Args:
      captions: CaptionSet
      order: int (N,), positions of captions.
    """

    def read(positions, longest):
        features = _read_features(tf.gather(captions.feature_paths, positions), config)  # (B, P, F)
        words = tf.gather(captions.words, positions).to_tensor(PAD, shape=tf.stack((-1, longest)))  # (B, T)
        return features, words

    positions = share_batches(order, config.batch_size) % len(captions.feature_paths)  # -1 is the last, the empty one
    longest = _padded_length(np.maximum.reduceat(captions.lengths[order], batch_starts(order, config)))
    return parallel_map(read, (positions, longest), _parallel_batches(config)).prefetch(2)


def image_batches(feature_paths, order, config):
    """A tf.data pipeline of (features (B, P, F), positions int (B,)); -1 is no image, with features of the last one.

    Of several processes each reads its share of every batch.

    Args:
      feature_paths: string (N,), of each image.
      order: int (N,), positions of images.
    """

    def read(positions):
        return _read_features(tf.gather(feature_paths, positions % len(feature_paths)), config), positions

    return parallel_map(read, share_batches(order, config.images_per_step), _parallel_batches(config)).prefetch(2)


def _read_features(paths, config):
    """Read cached features. string (B,) -> (B, P, F) in the cache's number type."""
    dtype = tf.as_dtype(config.feature_dtype)
    return tf.map_fn(lambda path: read_feature(path, dtype), paths, fn_output_signature=dtype)  # (B, P, F)


def _parallel_batches(config):
    """How many batches are read at a time: one on each core, but no more than _READ_AHEAD bytes hold."""
    batch_bytes = config.batch_size * LOCATIONS * CHANNELS * tf.as_dtype(config.feature_dtype).size
    return max(1, min(usable_cores(), _READ_AHEAD // batch_bytes))


def batch_starts(order, config):
    return np.arange(0, len(order), config.batch_size)


def _count_tokens(captions, order, config):
    """The words to be said in each batch, <end> among them. Returns float (number of batches,)."""
    return np.add.reduceat(captions.lengths[order] - 1.0, batch_starts(order, config))


def _padded_length(length):
    """The T of a batch whose longest caption has this length: the next multiple of _LENGTH_STEP."""
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def counted_batches(captions, order, config):
    """`caption_batches` with the words to be said in each: (features (B, P, F), captions (B, T), float)."""
    if len(order):
        counted = zip(caption_batches(captions, order, config), _count_tokens(captions, order, config), strict=True)
        for (features, words), num_tokens in counted:
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
