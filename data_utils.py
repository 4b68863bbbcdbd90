"""Script 1: find or download captioned images, split them, extract InceptionV3's features, build the vocabulary.

python data_utils.py [--dataset coco|demo|karpathy|table] [--shard I/N] [--<field> VALUE ...]
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import dataclasses
import pathlib
import re

from captioning.data.coco_download import SPLITS as COCO_SPLITS
from captioning.data.coco_download import captions_path
from captioning.data.coco_download import fetch_images
from captioning.data.coco_download import find_annotations
from captioning.data.captioned_images import images_folder
from captioning.data.captioned_images import match_names
from captioning.data.captioned_images import name_features
from captioning.data.captioned_images import names_on_disk
from captioning.data.coco import read_coco_captions
from captioning.data.coco import split_of_file
from captioning.data.folders import read_folder
from captioning.data.karpathy import read_karpathy
from captioning.data.tables import Source
from captioning.data.tables import read_table
from captioning.demo.scenes import draw_demo
from support.devices import set_up_devices
from captioning.features.extraction import cache_features
from captioning.features.extraction import calibration_paths
from captioning.features.missing import find_missing
from captioning.features.cache import feature_stem
from captioning.features.cache import features_folder
from captioning.features.cache import random_statistics
from captioning.features.image_files import set_up_pillow
from captioning.data.prepared_data import retract_prepared
from captioning.data.prepared_data import save_prepared
from captioning.settings import read_settings
from captioning.data.splits import complete_splits
from support.errors import UserError
from support.files import STALE, locked, remove_leftovers
from support.process import run_script

FILE_SETTINGS = ("captions", "validation_captions", "test_captions", "image_column", "caption_column")


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
        readable = [image for image in missing if image.name not in skipped]
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
      dict of "train", "validation" and, where the data have one, "test" to lists of CaptionedImage
    """
    check_files_named(config)
    if config.dataset == "karpathy":
        splits = read_karpathy(config.karpathy_json, config.images, config.max_words)
    elif config.dataset == "table":
        splits = read_tables(config)
    else:
        if config.dataset == "demo":
            prepare_demo(config, shard)
        splits = read_coco(config, shard)
    splits = {split: names_on_disk(images, config) for split, images in splits.items()}
    splits = name_features(splits)
    splits = {split: features_on_disk(images, features_folder(config)) for split, images in splits.items()}
    return complete_splits(splits, config)


def features_on_disk(images, folder):
    """Images whose features, made elsewhere, are named in another spelling of Unicode, get the name that is there."""
    listed, found = {}, []
    for image in images:
        if not (stem := feature_stem(image)).isascii():
            name = match_names(folder, f"{stem}.npy", listed).removesuffix(".npy")
            image = image if name == stem else dataclasses.replace(image, feature_stem=name)
        found.append(image)
    return found


def check_files_named(config):
    """UserError where the settings name captions files that this kind of data set has no use for."""
    used = {"coco": ("validation_captions", "test_captions"), "table": FILE_SETTINGS}.get(config.dataset, ())
    for name in FILE_SETTINGS:
        if getattr(config, name) and name not in used:
            raise UserError(
                f"--{name} does not go with --dataset {config.dataset}: leave it out, or give --dataset table"
            )


def read_coco(config, shard):
    """Read COCO's captions: those of `coco_split` to train on, and those of other files. Returns as `read_splits`."""
    splits = {"train": read_coco_captions(find_annotations(config, shard), config.max_words)}
    for split in ("validation", "test"):
        if not (path := getattr(config, f"{split}_captions")):
            continue
        theirs = split_of_file(path)
        own = dataclasses.replace(config, coco_split=theirs)
        if theirs in COCO_SPLITS and pathlib.Path(path) == captions_path(own):
            find_annotations(own, shard)  # which downloads it if it is missing
        images = read_coco_captions(path, config.max_words, scored=True, remedy=f"name another by --{split}_captions")
        if theirs != config.coco_split and (theirs in COCO_SPLITS or images_folder(own).is_dir()):
            images = [dataclasses.replace(image, coco_split=theirs) for image in images]
        splits[split] = images
    return splits


def read_tables(config):
    """Read the user's own tables, or the captions among the images. Returns as `read_splits`."""
    if not config.images or not pathlib.Path(config.images).is_dir():
        raise UserError(f"{config.images!r} is not a folder: name the one that holds the images by --images")
    columns, splits = (config.image_column, config.caption_column), {}
    if not config.captions:
        splits = read_folder(config.images, columns, config.max_words)
    sources = [Source(config.captions)] if config.captions else []
    sources += [
        Source(path, split) for split in ("validation", "test") if (path := getattr(config, f"{split}_captions"))
    ]
    for source in sources:
        first_id = 1 + max((i.image_id for i in all_images(splits) if isinstance(i.image_id, int)), default=0)
        for split, images in read_table(source, columns, config.max_words, first_id).items():
            splits[split] = splits.get(split, []) + images
    if "train" not in splits:
        source = config.captions or config.images
        raise UserError(f"{source} has no captions of the split train: name those to train on by --captions")
    return splits


def prepare_demo(config, shard):
    """Draw the demo's scenes. Scenes of another seed or number make way, but not for a shard."""
    if shard is None:
        retract_prepared(config)
    with locked(config.coco_dir, "download", shared=shard is not None):
        draw_demo(config.coco_dir, config.demo_images, config.seed, replace=shard is None)


def all_images(splits):
    """The images of all splits, each once."""
    return list({image.name: image for images in splits.values() for image in images}.values())


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
    readable = [image for image in missing if image.name not in skipped]
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
