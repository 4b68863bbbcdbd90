"""Captioned images, read from COCO's caption files and from Karpathy's split files.

COCO's captions_*.json lists images (id, file_name, coco_url) and annotations (image_id, caption).

Karpathy's dataset_flickr8k.json, dataset_flickr30k.json and dataset_coco.json hold the splits on which published work
compares its scores (arXiv 1412.2306). Each lists images with filename, split, sentences and imgid. COCO's images have
filepath (train2014 or val2014) and cocoid as well.
"""

import collections
import dataclasses
import pathlib
import re
import urllib.parse

from captioning.vocabulary import count_words
from support.errors import UserError
from support.files import read_json

COCO_URL = "http://images.cocodataset.org"  # an image is at <this>/<folder>/<file name>
COCO_FOLDERS = ("train2014", "val2014")
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}  # his names and ours
LONGEST_NAME = 200  # bytes; file systems allow 255, and the names of temporary files are longer

COCO_REMEDY = "put COCO's own file there, or delete it and run python data_utils.py again to download it"
KARPATHY_REMEDY = "give dataset_flickr8k.json, dataset_flickr30k.json or dataset_coco.json by --karpathy_json"


@dataclasses.dataclass(frozen=True)
class CaptionedImage:
    """An image and what people wrote about it.

    Attributes:
      image_id: int, no other image of the data set has it.
      file_name: str, without a folder. Its stem, which no other image has, names the file of the image's features.
      folder: str, the image's folder below the images' folder. "" is the images' folder itself.
      url: str or None, where the image can be downloaded.
      captions: list of str, those to train on.
      references: list of str, all that have a word, for the metrics.
      encoded_captions: list of lists of token ids, one for each of `captions`. Set when the data are prepared.
    """

    image_id: int
    file_name: str
    folder: str = ""
    url: str | None = None
    captions: list[str] = ()
    references: list[str] = ()
    encoded_captions: list[list[int]] = ()


class RejectedRecords:
    """The records of a file that cannot be used: counted by problem, with the first record of each as an example."""

    def __init__(self, path):
        self.path = path
        self.counts = collections.Counter()
        self.examples = {}

    def add(self, problem, record):
        self.counts[problem] += 1
        self.examples.setdefault(problem, record)

    def report(self):
        """Print one line for each problem."""
        for problem, count in self.counts.items():
            print(f"{self.path}: {count} left out: {problem}, such as {repr(self.examples[problem])[:160]}")


def images_folder(config):
    """The folder with the data set's images. Config -> pathlib.Path."""
    if config.dataset == "karpathy":
        return pathlib.Path(config.images)
    return pathlib.Path(config.coco_dir, config.coco_split)


def image_path(image, config):
    """Where an image's file is. CaptionedImage, Config -> pathlib.Path."""
    return images_folder(config) / image.folder / image.file_name


# --- COCO's caption files ---------------------------------------------------------------------------------------


def read_coco_captions(path, max_words):
    """Read a caption file in COCO's layout.

    Records that cannot be used are left out, such as an empty caption or a file name that contains a folder. So are
    captions longer than `max_words`, which remain references. One line for each kind of record left out is printed.

    Args:
      path: path of the JSON file.
      max_words: int, length of the longest caption to train on, in words.

    Returns:
      list of CaptionedImage, by ascending image id. Each has at least one caption to train on.

    Raises:
      UserError: the file is missing, is not JSON or not in COCO's layout, or has captions for fewer than 2 images.
    """
    data = read_json(path, COCO_REMEDY)
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in ("images", "annotations")):
        raise UserError(f'{path} does not have the lists "images" and "annotations" of COCO captions: {COCO_REMEDY}')
    rejected = RejectedRecords(path)
    images = read_coco_images(data["images"], rejected)
    captions = read_coco_annotations(data["annotations"], images, rejected)
    usable = [image for image in add_captions(images, captions, max_words, rejected) if image.captions]
    rejected.report()
    if len(usable) < 2:
        raise UserError(f"{path} has usable captions for {len(usable)} images, but a split needs 2: {COCO_REMEDY}")
    return usable


def read_coco_images(records, rejected):
    """Read the list "images": list of records, RejectedRecords -> dict of image id to CaptionedImage."""
    images, stems = {}, set()
    for record in records:
        image_id, file_name, url = get_fields(record, "id", "file_name", "coco_url")
        if problem := find_image_problem(image_id, file_name, images, stems):
            rejected.add(problem, record)
            continue
        stems.add(pathlib.PurePath(file_name).stem)
        images[image_id] = CaptionedImage(image_id, file_name, url=url if is_text(url) else None)
    return images


def read_coco_annotations(records, images, rejected):
    """Read the list "annotations".

    Args:
      records: list of records.
      images: dict of image id to CaptionedImage, the images that are listed.
      rejected: RejectedRecords.

    Returns:
      list of (image id, caption).
    """
    captions = []
    for record in records:
        image_id, caption = get_fields(record, "image_id", "caption")
        if not is_text(caption):
            rejected.add("a caption that is not text", record)
        elif type(image_id) is not int or image_id not in images:
            rejected.add("a caption of an image that is not listed", record)
        else:
            captions.append((image_id, caption))
    return captions


# --- Karpathy's split files -------------------------------------------------------------------------------------


def read_karpathy(path, folder, max_words):
    """Read one of Karpathy's split files.

    Records that cannot be used are left out, such as an empty caption, or a path that leads out of the images' folder.
    So are captions longer than `max_words`, which remain references. One line for each kind of record left out is
    printed. An image keeps its place in validation and test if all its captions are too long to train on: it is scored
    like the others.

    Args:
      path: path of the JSON file.
      folder: path of the images' folder. For COCO it holds train2014 and val2014.
      max_words: int, length of the longest caption to train on, in words.

    Returns:
      dict of "train" (Karpathy's "restval" is a part of it), "validation" and "test" to lists of CaptionedImage, by
      ascending image id. The image id is cocoid or, where there is none, imgid. Each image of train has at least one
      caption to train on, the others have at least one reference. COCO's images have an address to download from.

    Raises:
      UserError: there is no such folder, or the file is missing, is not JSON or not in Karpathy's layout, or a split
        has no usable image.
    """
    if not folder or not pathlib.Path(folder).is_dir():
        raise UserError(f"{str(folder)!r} is not a folder: name the one that holds the images by --images")
    data = read_json(path, KARPATHY_REMEDY)
    if not isinstance(data, dict) or not isinstance(data.get("images"), list):
        raise UserError(f'{path} does not have the list "images" of a Karpathy split file: {KARPATHY_REMEDY}')
    rejected = RejectedRecords(path)
    images, split_of, captions = read_karpathy_images(data["images"], rejected)
    splits = {"train": [], "validation": [], "test": []}
    for image in add_captions(images, captions, max_words, rejected):
        split = split_of[image.image_id]
        if image.captions if split == "train" else image.references:
            splits[split].append(image)
        else:
            rejected.add("an image without a usable caption", image)
    rejected.report()
    for split, usable in splits.items():
        if not usable:
            raise UserError(f"{path} has no usable image of the split {split}: {KARPATHY_REMEDY}")
    return splits


def read_karpathy_images(records, rejected):
    """Read the list "images".

    Args:
      records: list of records.
      rejected: RejectedRecords.

    Returns:
      (dict of image id to CaptionedImage, dict of image id to split, list of (image id, caption)).
    """
    images, split_of, captions, stems = {}, {}, [], set()
    for record in records:
        image_id, file_name = get_fields(record, "imgid", "filename")
        image_id = record.get("cocoid", image_id) if isinstance(record, dict) else None
        problem = find_karpathy_problem(record) or find_image_problem(image_id, file_name, images, stems)
        if problem:
            rejected.add(problem, record)
            continue
        folder = clean_folder(record.get("filepath"))
        url = f"{COCO_URL}/{folder}/{urllib.parse.quote(file_name)}" if folder in COCO_FOLDERS else None
        stems.add(pathlib.PurePath(file_name).stem)
        images[image_id] = CaptionedImage(image_id, file_name, folder, url)
        split_of[image_id] = KARPATHY_SPLITS[record["split"]]
        for sentence in record["sentences"]:
            (caption,) = get_fields(sentence, "raw")
            if is_text(caption):
                captions.append((image_id, caption))
            else:
                rejected.add("a caption that is not text", sentence)
    return images, split_of, captions


def find_karpathy_problem(record):
    """Say why an image record cannot be used, in what only Karpathy's files have. Any JSON value -> str or None."""
    if not isinstance(record, dict) or not isinstance(record.get("sentences"), list):
        return "an image without sentences"
    if not isinstance(record.get("split"), str) or record["split"] not in KARPATHY_SPLITS:
        return "a split other than train, restval, val and test"
    if clean_folder(record.get("filepath")) is None:
        return "a filepath that leads out of the images' folder"
    return None


# --- Records of both --------------------------------------------------------------------------------------------


def get_fields(record, *names):
    """The record's values of these names. None stands for a missing one, and for all if the record is not a dict."""
    return [record.get(name) if isinstance(record, dict) else None for name in names]


def find_image_problem(image_id, file_name, known_ids=(), known_stems=()):
    """Say why an image cannot be used. The file name may come from anybody, and must not lead to another folder.

    Args:
      image_id, file_name: any JSON values.
      known_ids, known_stems: containers of the image ids and the file names' stems that are in use.

    Returns:
      str, or None if the image can be used.
    """
    if type(image_id) is not int or not isinstance(file_name, str):
        return "an image without an id or a file name"
    if not file_name or not file_name.isprintable():
        return "a file name that is empty or not printable"
    if len(file_name.encode()) > LONGEST_NAME:
        return f"a file name of more than {LONGEST_NAME} bytes"
    paths = pathlib.PurePosixPath(file_name), pathlib.PureWindowsPath(file_name)
    if any(path.name != file_name for path in paths) or file_name.startswith("."):
        return "a file name with a folder in it, or with a dot in front"
    if image_id in known_ids or pathlib.PurePath(file_name).stem in known_stems:
        return "an image whose id or file name another image has"
    return None


def is_text(value):
    """Whether a value is a str that file names and TensorFlow accept: without NUL, without half a surrogate pair."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


def clean_folder(filepath):
    """Write a folder below the images' folder in one way.

    Args:
      filepath: any JSON value. None and "" are the images' folder itself.

    Returns:
      str with single slashes between the folders, or None where the path may lead out of the images' folder.
    """
    if filepath is None:
        return ""
    if not is_text(filepath) or len(filepath.encode()) > LONGEST_NAME:
        return None
    folder = pathlib.PureWindowsPath(filepath)  # a Windows path has both kinds of slashes
    if folder.anchor or any(not part.strip(". ") for part in folder.parts):  # for Windows ".. " is the same as ".."
        return None
    return "/".join(folder.parts)


def add_captions(images, captions, max_words, rejected):
    """Give each image its captions.

    Args:
      images: dict of image id to CaptionedImage.
      captions: list of (image id, caption).
      max_words: int, length of the longest caption to train on, in words.
      rejected: RejectedRecords.

    Returns:
      list of CaptionedImage, by ascending image id. Some may have no caption.
    """
    to_train_on, references = collections.defaultdict(list), collections.defaultdict(list)
    counts = count_words([caption for _, caption in captions])
    for (image_id, caption), num_words in zip(captions, counts, strict=True):
        if num_words > 0:
            references[image_id].append(caption)
        if 0 < num_words <= max_words:
            to_train_on[image_id].append(caption)
        else:
            problem = "a caption without words" if num_words == 0 else f"a caption longer than {max_words} words"
            rejected.add(problem, {"image_id": image_id, "caption": caption})
    return [dataclasses.replace(images[i], captions=to_train_on[i], references=references[i]) for i in sorted(images)]
