"""The feature cache: a folder with one .npy file for each image, named after the image file's stem.

A feature file holds (P, F) numbers, float16 or float32. The manifest beside the files tells which network made them
from which images (see manifest.py). random_statistics.npz belongs to a network of random weights.
"""

import collections
import dataclasses
import pathlib

import numpy as np
import tensorflow as tf

from captioning.data.captioned_images import image_path, match_names
from captioning.data.prepared_data import load_prepared, read_prepared_settings
from captioning.features.cnn import CNNS
from captioning.features.feature_files import parallel_map, read_feature, reading_features
from captioning.features.manifest import MADE_ELSEWHERE, keep_live, read_manifest, scan_features
from captioning.features.network import network_identity
from support.errors import FileError

_MEASURED_IMAGES = 500  # training images that the features' statistics are measured on, at the most
_LEAST_STD = 1e-6

# --- Places -----------------------------------------------------------------------------------------------------


def features_folder(config):
    return pathlib.Path(config.features_dir or pathlib.Path(config.data_dir, "features"))


def feature_path(image, features_dir):
    """Where an image's features are. CaptionedImage, path -> pathlib.Path."""
    return pathlib.Path(features_dir, f"{feature_stem(image)}.npy")


def feature_stem(image):
    return image.feature_stem or pathlib.PurePath(image.file_name).stem


def features_on_disk(images, folder):
    """Images whose features, made elsewhere, are named in another spelling of Unicode, get the name that is there.

    list of CaptionedImage, path of the cache -> list of CaptionedImage
    """
    listed, found = {}, []
    for image in images:
        if not (stem := feature_stem(image)).isascii():
            name = match_names(folder, f"{stem}.npy", listed).removesuffix(".npy")
            image = image if name == stem else dataclasses.replace(image, feature_stem=name)
        found.append(image)
    return found


def random_statistics(features_dir):
    """Where the batch-norm statistics of random weights are. path -> pathlib.Path."""
    return pathlib.Path(features_dir, "random_statistics.npz")


# --- Features of prepared images ----------------------------------------------------------------------------------


def cached_network(features_dir):
    """The identity of the network that made the cached features, MADE_ELSEWHERE, or None. path -> str or None."""
    return read_manifest(features_dir, {}).network


def _check_features(images, features_dir, network):
    """Check that the features of prepared images are there, unchanged, and of the network that they were prepared with.

    Raises:
      FileError: a feature is missing, damaged or changed, or is another network's.
    """
    files = scan_features(features_dir)
    manifest = keep_live(features_dir, files, read_manifest(features_dir, files))
    problems = collections.defaultdict(list)
    for image in images:
        if feature_stem(image) not in files:
            problems["missing from the feature cache"].append(feature_path(image, features_dir))
        elif feature_stem(image) not in manifest.entries:
            problems["damaged, or changed since it was prepared"].append(feature_path(image, features_dir))
    for problem, paths in problems.items():
        others = f", and {len(paths) - 1} others are too" if len(paths) > 1 else ""
        raise FileError(paths[0], f"is {problem}{others}")
    if manifest.network != network:
        problem = f"holds features of another network ({manifest.network}) than those that were prepared ({network})"
        raise FileError(features_dir, problem)


def load_data(config, to_caption=False):
    """What script 1 prepared, with its features: Prepared.

    Args:
      to_caption: bool, whether the images are only captioned. `max_words` then tells where decoding stops, and need not
        be what the data were prepared with.

    Raises:
      UserError: as `load_prepared` and `_check_features` do.
    """
    prepared = load_prepared(_as_prepared(config, to_caption))
    _check_features(prepared.images(), features_folder(config), prepared.network)
    return prepared


def _as_prepared(config, to_caption):
    """The Config with the settings that the data were prepared with, where its own may be others. See `load_data`.

    A file of weights may have moved, and the one that `imagenet` stands for may be named by its path.
    """
    saved = read_prepared_settings(config.data_dir)
    if to_caption:
        config = dataclasses.replace(config, max_words=saved["max_words"])
    weights = saved["inception_weights"]
    if config.inception_weights == weights:
        return config
    network = cached_network(features_folder(config))
    if network in (None, MADE_ELSEWHERE) or network_identity(config) != network:
        return config
    return dataclasses.replace(config, inception_weights=weights)


def measure_features(images, features_dir):
    """Measure the features of the first `_MEASURED_IMAGES` of a list of CaptionedImage.

    Returns:
      (float32 (F,), each channel's mean over images and locations; float, standard deviation from these means)
    """
    sample = np.stack([np.load(feature_path(image, features_dir)) for image in images[:_MEASURED_IMAGES]])  # (N, P, F)
    mean = sample.mean((0, 1), dtype=np.float32)  # (F,)
    squares = sum(float(np.square(features - mean).mean(dtype=np.float32)) for features in sample)
    return mean, max((squares / len(sample)) ** 0.5, _LEAST_STD)


# --- Images with cached features ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageToCaption:
    """An image to caption.

    Attributes:
      path: pathlib.Path of the image file.
      name: str, the image as the user knows it: a path or an address.
      image_id, references: as in GeneratedCaption.
      feature_path: pathlib.Path of its cached features, or None.
    """

    path: pathlib.Path
    name: str
    image_id: int | str | None = None
    references: list[str] = ()
    feature_path: pathlib.Path | None = None


def dataset_images(images, config):
    """A data set's images with their cached features. list of CaptionedImage -> list of ImageToCaption."""
    paths, features_dir = [image_path(image, config) for image in images], features_folder(config)
    return [
        ImageToCaption(path, str(path), image.image_id, image.references, feature_path(image, features_dir))
        for path, image in zip(paths, images, strict=True)
    ]


def cached_batches(images, config):
    """The images with their cached features, `decode_batch` at a time.

    Args:
      images: list of ImageToCaption with a `feature_path`.

    Yields:
      (list of B ImageToCaption, features float32 (B, P, F))

    Raises:
      FileError: a feature file is missing or damaged.
    """
    size = config.decode_batch
    if not images:
        return
    paths = [str(image.feature_path) for image in images]
    # Rounded as in training, where features made elsewhere have more digits than the settings name.
    shape, dtype = CNNS[config.cnn].feature_shape, config.feature_dtype
    read = lambda path: tf.cast(read_feature(path, shape, dtype), tf.float32)  # noqa: E731
    dataset = parallel_map(read, paths).batch(size).prefetch(1)
    with reading_features():
        for number, batch in enumerate(dataset):
            yield images[number * size : (number + 1) * size], batch  # (B, P, F)
