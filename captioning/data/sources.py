"""The captioned images that the settings name, in their splits, whatever the kind of data set."""

import dataclasses
import pathlib

from captioning.data.captioned_images import images_folder, name_features, names_on_disk
from captioning.data.coco import REMEDY, read_coco_captions, split_of_file
from captioning.data.coco_download import COCO_SPLITS, captions_path, find_annotations
from captioning.data.folders import read_folder
from captioning.data.karpathy import read_karpathy
from captioning.data.prepared_data import retract_prepared
from captioning.data.splits import complete_splits
from captioning.data.tables import Source, read_table
from captioning.demo.scenes import draw_demo
from support.errors import UserError, mended_by
from support.files import locked

_TABLE_SETTINGS = ("captions", "validation_captions", "test_captions", "image_column", "caption_column", "images")
_FILE_SETTINGS = {  # of each kind of data set, those that name its files
    "coco": ("validation_captions", "test_captions"),
    "demo": (),
    "karpathy": ("images", "karpathy_json"),
    "table": _TABLE_SETTINGS,
}


def read_splits(config, shard=None):
    """Read the captions, draw some of them, and split the images.

    Args:
      shard: (number, count), or None. A shard deletes nothing that others may use, and downloads to a file of its own.

    Returns:
      dict of "train", "validation" and, where the data have one, "test" to lists of CaptionedImage
    """
    _check_files_named(config)
    if config.dataset == "karpathy":
        splits = read_karpathy(config.karpathy_json, config.images, config.max_words)
    elif config.dataset == "table":
        splits = _read_tables(config)
    else:
        if config.dataset == "demo":
            _prepare_demo(config, shard)
        splits = _read_coco(config, shard)
    splits = {split: names_on_disk(images, config) for split, images in splits.items()}
    return complete_splits(name_features(splits), config)


def _check_files_named(config):
    """UserError where the settings name files that this kind of data set has no use for."""
    for name in (*_TABLE_SETTINGS, "karpathy_json"):
        if getattr(config, name) and name not in _FILE_SETTINGS[config.dataset]:
            fitting = "table" if name in _TABLE_SETTINGS else "karpathy"
            raise UserError(
                f"--{name} does not go with --dataset {config.dataset}: leave it out, or give --dataset {fitting}"
            )


def _read_coco(config, shard):
    """Read COCO's captions: those of `coco_split` to train on, and those of other files. Returns as `read_splits`."""
    path = find_annotations(config, shard)
    with mended_by(REMEDY):
        splits = {"train": read_coco_captions(path, config.max_words)}
    for split in ("validation", "test"):
        if not (path := getattr(config, f"{split}_captions")):
            continue
        theirs = split_of_file(path)
        own = dataclasses.replace(config, coco_split=theirs)
        if theirs in COCO_SPLITS and pathlib.Path(path) == captions_path(own):
            find_annotations(own, shard)  # which downloads it if it is missing
        with mended_by(f"name another by --{split}_captions"):
            images = read_coco_captions(path, config.max_words, scored=True)
        if theirs != config.coco_split and (theirs in COCO_SPLITS or images_folder(own).is_dir()):
            images = [dataclasses.replace(image, coco_split=theirs) for image in images]
        splits[split] = images
    return splits


def _read_tables(config):
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


def _prepare_demo(config, shard):
    """Draw the demo's scenes. Scenes of another seed or number make way, but not for a shard."""
    if shard is None:
        retract_prepared(config.data_dir)
    with locked(config.coco_dir, "download", shared=shard is not None):
        draw_demo(config.coco_dir, config.demo_images, config.seed, replace=shard is None)


def all_images(splits):
    """The images of all splits, each once."""
    return list({image.name: image for images in splits.values() for image in images}.values())
