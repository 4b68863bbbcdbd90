"""Karpathy's split files, and others of their kind.

dataset_flickr8k.json, dataset_flickr30k.json and dataset_coco.json hold the splits on which published work compares its
scores (arXiv 1412.2306). Each lists images with filename, split, sentences and imgid. COCO's images have filepath
(train2014 or val2014) and cocoid as well.
"""

import itertools
import pathlib
import unicodedata
import urllib.parse

from captioning.data.captioned_images import (
    CaptionedImage,
    RejectedRecords,
    add_captions,
    clean_folder,
    clean_id,
    find_caption_problem,
    find_split,
    get_fields,
    split_file_name,
)
from support.errors import FileError, UserError, mended_by
from support.files import read_json

_COCO_URL = "http://images.cocodataset.org"  # an image is at <this>/<folder>/<file name>
_COCO_FOLDERS = ("train2014", "val2014")


@mended_by("give dataset_flickr8k.json, dataset_flickr30k.json, dataset_coco.json or one like them by --karpathy_json")
def read_karpathy(path, folder, max_words):
    """Read one of Karpathy's split files.

    Records that cannot be used are left out, such as an empty caption, or a path that leads out of the images' folder.
    So are captions longer than `max_words`, which remain references. One line for each kind of record left out is
    printed. An image keeps its place in validation and test if all its captions are too long to train on: it is scored
    like the others.

    Args:
      folder: path of the images' folder. For COCO it holds train2014 and val2014.
      max_words: int, length of the longest caption to train on, in words.

    Returns:
      dict of "train" (Karpathy's "restval" is a part of it) and, where the file has them, "validation" and "test" to
      lists of CaptionedImage, by ascending image id. The image id is cocoid or, where there is none, imgid, or a number
      that no other image has. Each image of train has at least one caption to train on, the others have at least one
      reference. COCO's images have an address to download from.

    Raises:
      UserError: there is no such folder, or the file is missing, is not JSON or not in Karpathy's layout, or a split
        that it names has no usable image.
    """
    if not folder or not pathlib.Path(folder).is_dir():
        raise UserError(f"{str(folder)!r} is not a folder: name the one that holds the images by --images")
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("images"), list):
        raise FileError(path, 'does not have the list "images" of a Karpathy split file')
    rejected = RejectedRecords(path)
    images, split_of, captions = _read_karpathy_images(data["images"], rejected)
    named = {split for record in data["images"] if (split := _split_of_record(record))} | {"train"}
    splits = {split: [] for split in ("train", "validation", "test") if split in named}
    for image in add_captions(images, captions, max_words, rejected):
        split = split_of[image.image_id]
        if image.captions if split == "train" else image.references:
            splits[split].append(image)
        else:
            rejected.add("an image without a usable caption", image)
    for split, usable in splits.items():
        if not usable:
            raise FileError(path, f"has no usable image of the split {split}{rejected.main_reason()}")
    rejected.report()
    return splits


def _read_karpathy_images(records, rejected):
    """Read the list "images": list of records, RejectedRecords.

    Returns:
      (list of CaptionedImage, dict of image id to split, list of (image id, caption, None))
    """
    images, split_of, captions, known, names = [], {}, [], set(), set()
    made_ids = itertools.count(_first_free_id(records))
    for record in records:
        problem, folder, file_name = _place_record(record)
        if not problem:
            name = unicodedata.normalize("NFC", f"{folder}/{file_name}")
            image_id = _find_id(record, made_ids)
            if image_id is None:
                problem = "an image without an id or a file name"
            elif str(image_id) in known or name in names:
                problem = "an image whose id or file name another image has"
        if problem:
            rejected.add(problem, record)
            continue
        known.add(str(image_id))
        names.add(name)
        url = f"{_COCO_URL}/{folder}/{urllib.parse.quote(file_name)}" if folder in _COCO_FOLDERS else None
        images.append(CaptionedImage(image_id, file_name, folder, url))
        split_of[image_id] = _split_of_record(record)
        for sentence in record["sentences"]:
            caption = _sentence_text(sentence)
            if caption_problem := find_caption_problem(caption):
                rejected.add(caption_problem, sentence)
            else:
                captions.append((image_id, caption, None))
    return images, split_of, captions


def _find_id(record, made_ids):
    """The id of a record: cocoid, or else imgid, or else a made one. None where it has a value that is no id."""
    cocoid, imgid = get_fields(record, "cocoid", "imgid")
    value = imgid if cocoid is None else cocoid
    return next(made_ids) if value is None else clean_id(value)


def _first_free_id(records):
    """A number above all ids that are numbers."""
    ids = (clean_id(value) for record in records for value in get_fields(record, "cocoid", "imgid"))
    return max((i for i in ids if isinstance(i, int)), default=-1) + 1


def _place_record(record):
    """Where an image record belongs. Any JSON value -> (None or why it cannot be used, folder, file name)."""
    if not isinstance(record, dict) or not isinstance(record.get("sentences"), list):
        return "an image without sentences", None, None
    if not _split_of_record(record):
        return "a split other than train, restval, val and test", None, None
    folder = clean_folder(record.get("filepath"))
    if folder is None:
        return "a filepath that leads out of the images' folder", None, None
    deeper, file_name = split_file_name(record.get("filename"))
    if deeper is None:
        return file_name, None, None
    return None, "/".join(filter(None, (folder, deeper))), file_name


def _split_of_record(record):
    """The split that a record names, or None. Any JSON value -> str or None."""
    return find_split(*get_fields(record, "split"))


def _sentence_text(sentence):
    """The caption of a sentence: raw or, where there is none, its tokens. It may be any JSON value."""
    raw, tokens = get_fields(sentence, "raw", "tokens")
    if raw is None and isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        return " ".join(tokens)
    return raw
