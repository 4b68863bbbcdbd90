"""Script 1: find or download captioned images, split them, extract a CNN's features, build the vocabulary.

python data_utils.py [--dataset coco|demo|karpathy|table] [--shard I/N] [--<field> VALUE ...]
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import re

from captioning import settings
from captioning.data import prepared_data, sources
from captioning.data.coco_download import fetch_images
from captioning.features import cache, extraction, image_files
from captioning.features.missing import find_missing
from support import devices
from support.errors import UserError
from support.files import STALE, locked, remove_leftovers
from support.process import run_script


def main(argv):
    config, options = settings.read_settings(argv, __doc__, add_options)
    devices.set_up_devices()
    image_files.set_up_pillow()
    features_dir = cache.features_folder(config)
    if options.shard:
        # Shards write features side by side, but not beside a run without --shard, which rewrites the manifest.
        with locked(features_dir, "features", shared=True):
            extract_shard(*options.shard, config)
        return
    # Two processes would each write a manifest, and the later one would forget the features of the first.
    with locked(config.data_dir, "data"), locked(features_dir, "features"):
        remove_leftovers(features_dir)
        splits = read_splits(config)
        images = sources.all_images(splits)
        # Features take hours, and words seconds. So features are kept from run to run, and words are made anew.
        missing = find_missing(images, config)
        # From here on the files do not fit each other. If this stops, the later scripts find nothing prepared.
        prepared_data.retract_prepared(config.data_dir)
        skipped, cut = make_features(missing, splits, len(images), config)
        # An image that cannot be had must not stop all others; skipped.json names it.
        splits = prepared_data.leave_out(splits, skipped, config.max_words)
        # The model subtracts this mean and divides by this deviation, so that nothing depends on the features' scale.
        measured = cache.measure_features(splits["train"], features_dir)
        prepared_data.save_prepared(splits, skipped, *measured, cache.cached_network(features_dir), config, cut)


def read_splits(config, shard=None):
    """Read the captions, draw some of them, and split the images; see `sources.read_splits`."""
    splits = sources.read_splits(config, shard)
    # Features may have been made on a system that writes é in another way: each image gets the name that is on disk.
    folder = cache.features_folder(config)
    return {name: cache.features_on_disk(images, folder) for name, images in splits.items()}


def make_features(missing, splits, total, config, shared=False):
    """Fetch the images that have no features yet, and put them through the CNN.

    Args:
      missing: list of CaptionedImage.
      splits: dict of split to list of CaptionedImage, all that the data set needs.
      total: int, how many images this process needs, those that have features already among them.
      shared: bool, whether other hosts may be working on the same folders.

    Returns:
      (dict of an image's name to why it has no features, int JPEG files that lack their end and are used all the same)
    """
    # First what cannot be had is noted with its reason, and then what cannot be read.
    skipped = fetch_images(missing, config, shared, total)
    readable = [image for image in missing if image.name not in skipped]
    cut = []
    skipped |= extraction.cache_features(readable, extraction.calibration_paths(splits, config), config, shared, cut)
    return skipped, len(cut)


def add_options(parser):
    parser.add_argument(
        "--shard",
        metavar="I/N",
        type=parse_shard,
        help="fetch and extract only the I-th of N shares of the images; when all are done, run without --shard",
    )


def parse_shard(text):
    """Read "I/N", the I-th of N shares, counted from 1. Returns (I, N)."""
    match = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard takes I/N, such as 2/4 for the second of four shares, not {text!r}")
    return int(match[1]), int(match[2])


def extract_shard(number, count, config):
    """Fetch and cache the images of one share. Other hosts may add theirs to the same folders at the same time.

    Raises:
      UserError: the shards would hinder each other, or what a run without --shard raises.
    """
    if config.image_source == "zip":
        raise UserError("--shard fetches its own images only: give --image_source each (those at hand are not fetched)")
    remove_leftovers(cache.features_folder(config), STALE)
    # Every shard reads all captions, and so draws and splits as the others do. Only its images are its own.
    splits = read_splits(config, (number, count))
    images = sources.all_images(splits)[number - 1 :: count]  # every count-th one, so that the shares are of one size
    missing = find_missing(images, config, shared=True)
    check_calibration(splits, config)
    skipped, cut = make_features(missing, splits, len(images), config, shared=True)
    print(
        f"shard {number} of {count} is done: {len(images) - len(skipped)} images cached, {len(skipped)} skipped"
        f"{prepared_data.describe_cut(cut)}; when all shards are done, run the same command without --shard"
    )


def check_calibration(splits, config):
    """Raise UserError if random weights need images that are missing. Two hosts must not download the same file."""
    # Random weights get their batch-norm statistics from these images, and every shard must have the same statistics.
    absent = [path for path in extraction.calibration_paths(splits, config) if not path.is_file()]
    statistics = cache.random_statistics(cache.features_folder(config))
    if config.inception_weights == "random" and absent and not statistics.exists():
        raise UserError(f"{absent[0]} is missing, and random weights need it in every shard: run without --shard")


if __name__ == "__main__":
    run_script(main)
