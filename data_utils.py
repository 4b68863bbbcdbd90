"""Script 1: find or download captioned images, split them, extract InceptionV3's features, build the vocabulary.

python data_utils.py [--dataset coco|demo|karpathy] [--shard I/N] [--<field> VALUE ...]
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import pathlib
import re

from captioning.caption_files import read_coco_captions, read_karpathy
from captioning.coco_download import fetch_images, find_annotations
from captioning.demo_scenes import draw_demo
from captioning.devices import set_up_devices
from captioning.extraction import cache_features, calibration_paths, find_missing
from captioning.feature_cache import features_folder, random_statistics
from captioning.image_files import set_up_pillow
from captioning.prepared_data import retract_prepared, save_prepared
from captioning.settings import read_settings
from captioning.splits import draw_examples, split_by_image
from support.errors import UserError
from support.files import STALE, locked, remove_leftovers
from support.process import run_script


def main(argv):
    config, options = read_settings(argv, __doc__, add_options)
    set_up_devices()
    set_up_pillow()
    if options.shard:
        with locked(features_folder(config), "features", shared=True):
            extract_shard(*options.shard, config)
        return
    with locked(config.data_dir, "data"), locked(features_folder(config), "features"):
        remove_leftovers(features_folder(config))
        splits = read_splits(config)
        images = all_images(splits)
        missing = find_missing(images, config)
        retract_prepared(config)
        skipped = fetch_images(missing, config, total=len(images))
        readable = [image for image in missing if image.file_name not in skipped]
        skipped |= cache_features(readable, calibration_paths(splits, config), config)
        save_prepared(splits, skipped, config)


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


def read_splits(config, shard=None):
    """Read the captions, draw some of them, and split the images.

    Args:
      config: Config.
      shard: (number, count), or None. A shard deletes nothing that others may use, and downloads to a file of its own.

    Returns:
      dict of "train", "validation" and, for Karpathy's data sets, "test" to lists of CaptionedImage
    """
    if config.dataset == "karpathy":
        splits = read_karpathy(config.karpathy_json, config.images, config.max_words)
        return splits | {"train": draw_examples(splits["train"], config.num_examples, config.seed)}
    if config.dataset == "demo":
        prepare_demo(config, shard)
    images = read_coco_captions(find_annotations(config, shard), config.max_words)
    images = draw_examples(images, config.num_examples, config.seed)
    train, validation = split_by_image(images, config.val_fraction, config.seed)
    return {"train": train, "validation": validation}


def prepare_demo(config, shard):
    """Draw the demo's scenes. Scenes of another seed or number make way, but not for a shard."""
    if shard is None:
        retract_prepared(config)
    with locked(config.coco_dir, "download", shared=shard is not None):
        draw_demo(config.coco_dir, config.demo_images, config.seed, replace=shard is None)


def all_images(splits):
    return [image for images in splits.values() for image in images]


def extract_shard(number, count, config):
    """Fetch and cache the images of one share. Other hosts may add theirs to the same folders at the same time.

    Raises:
      UserError: the shards would hinder each other, or what a run without --shard raises.
    """
    if config.image_source == "zip":
        raise UserError("--shard fetches its own images only: give --image_source each (those at hand are not fetched)")
    remove_leftovers(features_folder(config), STALE)
    splits = read_splits(config, (number, count))
    images = all_images(splits)[number - 1 :: count]
    missing = find_missing(images, config, shared=True)
    calibration = calibration_paths(splits, config)
    check_calibration(calibration, config)
    skipped = fetch_images(missing, config, shared=True, total=len(images))
    readable = [image for image in missing if image.file_name not in skipped]
    skipped |= cache_features(readable, calibration, config, shared=True)
    print(
        f"shard {number} of {count} is done: {len(images) - len(skipped)} images cached, {len(skipped)} skipped; "
        "when all shards are done, run the same command without --shard"
    )


def check_calibration(calibration, config):
    """Raise UserError if random weights need images that are missing. Two hosts must not download the same file."""
    absent = [path for path in calibration if not pathlib.Path(path).is_file()]
    if config.inception_weights == "random" and absent and not random_statistics(config).exists():
        raise UserError(f"{absent[0]} is missing, and random weights need it in every shard: run without --shard")


if __name__ == "__main__":
    run_script(main)
