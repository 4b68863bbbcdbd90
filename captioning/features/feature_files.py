"""Feature files: one .npy for each image, (P, F) numbers, float16 or float32."""

import contextlib
import io
import math
import pathlib
import re
import zlib

import numpy as np
import tensorflow as tf

from captioning.features.manifest import Entry
from support.devices import usable_cores
from support.errors import FileError, UserError
from support.file_states import make_state
from support.files import raise_if_lost, replacing


def write_features(paths, features, dtype, journal=None, images=None):
    """Write each image's features as a .npy file of its own, which takes its name when its line is on the disk.

    Args:
      paths: list of B paths.
      features: (B, P, F).
      dtype: "float16" or "float32", the number type on disk.
      journal: Journal, or None to write no lines of a manifest.
      images: list of B FileState, needed for a journal.

    Raises:
      UserError: a number is not finite in this type, or a file cannot be written.
    """
    stored = tf.cast(features, dtype)  # (B, P, F); TensorFlow casts several times faster than NumPy
    finite = tf.reduce_all(tf.math.is_finite(stored), axis=(1, 2)).numpy()  # (B,)
    if not finite.all():
        raise UserError(
            f"the network's features of {paths[finite.argmin()].stem} are not finite numbers in {dtype}: "
            "give --feature_dtype float32 --extract_precision float32, or other --inception_weights"
        )
    entries = {}
    with contextlib.ExitStack() as renamed:
        for path, feature, image in zip(paths, stored.numpy(), images or [None] * len(paths), strict=True):
            data = io.BytesIO()
            np.save(data, feature, allow_pickle=False)
            temporary = renamed.enter_context(replacing(path))
            temporary.write_bytes(data.getbuffer())
            entries[path.stem] = Entry(make_state(temporary.stat(), zlib.crc32(data.getbuffer())), image)
        if journal:
            journal.add(entries)


def read_feature(path, shape, dtype):
    """Read one cached feature inside a TensorFlow graph, whichever of the two number types it has on disk.

    Training and captioning both name `config.feature_dtype`, so that a model gets the same numbers in both.

    A file that cannot be one ends the pipeline with an error. `reading_features` turns that into one line.

    Args:
      path: string ().
      shape: (P, F), which its CNN tells.
      dtype: number type of the result, which is (P, F).
    """
    data = tf.io.read_file(path)
    header = _npy_header_length(data)
    length = tf.strings.length(data) - header
    is_float16 = tf.equal(length, 2 * math.prod(shape))
    is_whole = is_float16 | tf.equal(length, 4 * math.prod(shape))
    with tf.control_dependencies([tf.debugging.Assert(is_whole, ["damaged feature file:", path])]):
        numbers = tf.strings.substr(data, header, length)
    features = tf.cond(
        is_float16,
        lambda: tf.cast(tf.io.decode_raw(numbers, tf.float16), dtype),
        lambda: tf.cast(tf.io.decode_raw(numbers, tf.float32), dtype),
    )
    return tf.reshape(features, shape)  # (P, F)


def _npy_header_length(data):
    """The bytes before the numbers of a .npy file, whose format has three versions. string () -> int32 ()."""
    start = tf.strings.join([tf.strings.substr(data, 0, 12), b"\0" * 12])  # an empty file has a start too
    start = tf.cast(tf.io.decode_raw(start, tf.uint8), tf.int32)  # (12 or more,)
    version, length = start[6], start[8] + 256 * start[9]
    return tf.where(version == 1, 10 + length, 12 + length + 65_536 * start[10] + 16_777_216 * start[11])


@contextlib.contextmanager
def reading_features():
    """Turn TensorFlow's errors about a feature file that cannot be read in the block into a FileError."""
    try:
        yield
    except tf.errors.OpError as error:
        damaged = re.search(r"damaged feature file:\] \[(.*?\.npy)\]", error.message)
        absent = re.search(r"(?:.*(?:: |}} ))?(.*?\.npy); (.*?)\s*(?:\n|\[\[|$)", error.message)
        if damaged:
            raise FileError(damaged[1], "is damaged") from None
        if absent:
            raise FileError(absent[1], f"cannot be read ({absent[2]})") from None
        raise


def parallel_map(function, inputs, workers=None):
    """Apply a function to many inputs on many cores.

    Args:
      function: function of one row of `inputs`, in a graph.
      inputs: tensor or tuple of tensors with the same number of rows.
      workers: int, rows at work at a time, or None for one on each core.

    Returns:
      tf.data.Dataset of the results, in the order of the rows.
    """
    options = tf.data.Options()
    options.autotune.enabled = False  # TensorFlow's tuning thread can hold up a pipeline's end by a second or more
    dataset = tf.data.Dataset.from_tensor_slices(inputs)
    return dataset.map(function, num_parallel_calls=workers or usable_cores()).with_options(options)


def check_feature_file(path, shape, dtype="float32"):
    """Read a feature file that another program made, and check it.

    Args:
      shape: (P, F), which the features must have.
      dtype: "float16" or "float32", the number type that they must fit into.

    Returns:
      FileState, or None if it is not (P, F) of finite float16 or float32 numbers that `read_feature` can read.
    """
    path = pathlib.Path(path)
    try:
        stat, data = path.stat(), path.read_bytes()
    except OSError as error:
        raise_if_lost(error, path)
        return None
    features = _load_npy(data)
    if features is None or features.shape != shape or features.dtype not in (np.float16, np.float32):
        return None
    # Without their sign, floats are in the order of their bits, with infinity and NaN behind all others. NumPy compares
    # integers many times faster than float16.
    unsigned = f"u{features.itemsize}"
    limit = features.dtype.type(min(float(np.finfo(dtype).max), float(np.finfo(features.dtype).max))).view(unsigned)
    magnitudes = features.view(unsigned) & np.iinfo(unsigned).max // 2  # (P, F)
    return make_state(stat, zlib.crc32(data)) if magnitudes.max() <= limit else None


def _load_npy(data):
    """The array of a .npy file's bytes. None where these are damaged, in Fortran's order, or have more behind them."""
    for _ in range(9):  # it succeeds at once or at the next try, and a damaged file must not be tried for ever
        file = io.BytesIO(data)
        try:
            array = np.lib.format.read_array(file, allow_pickle=False)
        except SystemError:  # Python 3.11's parser, which NumPy reads headers with, sometimes fails in threads
            continue
        except Exception:  # a damaged header raises errors of many classes
            return None
        return array if array.flags.c_contiguous and file.tell() == len(data) else None
    return None


def feature_shape(path):
    """The shape of a feature file, a tuple of int, or None where it cannot be read. Reads its header alone."""
    try:
        return np.load(path, mmap_mode="r").shape
    except (OSError, ValueError):
        return None
