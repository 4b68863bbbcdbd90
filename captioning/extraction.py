"""From image files to cached features: which are missing, running the network, and writing what it computes."""

import collections
import contextlib
import functools
import itertools
import pathlib
import tempfile

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
    keep_live,
    merge_journals,
    open_journal,
    read_manifest,
    scan_features,
    ways_out,
    write_manifest,
)
from captioning.file_states import FileState, cancelling_pool, find_stat, read_state, renew_states
from captioning.image_files import load_image
from captioning.inception import extraction_graphs, feature_network, network_identity
from support.errors import UserError
from support.files import TEMPORARY

EXTRACT_WORKERS = 3  # batches at work at a time on a CPU. A thread each reads a batch and then computes it.
UNKNOWN = FileState(-1, -1, -1)  # no file is like that
CALIBRATION_IMAGES = 64  # training images that random weights get their batch-norm statistics from


# --- What is to be extracted ------------------------------------------------------------------------------------


def find_missing(images, config, shared=False):
    """Find the images whose features must be extracted. Reads neither pictures nor features that have not changed.

    A feature of which the manifest has no line, as after a power cut, is extracted again: nothing tells what made it.

    Args:
      images: list of CaptionedImage.
      shared: bool, whether other processes may be writing features to the same folder.

    Returns:
      list of CaptionedImage: those without features, with damaged ones, or whose picture has changed since

    Raises:
      UserError: the features were made by another network, or elsewhere and are not complete.
    """
    folder = features_folder(config)
    check_case(images, folder)
    files = scan_features(folder)
    recorded = read_manifest(folder, files)
    manifest = keep_live(folder, files, recorded)
    if files and manifest.network in (None, MADE_ELSEWHERE):
        complete = check_made_elsewhere(images, manifest, files, config)
        if not shared:
            write_manifest(folder, complete)
        print(f"features: {len(images)} of {len(images)} are in {folder} already, made elsewhere")
        return []

    check_replaced(images, recorded, manifest, files, config)
    unknown = [feature_path(image, config) for image in files_without_line(images, recorded, files)]
    manifest, changed = check_pictures(images, manifest, config)
    usable = manifest.entries.keys() - changed
    begun, statistics = network_identity(config), random_statistics(config)
    identity = network_identity(config, statistics) if statistics.exists() else begun
    is_same = f"{manifest.network} ".startswith(f"{begun} ")  # but for the calibration
    if usable and is_same and config.inception_weights == "random" and not statistics.exists():
        raise UserError(
            f"{statistics} is missing, and without it no other feature can be made by the same network: "
            f"{ways_out(folder)}"
        )
    if manifest.network not in (None, begun, identity) and (usable or shared):
        raise UserError(
            f"the features in {folder} were made by another network ({manifest.network}) than the settings name "
            f"({identity}): {ways_out(folder)}"
        )
    if not shared:
        manifest = settle(manifest, usable, begun, config)
    missing = [image for image in images if feature_stem(image) not in usable]
    print(f"features: {len(images) - len(missing)} of {len(images)} are in {folder} already")
    if unknown:
        print(f"features without a line in the manifest: {len(unknown)}, such as {unknown[0]}; extracted again")
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
        check = functools.partial(check_feature_file, dtype=config.feature_dtype)
        states = pool.map(check, [feature_path(image, config) for image in new])
        states = tqdm(states, "checking features made elsewhere", total=len(new), unit=" files", disable=not new)
        for image, state in zip(new, states, strict=True):
            if state:
                entries[feature_stem(image)] = Entry(state, None)
    gaps = [image for image in images if feature_stem(image) not in entries]
    if gaps:
        raise UserError(
            f"{len(gaps)} of {len(images)} features are missing, damaged or too large for --feature_dtype "
            f"{config.feature_dtype}, such as {feature_path(gaps[0], config)}. "
            "The features in this folder were made elsewhere, and another network does not fill their gaps: "
            "make these with the program that made the others, or name another --features_dir"
        )
    return Manifest(MADE_ELSEWHERE, entries, manifest.journals)


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
      identity: str, `network_identity`, of random weights that without their calibration, which is still to come.

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
