"""Which images have no features yet, or features that no longer fit."""

import dataclasses
import functools
import pathlib

from tqdm import tqdm

from captioning.data.captioned_images import image_path
from captioning.features.cache import feature_path, feature_stem, features_folder, random_statistics
from captioning.features.cnn import CNNS
from captioning.features.feature_files import check_feature_file, feature_shape
from captioning.features.manifest import (
    MADE_ELSEWHERE,
    Entry,
    Manifest,
    keep_live,
    read_manifest,
    scan_features,
    ways_out,
    write_manifest,
)
from captioning.features.network import network_identity
from support.devices import usable_cores
from support.errors import UserError
from support.file_states import FileState, cancelling_pool, find_stat, renew_states

_UNKNOWN = FileState(-1, -1, -1)  # no file is like that


# --- What is to be extracted ------------------------------------------------------------------------------------


def find_missing(images, config, shared=False):
    """Find the images whose features must be extracted. Reads neither images nor features that have not changed.

    A feature of which the manifest has no line, as after a power cut, is extracted again: nothing tells what made it.

    Args:
      shared: bool, whether other processes may be writing features to the same folder.

    Returns:
      list of CaptionedImage: those without features, with damaged ones, or whose image has changed since

    Raises:
      UserError: the features were made by another network, or elsewhere and are not complete.
    """
    folder = features_folder(config)
    files = scan_features(folder)
    recorded = read_manifest(folder, files)
    manifest = keep_live(folder, files, recorded)
    if files and manifest.network in (None, MADE_ELSEWHERE):
        complete = _check_made_elsewhere(images, manifest, files, config)
        if not shared:
            write_manifest(folder, complete)
        print(f"features: {len(images)} of {len(images)} are in {folder} already, made elsewhere")
        return []

    _check_replaced(images, recorded, manifest, files, config)
    unknown = [feature_path(image, folder) for image in _files_without_line(images, recorded, files)]
    manifest, changed = _check_images(images, manifest, config)
    usable = manifest.entries.keys() - changed
    begun, statistics = network_identity(config), random_statistics(folder)
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
        _update_manifest(manifest, usable, begun, folder)
    missing = [image for image in images if feature_stem(image) not in usable]
    print(f"features: {len(images) - len(missing)} of {len(images)} are in {folder} already")
    if unknown:
        print(f"features without a line in the manifest: {len(unknown)}, such as {unknown[0]}; extracted again")
    if changed:
        print(f"images that have changed since: {len(changed)}; their features are extracted again")
    return missing


def _check_made_elsewhere(images, manifest, files, config):
    """Check features that another program made; new and changed ones are read. Returns a Manifest with a line for each.

    Args:
      manifest: Manifest of the features that are known and unchanged.
      files: dict of stem to os.stat_result, the feature files.

    Raises:
      UserError: a feature is missing or damaged.
    """
    folder, shape, dtype = features_folder(config), CNNS[config.cnn].feature_shape, config.feature_dtype
    known = [feature_path(image, folder) for image in images if feature_stem(image) in manifest.entries]
    if known and feature_shape(known[0]) != shape:  # they were taken for those of another --cnn
        manifest = dataclasses.replace(manifest, entries={})
    new, entries = _files_without_line(images, manifest, files), dict(manifest.entries)
    with cancelling_pool(usable_cores()) as pool:
        check = functools.partial(check_feature_file, shape=shape, dtype=dtype)
        states = pool.map(check, [feature_path(image, folder) for image in new])
        states = tqdm(states, "checking features made elsewhere", total=len(new), unit=" files", disable=not new)
        for image, state in zip(new, states, strict=True):
            if state:
                entries[feature_stem(image)] = Entry(state, None)
    gaps = [image for image in images if feature_stem(image) not in entries]
    if gaps:
        example = _describe_gap(feature_path(gaps[0], folder), shape)
        raise UserError(
            f"{len(gaps)} of {len(images)} features are missing, damaged, not of the shape {shape} of --cnn "
            f"{config.cnn} or too large for --feature_dtype {dtype}, such as {example}. "
            "The features in this folder were made elsewhere, and another network does not fill their gaps: "
            "make these with the program that made the others, or name another --features_dir"
        )
    return Manifest(MADE_ELSEWHERE, entries, manifest.journals)


def _describe_gap(path, shape):
    """A feature file that does not fit: its path and, where that is why, its shape and the networks that have it."""
    found = feature_shape(path)
    if found in (None, shape):
        return path
    fitting = " or ".join(name for name, cnn in CNNS.items() if cnn.feature_shape == found)
    return f"{path} of the shape {found}" + (f", which is that of --cnn {fitting}" if fitting else "")


def _check_replaced(images, recorded, live, files, config):
    """Raise UserError if somebody put other whole features in the place of those that this program wrote.

    Where the image has changed too, they are this program's, and their line was lost.

    Args:
      recorded, live: Manifest of all lines, and of those whose feature files are unchanged.
      files: dict of stem to os.stat_result, the feature files.
    """
    suspects = [image for image in _files_without_line(images, live, files) if feature_stem(image) in recorded.entries]
    _, changed = _check_images(suspects, recorded, config)
    folder = features_folder(config)
    paths = [feature_path(image, folder) for image in suspects if feature_stem(image) not in changed]
    check = functools.partial(check_feature_file, shape=CNNS[config.cnn].feature_shape)
    with cancelling_pool(usable_cores()) as pool:
        foreign = [path for path, state in zip(paths, pool.map(check, paths), strict=True) if state]
    if foreign:
        raise UserError(
            f"{foreign[0]} is not the feature file that python data_utils.py wrote there ({recorded.network}), nor are "
            f"{len(foreign) - 1} others what it wrote. Features made elsewhere need a --features_dir of their own: "
            f"{ways_out(folder)}"
        )


def _files_without_line(images, manifest, files):
    """The images that have a feature file of which the manifest knows nothing."""
    stems = files.keys() - manifest.entries.keys()
    return [image for image in images if feature_stem(image) in stems]


def _check_images(images, manifest, config):
    """Compare the images with those that the features were made from. An image that is gone counts as unchanged.

    Returns:
      (Manifest with the images' present times, set of the stems whose image has changed)
    """
    paths = {stem: image_path(image, config) for image in images if (stem := feature_stem(image)) in manifest.entries}
    stats = {stem: stat for stem, path in paths.items() if (stat := find_stat(path))}
    recorded = [manifest.entries[stem].image or _UNKNOWN for stem in stats]
    renewed = renew_states([paths[stem] for stem in stats], list(stats.values()), recorded)
    entries, changed = dict(manifest.entries), set()
    for stem, state in zip(stats, renewed, strict=True):
        if state:
            entries[stem] = entries[stem]._replace(image=state)
        else:
            changed.add(stem)
    return Manifest(manifest.network, entries, manifest.journals), changed


def _update_manifest(manifest, usable, identity, features_dir):
    """Bring the manifest up to date. If none of the features is usable, the cache begins anew with this network.

    No other process may be writing features.

    Args:
      manifest: Manifest of the features that are known and unchanged.
      usable: set of the stems whose image has not changed either.
      identity: str, `network_identity`; for random weights without their calibration, which is still to come.
    """
    if not usable:
        # The features first: whatever is left if this is interrupted, the next run comes here again.
        for stem in manifest.entries:
            pathlib.Path(features_dir, f"{stem}.npy").unlink(missing_ok=True)
        random_statistics(features_dir).unlink(missing_ok=True)
        manifest = Manifest(identity, {}, manifest.journals)
    write_manifest(features_dir, manifest)
