"""From image files to cached features: running the network, and writing what it computes."""

import collections
import functools
import itertools

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from captioning.data.captioned_images import image_path
from captioning.features.cache import feature_path, features_folder, random_statistics
from captioning.features.cnn import CNNS
from captioning.features.feature_files import write_features
from captioning.features.image_files import load_image
from captioning.features.manifest import merge_journals, open_journal
from captioning.features.network import extraction_graphs, feature_network, network_identity
from support.devices import usable_cores
from support.file_states import cancelling_pool, read_state
from support.forecast import Forecast

_EXTRACT_WORKERS = 3  # batches at work at a time on a CPU. A thread each reads a batch and then computes it.
_CALIBRATION_IMAGES = 64  # training images that random weights get their batch-norm statistics from


def calibration_paths(splits, config):
    """The image files for `feature_network`: the first training images, which are the same for every shard."""
    return [image_path(image, config) for image in splits["train"][:_CALIBRATION_IMAGES]]


def cache_features(images, calibration, config, shared=False, cut=None):
    """Extract the features of images and write them to the cache.

    Args:
      images: list of CaptionedImage, those that `find_missing` returned and whose images are at hand.
      calibration: list of image files for random weights, see `feature_network`.
      shared: bool, whether other processes may be writing features to the same folder.
      cut: list or None, as in `load_image`.

    Returns:
      dict of an image's name to reason, for images that cannot be read

    Raises:
      UserError: the weights cannot be had, the cache is another network's, or the disk is full.
    """
    if not images:
        return {}
    cnn, folder, skipped, image_states = CNNS[config.cnn], features_folder(config), {}, {}
    statistics = random_statistics(folder)
    by_path = {image_path(image, config): image for image in images}

    def load(path):
        image_states[path] = read_state(path)  # before the pixels: a change in between shows in the next run
        return load_image(path, cnn.image_size, cut)

    network = feature_network(config, statistics, calibration)
    forecast = Forecast("the features", len(by_path), "images")
    with (
        open_journal(folder, network_identity(config, statistics)) as journal,
        extraction_graphs(config),
        tqdm(total=len(by_path), desc="extracting features", unit=" images") as bar,
    ):
        for paths, features, failed in extract_features(network, cnn, list(by_path), config.extract_batch, load):
            targets = [feature_path(by_path[path], folder) for path in paths]
            states = [image_states.pop(path) for path in paths]
            write_features(targets, features, config.feature_dtype, journal, states)
            for path, reason in failed:
                bar.write(reason)
                skipped[by_path[path].name] = reason
            bar.update(len(paths) + len(failed))
            forecast.add(len(paths) + len(failed))
    if not shared:
        merge_journals(folder)
    return skipped


def extract_features(network, cnn, paths, batch_size, load=None):
    """Run the network over image files. While one batch is computed, others are read.

    Batches go to all GPUs in turn. Without a GPU they go to the CPU.

    Args:
      network: function, as `feature_network` returns it, of the CNN `cnn`.
      paths: list of image files.
      batch_size: int, B.
      load: function of a path that returns the pixels which the CNN takes, or raises ValueError; usually `load_image`.

    Yields:
      (paths of a batch's readable images, their features as float32 (B, P, F), list of (path, reason) of the others)
    """
    load = load or functools.partial(load_image, side=cnn.image_size)
    gpus = [device.name for device in tf.config.list_logical_devices("GPU")]
    devices = itertools.cycle(gpus or [None])  # None: where TensorFlow chooses
    workers = max(_EXTRACT_WORKERS * len(gpus), usable_cores()) if gpus else _EXTRACT_WORKERS
    with cancelling_pool(workers) as pool:
        running = collections.deque()
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            running.append(pool.submit(_extract_batch, network, cnn, batch, load, next(devices)))
            if len(running) > workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _extract_batch(network, cnn, paths, load, device):
    """Read a batch and compute it on a device. Returns what `extract_features` yields."""
    readable, pixels, failed = [], [], []
    for path in paths:
        try:
            pixels.append(load(path))
            readable.append(path)
        except ValueError as error:
            failed.append((path, str(error)))
    if not readable:
        return [], np.zeros((0, *cnn.feature_shape), np.float32), failed
    with tf.device(device):
        return readable, network(tf.constant(np.stack(pixels))).numpy(), failed  # (B, P, F)
