"""Captioned images, and what the readers of all kinds of caption files share.

The files come from anybody. A record that cannot be used is left out and counted, and no name leads out of the images'
folder.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
import unicodedata

from captioning.words import split_words
from support.errors import UserError

_LONGEST_NAME = 200  # bytes; file systems allow 255, and the names of temporary files are longer
_MISSING = ("nan", "NaN", "NAN", "null", "NULL", "None", "<NA>")  # what programs write for a missing text
_LONGEST_CAPTION = 10_000  # letters; a longer one is no caption but a damaged file
# What people call the splits, and what they are called here. Karpathy's restval is used for training.
_SPLITS = {"train": "train", "training": "train", "restval": "train"}
_SPLITS |= dict.fromkeys(("validation", "val", "valid", "dev"), "validation") | {"test": "test", "testing": "test"}


@dataclasses.dataclass(frozen=True)
class CaptionedImage:
    """An image and what people wrote about it.

    Attributes:
      image_id: int or str, as the captions file has it. No other image of its split has it.
      file_name: str, without a folder.
      folder: str, the image's folder below the images' folder. "" is the images' folder itself.
      url: str or None, where the image can be downloaded.
      captions: list of str, those to train on.
      references: list of str, all that have a word, for the metrics.
      encoded_captions: list of lists of token ids, one for each of `captions`. Set when the data are prepared.
      coco_split: str, the COCO split whose folder holds the image, or "" for the one that the settings name.
      feature_stem: str, the name of the file of the image's features, or "" for the stem of `file_name`.
    """

    image_id: int | str
    file_name: str
    folder: str = ""
    url: str | None = None
    captions: list[str] = ()
    references: list[str] = ()
    encoded_captions: list[list[int]] = ()
    coco_split: str = ""
    feature_stem: str = ""

    @property
    def name(self):
        """What no other image has: folders and file name."""
        return "/".join(filter(None, (self.coco_split, self.folder, self.file_name)))


class RejectedRecords:
    """The records of a file that cannot be used: counted by problem, with the first record of each as an example."""

    def __init__(self, path):
        self.path = path
        self.counts = collections.Counter()
        self.examples = {}

    def add(self, problem, record, line=None):
        self.counts[problem] += 1
        self.examples.setdefault(problem, (record, line))

    def describe(self, problem):
        """A problem and its example, with the number of its line where the file has lines."""
        record, line = self.examples[problem]
        try:
            text = repr(record)[:160]
        except RecursionError:
            text = f"a deeply nested {type(record).__name__}"
        return f"{problem}, such as {f'line {line}: ' if line else ''}{text}"

    def report(self):
        """Print one line for each problem."""
        for problem, count in self.counts.items():
            print(f"{self.path}: {count} left out: {self.describe(problem)}")

    def main_reason(self):
        """The most frequent problem in brackets, for the error where nothing can be used; "" where nothing was left."""
        for problem, count in self.counts.most_common(1):
            return f" ({count} left out: {self.describe(problem)})"
        return ""


# --- Where images are -------------------------------------------------------------------------------------------


def images_folder(config):
    """The folder with the data set's images. Config -> pathlib.Path."""
    if config.dataset in ("karpathy", "table"):
        return pathlib.Path(config.images)
    return pathlib.Path(config.coco_dir, config.coco_split)


def image_path(image, config):
    """Where an image's file is. CaptionedImage, Config -> pathlib.Path."""
    root = pathlib.Path(config.coco_dir, image.coco_split) if image.coco_split else images_folder(config)
    return root / image.folder / image.file_name


def names_on_disk(images, config):
    """Images with folder and file name as they are on disk.

    Unicode writes a letter such as é in several ways (NFC, NFD), and some systems and programs change one into the
    other. A name that is not on disk is taken for the one there that only differs in this.
    """
    listed, found = {}, []
    for image in images:
        if not image.name.isascii() and not (path := image_path(image, config)).is_file():
            root = path.parents[len(pathlib.PurePosixPath(image.folder).parts)]
            folder, _, file_name = match_names(root, f"{image.folder}/{image.file_name}", listed).rpartition("/")
            image = dataclasses.replace(image, folder=folder, file_name=file_name)
        found.append(image)
    return found


def match_names(root, name, listed):
    """A path below `root` in the spelling of the disk. `listed` keeps what folders hold, from one call to the next."""
    parts = []
    for part in filter(None, name.split("/")):
        folder = pathlib.Path(root, *parts)
        if folder not in listed:
            listed[folder] = {}
            with contextlib.suppress(OSError):  # what cannot be listed is missing, which is told later
                listed[folder] = {unicodedata.normalize("NFC", each): each for each in os.listdir(folder)}
        parts.append(listed[folder].get(unicodedata.normalize("NFC", part), part))
    return "/".join(parts)


def name_features(splits):
    """Name the files of features so that no two images share one.

    An image whose stem no other has keeps it, so that features made elsewhere are found. Stems that differ in upper and
    lower case alone are the same, as they are on some file systems. The others get a digest of folder and file name.

    dict of split to list of CaptionedImage -> the same with `feature_stem` set where it must be
    """
    owners = collections.defaultdict(set)
    for image in itertools.chain(*splits.values()):
        owners[_comparable_stem(image)].add(image.name)

    def named(image):
        if len(owners[_comparable_stem(image)]) == 1:
            return image
        digest = hashlib.sha256(image.name.encode()).hexdigest()[:16]
        return dataclasses.replace(image, feature_stem=f"{pathlib.PurePath(image.file_name).stem}-{digest}")

    return {split: [named(image) for image in images] for split, images in splits.items()}


def _comparable_stem(image):
    return unicodedata.normalize("NFC", pathlib.PurePath(image.file_name).stem).casefold()


# --- Values of records ------------------------------------------------------------------------------------------


def get_fields(record, *names):
    """The record's values of these names. None stands for a missing one, and for all if the record is not a dict."""
    return [record.get(name) if isinstance(record, dict) else None for name in names]


def find_split(value):
    """The split that a word of a file, or a folder's name, stands for. Any JSON value -> str, or None for no split."""
    return _SPLITS.get(value.strip().lower()) if isinstance(value, str) else None


def is_text(value):
    """Whether a value is a str that file names and TensorFlow accept: without NUL, without half a surrogate pair."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


def clean_id(value):
    """The id of an image in one form, or None where a value is no id.

    Whole numbers and texts stay what they are, as results files must have the ids of the captions file. 1.0 and "1.0",
    as programs for tables write whole numbers, become 1. Two ids are the same if `str` of them is.
    """
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,15}\.0+", value):
        value = float(value)
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    is_id = type(value) is int or (is_text(value) and 0 < len(value) <= _LONGEST_NAME)
    return value if is_id else None


def id_order(image_id):
    """What ids are sorted by: numbers before texts."""
    return isinstance(image_id, str), image_id


def split_file_name(value):
    """Take a file name apart, which may have folders in it, with slashes of both kinds.

    Any JSON value -> (folder below the images' folder, file name without a folder), or (None, why it cannot be used).
    """
    if not isinstance(value, str):
        return None, "an image without a file name"
    folder, slash, file_name = re.fullmatch(r"(?s)(?:(.*)([/\\]))?(.*)", value).groups()
    if problem := find_name_problem(file_name):
        return None, problem
    if "://" in value:
        return None, "an address in the place of a file name"
    folder = clean_folder(folder or slash)
    return (None, "a file name that leads out of the images' folder") if folder is None else (folder, file_name)


def find_name_problem(file_name):
    """Say why a file name without a folder cannot be used. Any JSON value -> str or None."""
    if not isinstance(file_name, str):
        return "an image without a file name"
    if not file_name or _has_controls(file_name):
        return "a file name that is empty or not printable"
    if len(file_name.encode()) > _LONGEST_NAME:
        return f"a file name of more than {_LONGEST_NAME} bytes"
    if re.search(r"[/\\]", file_name) or file_name[1:2] == ":":  # a: is a drive of Windows
        return "a file name that leads out of the images' folder"
    if file_name.startswith("."):
        return "a file name with a dot in front"
    return None


def _has_controls(name):
    """Whether a name holds line breaks, other controls or half a surrogate pair. All visible letters are good."""
    return not name.isprintable() and any(unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") for each in name)


def clean_folder(filepath):
    """Write a folder below the images' folder with single slashes. None and "" are the images' folder itself.

    Any JSON value -> str, or None where the path may lead out of the images' folder.
    """
    if filepath is None:
        return ""
    if not is_text(filepath) or len(filepath.encode()) > _LONGEST_NAME:
        return None
    folder = pathlib.PureWindowsPath(filepath)  # a Windows path has both kinds of slashes
    leads_out = any(not part.strip(". ") for part in folder.parts)  # for Windows ".. " is the same as ".."
    if folder.anchor or leads_out or _has_controls(filepath):
        return None
    return "/".join(folder.parts)


def find_caption_problem(caption):
    """Say why a caption cannot be used, whatever its words. Any JSON value -> str or None."""
    if not is_text(caption):
        return "a caption that is not text"
    if caption.strip() in _MISSING:
        return "a caption that is missing (nan, null or None)"
    if len(caption) > _LONGEST_CAPTION:
        return f"a caption of more than {_LONGEST_CAPTION:,} letters"
    return None


# --- Captions of images -----------------------------------------------------------------------------------------


def add_captions(images, captions, max_words, rejected):
    """Give each image its captions. Line breaks in them become blanks.

    Args:
      images: list of CaptionedImage.
      captions: list of (image id, caption, number of its line or None).
      max_words: int, length of the longest caption to train on, in words.

    Returns:
      list of CaptionedImage, by ascending image id. Some may have no caption.
    """
    to_train_on, references = collections.defaultdict(list), collections.defaultdict(list)
    for image_id, text, line in captions:
        caption = " ".join(text.splitlines())
        num_words = len(split_words(caption))
        if num_words > 0:
            references[image_id].append(caption)
        if 0 < num_words <= max_words:
            to_train_on[image_id].append(caption)
        else:
            problem = "a caption without words" if num_words == 0 else f"a caption longer than {max_words} words"
            rejected.add(problem, {"image_id": image_id, "caption": caption}, line)
    return [
        dataclasses.replace(image, captions=to_train_on[image.image_id], references=references[image.image_id])
        for image in sorted(images, key=lambda image: id_order(image.image_id))
    ]


def check_validation(images, max_words):
    """Raise UserError if no validation image has a caption that is short enough for the validation loss."""
    if not any(image.captions for image in images):
        raise UserError(
            f"all captions of the {len(images)} validation images are longer than --max_words {max_words}: raise it"
        )
