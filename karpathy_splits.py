"""Karpathy's splits of Flickr8k, Flickr30k and MS-COCO, on which published work compares (arXiv 1412.2306).

dataset_flickr8k.json, dataset_flickr30k.json and dataset_coco.json hold "images": each has filename, split, sentences,
imgid and, for COCO, filepath (train2014 or val2014) and cocoid.
"""

import collections
import pathlib
import re

from command_line import UserError
from files import read_json

SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}  # as in a file, and as returned


def read_karpathy(path, images_dir, max_words, count_words, image_problem):
    """Read one of Karpathy's split files.

    Records that cannot be used (a caption that is empty or longer than `max_words`, another split, a file name with a
    folder in it, a folder outside `images_dir`) are counted, and an example of each kind is printed. An image is at
    images_dir / folder / file_name.

    Args:
      path: path of the JSON file.
      images_dir: folder with the images, for COCO the one that holds train2014 and val2014.
      max_words: int, longest caption to train on, in words.
      count_words, image_problem: those of data_utils, which itself imports this module.

    Returns:
      dict of "train" (restval is a part of it), "val" and "test" to lists of {"image_id", "file_name", "folder", "url",
      "captions", "references"}, ordered by image id (cocoid, or else imgid): as data_utils.read_captions does, and
      "folder", "" for Flickr. Each image of train has at least one caption, each of val and test one reference: those
      whose captions are all too long to train on are scored like the others.

    Raises:
      UserError: images_dir is no folder, or the file is not JSON, has no list of images, or no usable image of a split.
    """
    mend = "give dataset_flickr8k.json, dataset_flickr30k.json or dataset_coco.json by --karpathy_json"
    if not images_dir or not pathlib.Path(images_dir).is_dir():
        raise UserError(f"{str(images_dir)!r} is no folder: name the one that holds the images by --images")
    data = read_json(path, mend)
    if not isinstance(data, dict) or not isinstance(data.get("images"), list):
        raise UserError(f'{path} has not the list "images" of a Karpathy split file: {mend}')

    bad = collections.defaultdict(list)
    images, split_of, stems, sentences = {}, {}, set(), []
    for record in data["images"]:
        problem = record_problem(record) or image_problem(
            {"id": image_id(record), "file_name": record["filename"]}, images, stems
        )
        if problem:
            bad[problem].append(record)
            continue
        stems.add(pathlib.PurePath(record["filename"]).stem)
        image = {
            "image_id": image_id(record),
            "file_name": record["filename"],
            "folder": checked_folder(record.get("filepath")),
            "url": None,
            "captions": [],
            "references": [],
        }
        images[image["image_id"]], split_of[image["image_id"]] = image, SPLITS[record["split"]]
        for sentence in record["sentences"]:
            if isinstance(sentence, dict) and is_text(sentence.get("raw")):
                sentences.append((image, sentence["raw"]))
            else:
                bad["a caption that is no text"].append(sentence)

    for (image, caption), words in zip(sentences, count_words([caption for _, caption in sentences]), strict=True):
        if words > 0:
            image["references"].append(caption)
        if 0 < words <= max_words:
            image["captions"].append(caption)
        else:
            bad["a caption without words" if words == 0 else f"longer than {max_words} words"].append(caption)

    splits = {"train": [], "val": [], "test": []}
    for number in sorted(images):
        image, split = images[number], split_of[number]
        if image["captions" if split == "train" else "references"]:
            splits[split].append(image)
        else:
            bad["an image without a usable caption"].append(image)
    for problem, examples in bad.items():
        print(f"{path}: {len(examples)} left out, {problem}, such as {repr(examples[0])[:160]}")
    for split, usable in splits.items():
        if not usable:
            raise UserError(f"{path} has no usable image of the split {split}: {mend}")
    return splits


def image_id(record):
    return record.get("cocoid", record.get("imgid"))


def record_problem(record):
    """Why an image record cannot be used, or None; what data_utils.image_problem finds is left to it."""
    if not isinstance(record, dict) or not isinstance(record.get("sentences"), list):
        return "an image without sentences"
    if not isinstance(record.get("split"), str) or record["split"] not in SPLITS:
        return "a split other than train, restval, val and test"
    if not is_text(record.get("filename")) or not record["filename"]:
        return "an image without a file name"
    if checked_folder(record.get("filepath")) is None:
        return "a filepath that leads out of the images' folder"
    return None


def is_text(value):
    """Whether a value is a string that file names and TensorFlow take: no NUL, no half of a surrogate pair."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


def checked_folder(filepath):
    """A filepath as a folder below the images' one, "" for that folder itself, None where it may lead elsewhere."""
    if filepath is None:
        return ""
    if not is_text(filepath) or len(filepath.encode()) > 200:  # file systems take 255 bytes
        return None
    folder = pathlib.PureWindowsPath(filepath)  # it knows both slashes
    if folder.anchor or any(not part.strip(". ") for part in folder.parts):  # Windows takes ".. " for ".."
        return None
    return "/".join(folder.parts)
