"""From image files to cached features: which are missing, running the network, and writing what it computes."""

import collections
import contextlib
import itertools
import pathlib
import tempfile

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from captioning.data.captioned_images import image_path
from captioning.features.cache import feature_path, feature_stem, features_folder, random_statistics
from captioning.features.cnn import CHANNELS, LOCATIONS
from captioning.features.feature_files import check_feature_file, write_features
from captioning.features.image_files import load_image
from captioning.features.inception import extraction_graphs, feature_network, network_identity
from captioning.features.manifest import merge_journals, open_journal, ways_out
from captioning.features.missing import check_pictures, files_without_line
from support.devices import usable_cores
from support.errors import UserError
from support.file_states import cancelling_pool, read_state
from support.files import TEMPORARY

EXTRACT_WORKERS = 3  # batches at work at a time on a CPU. A thread each reads a batch and then computes it.
CALIBRATION_IMAGES = 64  # training images that random weights get their batch-norm statistics from


def check_case(images, folder):
    """Raise UserError if names of images differ in case alone, and the folder's disk takes them for one."""
    stems = {}
    for stem in map(feature_stem, images):
        other = stems.setdefault(stem.casefold(), stem)
        if other != stem and ignores_case(folder):
            raise UserError(
                f"the features of {other} and {stem} would be one file, as the disk of {folder} does not tell capitals "
                "from small letters: name a --features_dir on another disk, or rename an image"
            )


def ignores_case(folder):
    """Whether the folder's disk takes names for one that differ in case alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=TEMPORARY, dir=folder) as file:
        return folder.joinpath(pathlib.PurePath(file.name).name.upper()).exists()


def check_replaced(images, recorded, live, files, config):
    """Raise UserError if somebody put other whole features in the place of those that this program wrote.

    Where the picture has changed too, they are this program's, and their line was lost.

    Args:
      recorded, live: Manifest of all lines, and of those whose feature files are unchanged.
      files: dict of stem to os.stat_result, the feature files.
    """
    suspects = [image for image in files_without_line(images, live, files) if feature_stem(image) in recorded.entries]
    _, changed = check_pictures(suspects, recorded, config)
    paths = [feature_path(image, config) for image in suspects if feature_stem(image) not in changed]
    with cancelling_pool(usable_cores()) as pool:
        foreign = [path for path, state in zip(paths, pool.map(check_feature_file, paths), strict=True) if state]
    if foreign:
        raise UserError(
            f"{foreign[0]} is not the feature file that python data_utils.py wrote there ({recorded.network}), nor are "
            f"{len(foreign) - 1} others what it wrote. Features made elsewhere need a --features_dir of their own: "
            f"{ways_out(features_folder(config))}"
        )


# --- Extracting -------------------------------------------------------------------------------------------------


def calibration_paths(splits, config):
    """The image files for `feature_network`: the first training images, which are the same for every shard."""
    return [image_path(image, config) for image in splits["train"][:CALIBRATION_IMAGES]]


def cache_features(images, calibration, config, shared=False):
    """Extract the features of images and write them to the cache.

    Args:
      images: list of CaptionedImage, those that `find_missing` returned and whose pictures are at hand.
      calibration: list of image files for random weights, see `feature_network`.
      shared: bool, whether other processes may be writing features to the same folder.

    Returns:
      dict of an image's name to reason, for pictures that cannot be read

    Raises:
      UserError: the weights cannot be had, the cache is another network's, or the disk is full.
    """
    if not images:
        return {}
    folder, skipped, pictures = features_folder(config), {}, {}
    statistics = random_statistics(config)
    names = {image_path(image, config): image.name for image in images}
    targets = {image_path(image, config): feature_path(image, config) for image in images}

    def load_and_note(path):
        pictures[path] = read_state(path)  # before the pixels: a change in between shows in the next run
        return load_image(path)

    network = feature_network(config, statistics, calibration)
    with open_journal(folder, network_identity(config, statistics)) as journal:
        with extraction_graphs(config), tqdm(total=len(targets), desc="extracting features", unit=" images") as bar:
            for paths, features, failed in extract_features(
                network, list(targets), config.extract_batch, load_and_note
            ):
                states = [pictures.pop(path) for path in paths]
                write_features([targets[path] for path in paths], features, config.feature_dtype, journal, states)
                for path, reason in failed:
                    bar.write(reason)
                    skipped[names[path]] = reason
                bar.update(len(paths) + len(failed))
    if not shared:
        merge_journals(folder)
    return skipped


def extract_features(network, paths, batch_size, load=load_image):
    """Run the network over image files. While one batch is computed, others are read.

    Batches go to all GPUs in turn. Without a GPU they go to the CPU.

    Args:
      network: function, as `feature_network` returns it.
      paths: list of image files.
      batch_size: int, B.
      load: function of a path that returns pixels, uint8 (299, 299, 3), or raises ValueError.

    Yields:
      (paths of a batch's readable images, their features as float32 (B, P, F), list of (path, reason) of the others)
    """
    gpus = [device.name for device in tf.config.list_logical_devices("GPU")]
    devices = itertools.cycle(gpus or [None])
    workers = max(EXTRACT_WORKERS * len(gpus), usable_cores()) if gpus else EXTRACT_WORKERS
    with cancelling_pool(workers) as pool:
        running = collections.deque()
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            running.append(pool.submit(extract_batch, network, batch, load, next(devices)))
            if len(running) > workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def extract_batch(network, paths, load, device=None):
    """Read a batch and compute it on a device, or where TensorFlow chooses. Returns what `extract_features` yields."""
    readable, pixels, failed = [], [], []
    for path in paths:
        try:
            pixels.append(load(path))
            readable.append(path)
        except ValueError as error:
            failed.append((path, str(error)))
    if not readable:
        return [], np.zeros((0, LOCATIONS, CHANNELS), np.float32), failed
    with tf.device(device) if device else contextlib.nullcontext():
        return readable, network(tf.constant(np.stack(pixels))).numpy(), failed  # (B, P, F)
