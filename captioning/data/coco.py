"""COCO's caption files: captions_*.json lists images (id, file_name, coco_url) and annotations (image_id, caption)."""

import collections
import pathlib
import re
import unicodedata

from captioning.data.captioned_images import (
    CaptionedImage,
    RejectedRecords,
    add_captions,
    clean_id,
    find_caption_problem,
    get_fields,
    id_order,
    is_text,
    split_file_name,
)
from captioning.words import split_words
from support.errors import FileError, UserError, mended_by
from support.files import read_json

REMEDY = "put COCO's own file there, or delete it and run python data_utils.py again to download it"


def read_coco_captions(path, max_words, scored=False):
    """Read a caption file in COCO's layout.

    Records that cannot be used are left out, such as an empty caption or a file name that leads out of the folder. So
    are captions longer than `max_words`, which remain references. One line for each kind of record left out is printed.

    Args:
      max_words: int, length of the longest caption to train on, in words.
      scored: bool, whether the images are to be scored and not trained on. They then need no caption to train on.

    Returns:
      list of CaptionedImage, by ascending image id. Each has at least one caption to train on or, if they are scored,
      at least one reference.

    Raises:
      UserError: the file is missing, is not JSON or not in COCO's layout, or has captions for fewer than 2 images, or
        for none if they are scored.
    """
    return captions_of(read_json(path), path, max_words, scored)


def captions_of(data, path, max_words, scored=False):
    """The CaptionedImages of what a file in COCO's layout holds. The rest is as in `read_coco_captions`."""
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in ("images", "annotations")):
        _check_kind(data, path)
        raise FileError(path, 'does not have the lists "images" and "annotations" of COCO captions')
    rejected = RejectedRecords(path)
    images = _read_coco_images(data["images"], rejected)
    captions = _read_coco_annotations(data["annotations"], images, rejected)
    different = {image.image_id: image for image in images.values()}
    with_captions = add_captions(different.values(), captions, max_words, rejected)
    usable = [image for image in with_captions if (image.references if scored else image.captions)]
    if len(usable) < (1 if scored else 2):
        needed = "one is needed" if scored else "a split needs 2"
        raise FileError(path, f"has usable captions for {len(usable)} images, but {needed}{rejected.main_reason()}")
    rejected.report()
    return usable


def read_image_list(path):
    """The images that a file in COCO's layout lists, with captions or without, such as image_info_test2014.json.

    path -> list of CaptionedImage without captions, by ascending image id

    Raises:
      FileError: the file cannot be read, or lists no image that can be used.
    """
    data, rejected = read_json(path), RejectedRecords(path)
    records = data.get("images") if isinstance(data, dict) else None
    images = _read_coco_images(records, rejected) if isinstance(records, list) else {}
    if not images:
        raise FileError(path, f'does not list "images" as COCO\'s files do{rejected.main_reason()}')
    rejected.report()
    return sorted(images.values(), key=lambda image: id_order(image.image_id))


def _check_kind(data, path):
    """UserError where a file is of a kind that is known, but has no captions as COCO's files have them."""
    images = data.get("images") if isinstance(data, dict) else None
    if not images or not isinstance(images, list) or "annotations" in data:
        return
    if any(isinstance(image, dict) and "sentences" in image for image in images):
        raise UserError(f"{path} is a split file like Karpathy's: give it by --dataset karpathy --karpathy_json")
    raise UserError(
        f"{path} lists images without captions, as COCO's image_info files do, and cannot be trained on or scored: "
        "give a file with captions, such as captions_train2014.json"
    )


def _read_coco_images(records, rejected):
    """Read the list "images": list of records, RejectedRecords -> dict of str of an id to CaptionedImage.

    Records of one file are one image, with the id of the first.
    """
    images, by_name, joined = {}, {}, 0
    for record in records:
        image_id, path, url = get_fields(record, "id", "file_name", "coco_url")
        image_id = clean_id(image_id)
        folder, file_name = split_file_name(path)
        if image_id is None or path is None:
            rejected.add("an image without an id or a file name", record)
        elif folder is None:
            rejected.add(file_name, record)
        else:
            image = CaptionedImage(image_id, file_name, folder, url if is_text(url) else None)
            name = unicodedata.normalize("NFC", image.name)
            first = by_name.get(name, image)
            if images.setdefault(str(image_id), first) is first:
                by_name[name] = first
                joined += first is not image
            else:
                rejected.add("an image whose id another image has", record)
    if joined:
        print(
            f"{rejected.path}: {joined} image records name a file that an earlier one names: their captions are joined"
        )
    return images


def _read_coco_annotations(records, images, rejected):
    """Read the list "annotations". Returns a list of (image id, caption, None).

    Args:
      images: what `_read_coco_images` returned.
    """
    captions = []
    for record in records:
        image_id, caption, *marks = get_fields(record, "image_id", "caption", "is_precanned", "is_rejected")
        image_id = clean_id(image_id)
        image = None if image_id is None else images.get(str(image_id))
        if problem := find_caption_problem(caption):
            rejected.add(problem, record)
        elif image is None:
            rejected.add("a caption of an image that is not listed", record)
        elif any(mark in (True, "true") for mark in marks):
            rejected.add("a caption that is marked is_precanned or is_rejected", record)  # as VizWiz has them
        else:
            captions.append((image.image_id, caption, None))
    return captions


def split_of_file(path):
    """The COCO split that a captions file is of by its name, such as val2017, or ""."""
    match = re.fullmatch(r"captions_(\w+)\.json", pathlib.PurePath(path).name)
    return match[1] if match else ""


_LARGEST_SIDE = 10_000  # pixels; no data set has larger images, and a map of this size still fits in memory


@mended_by("put COCO's own file there, or delete it to evaluate without attention accuracy")
def read_instances(path, image_ids):
    """Read the boxes of objects in COCO's instances_*.json.

    Args:
      image_ids: set of the ids of the images to read.

    Returns:
      (set of category names; dict of image id to (width, height) in pixels; dict of (image id, category name) to list
      of boxes [x, y, w, h] in pixels).

    Raises:
      UserError: the file is missing, damaged or of other images.
    """
    data = read_json(path)
    keys = ("categories", "images", "annotations")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in keys):
        raise FileError(path, 'does not have the lists "categories", "images" and "annotations" of COCO instances')
    rejected = RejectedRecords(path)
    names = _read_categories(data["categories"], rejected)
    known = {str(image_id): image_id for image_id in image_ids}
    sizes = _read_sizes(data["images"], known, rejected)
    if image_ids and not sizes:
        raise FileError(path, f"lists none of the captioned images{rejected.main_reason()}")
    boxes = _read_boxes(data["annotations"], names, known, sizes, rejected)
    rejected.report()
    return set(names.values()), sizes, boxes


def _read_categories(records, rejected):
    """Read the list "categories": list of records, RejectedRecords -> dict of category id to name."""
    names = {}
    for record in records:
        if _has_types(record, id=int, name=str) and split_words(record["name"]):
            names[record["id"]] = " ".join(split_words(record["name"]))
        else:
            rejected.add("a category without id or name", record)
    return names


def _read_sizes(records, known, rejected):
    """Read the list "images". Returns a dict of image id to (width, height) in pixels.

    Args:
      known: dict of str of an id to the id, those of the images to read.
    """
    sizes = {}
    for record in records:
        if not _has_types(record, width=int, height=int) or clean_id(record.get("id")) is None:
            rejected.add("an image without id, width or height", record)
        elif not all(1 <= record[side] <= _LARGEST_SIDE for side in ("width", "height")):
            rejected.add("an image of an impossible size", record)
        elif (image_id := known.get(str(clean_id(record["id"])))) is not None:
            sizes[image_id] = (record["width"], record["height"])
    return sizes


def _read_boxes(records, names, known, sizes, rejected):
    """Read the list "annotations". Crowds are left out: COCO's own evaluation ignores such regions.

    Args:
      names: dict of category id to name.
      known: as in `_read_sizes`.
      sizes: dict of image id to size. Boxes of other images are left out.

    Returns:
      dict of (image id, category name) to list of boxes [x, y, w, h] in pixels
    """
    boxes = collections.defaultdict(list)
    for record in records:
        image_id = clean_id(record.get("image_id")) if isinstance(record, dict) else None
        if image_id is None or not _has_types(record, category_id=int) or not _is_box(record.get("bbox")):
            rejected.add("an annotation without image_id, category_id or a box", record)
        elif record["category_id"] not in names:
            rejected.add("an annotation of a category that is not listed", record)
        elif (image_id := known.get(str(image_id))) in sizes and not record.get("iscrowd"):
            boxes[image_id, names[record["category_id"]]].append(record["bbox"])
    return dict(boxes)


def _has_types(record, **types):
    """Whether a record is a dict with values of exactly these types under these names."""
    return isinstance(record, dict) and all(type(record.get(key)) is kind for key, kind in types.items())


def _is_box(box):
    """Whether a value is a list [x, y, w, h] of finite numbers, with an area above 0."""
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(number) in (int, float) and -1e6 < number < 1e6 for number in box)
        and min(box[2:]) > 0
    )
