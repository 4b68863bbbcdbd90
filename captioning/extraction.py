"""From image files to cached features: which are missing, running the network, and writing what it computes."""

import collections
import contextlib
import itertools
import pathlib

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from captioning.data.captioned_images import image_path
from captioning.devices import usable_cores
from captioning.feature_cache import (
    CHANNELS,
    LOCATIONS,
    check_feature_file,
    feature_path,
    feature_stem,
    features_folder,
    random_statistics,
    write_features,
)
from captioning.feature_manifest import (
    MADE_ELSEWHERE,
    Entry,
    Manifest,
    merge_journals,
    open_journal,
    read_live_manifest,
    scan_features,
    ways_out,
    write_manifest,
)
from captioning.file_states import FileState, cancelling_pool, find_stat, read_state, renew_states
from captioning.image_files import load_image
from captioning.inception import extraction_graphs, feature_network, network_identity
from support.errors import UserError

EXTRACT_WORKERS = 3  # batches at work at a time on a CPU. A thread each reads a batch and then computes it.
UNKNOWN = FileState(-1, -1, -1)  # no file is like that
CALIBRATION_IMAGES = 64  # training images that random weights get their batch-norm statistics from


# --- What is to be extracted ------------------------------------------------------------------------------------


def find_missing(images, config, shared=False):
    """Find the images whose features must be extracted. Reads neither pictures nor features that have not changed.

    Args:
      images: list of CaptionedImage.
      shared: bool, whether other processes may be writing features to the same folder.

    Returns:
      list of CaptionedImage: those without features, with damaged ones, or whose picture has changed since

    Raises:
      UserError: the features were made by another network, or elsewhere and are not complete.
    """
    folder = features_folder(config)
    files = scan_features(folder)
    manifest = read_live_manifest(folder, files)
    if files and manifest.network in (None, MADE_ELSEWHERE):
        complete = check_made_elsewhere(images, manifest, files, config)
        if not shared:
            write_manifest(folder, complete)
        print(f"features: {len(images)} of {len(images)} are in {folder} already, made elsewhere")
        return []

    identity = network_identity(config)
    check_foreign(images, manifest, files, config)
    manifest, changed = check_pictures(images, manifest, config)
    usable = manifest.entries.keys() - changed
    if manifest.network not in (None, identity) and (usable or shared):
        raise UserError(
            f"the features in {folder} were made by another network ({manifest.network}) than the settings name "
            f"({identity}): {ways_out(folder)}"
        )
    if usable and config.inception_weights == "random" and not random_statistics(config).exists():
        raise UserError(
            f"{random_statistics(config)} is missing, and without it no other feature can be made by the same network: "
            f"{ways_out(folder)}"
        )
    if not shared:
        manifest = settle(manifest, usable, identity, config)
    missing = [image for image in images if feature_stem(image) not in usable]
    print(f"features: {len(images) - len(missing)} of {len(images)} are in {folder} already")
    if changed:
        print(f"pictures that have changed since: {len(changed)}; their features are extracted again")
    return missing


def check_made_elsewhere(images, manifest, files, config):
    """Check features that another program made. New and changed ones are read.

    Args:
      manifest: Manifest of the features that are known and unchanged.
      files: dict of stem to os.stat_result, the feature files.

    Returns:
      Manifest with a line for each image

    Raises:
      UserError: a feature is missing or damaged.
    """
    new = files_without_line(images, manifest, files)
    entries = dict(manifest.entries)
    with cancelling_pool(usable_cores()) as pool:
        states = pool.map(check_feature_file, [feature_path(image, config) for image in new])
        states = tqdm(states, "checking features made elsewhere", total=len(new), unit=" files", disable=not new)
        for image, state in zip(new, states, strict=True):
            if state:
                entries[feature_stem(image)] = Entry(state, None)
    gaps = [image for image in images if feature_stem(image) not in entries]
    if gaps:
        raise UserError(
            f"{len(gaps)} of {len(images)} features are missing or damaged, such as {feature_path(gaps[0], config)}. "
            "The features in this folder were made elsewhere, and another network does not fill their gaps: "
            "make these with the program that made the others, or name another --features_dir"
        )
    return Manifest(MADE_ELSEWHERE, entries, manifest.journals)


def check_foreign(images, manifest, files, config):
    """Raise UserError if some feature files are whole, but not those that this program wrote."""
    paths = [feature_path(image, config) for image in files_without_line(images, manifest, files)]
    with cancelling_pool(usable_cores()) as pool:
        foreign = [path for path, state in zip(paths, pool.map(check_feature_file, paths), strict=True) if state]
    if foreign:
        raise UserError(
            f"{foreign[0]} is not the feature file that python data_utils.py wrote there ({manifest.network}), "
            f"nor are {len(foreign) - 1} others what it wrote: move features made elsewhere to a --features_dir of "
            "their own, or delete them"
        )


def files_without_line(images, manifest, files):
    """The images that have a feature file of which the manifest knows nothing."""
    stems = files.keys() - manifest.entries.keys()
    return [image for image in images if feature_stem(image) in stems]


def check_pictures(images, manifest, config):
    """Compare the pictures with those that the features were made from. A picture that is gone counts as unchanged.

    Returns:
      (Manifest with the pictures' present times, set of the stems whose picture has changed)
    """
    paths = {stem: image_path(image, config) for image in images if (stem := feature_stem(image)) in manifest.entries}
    stats = {stem: stat for stem, path in paths.items() if (stat := find_stat(path))}
    recorded = [manifest.entries[stem].picture or UNKNOWN for stem in stats]
    renewed = renew_states([paths[stem] for stem in stats], list(stats.values()), recorded)
    entries, changed = dict(manifest.entries), set()
    for stem, state in zip(stats, renewed, strict=True):
        if state:
            entries[stem] = entries[stem]._replace(picture=state)
        else:
            changed.add(stem)
    return Manifest(manifest.network, entries, manifest.journals), changed


def settle(manifest, usable, identity, config):
    """Bring the manifest up to date. If none of the features is usable, the cache begins anew with this network.

    No other process may be writing features.

    Args:
      manifest: Manifest of the features that are known and unchanged.
      usable: set of the stems whose picture has not changed either.
      identity: str, `network_identity`.

    Returns:
      Manifest
    """
    folder = features_folder(config)
    if not usable:
        # The features first: whatever is left if this is interrupted, the next run comes here again.
        for stem in manifest.entries:
            pathlib.Path(folder, f"{stem}.npy").unlink(missing_ok=True)
        random_statistics(config).unlink(missing_ok=True)
        manifest = Manifest(identity, {}, manifest.journals)
    write_manifest(folder, manifest)
    return manifest


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
    names = {image_path(image, config): image.name for image in images}
    targets = {image_path(image, config): feature_path(image, config) for image in images}

    def load_and_note(path):
        pictures[path] = read_state(path)  # before the pixels: a change in between shows in the next run
        return load_image(path)

    with open_journal(folder, network_identity(config)) as journal:
        network = feature_network(config, random_statistics(config), calibration)
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
