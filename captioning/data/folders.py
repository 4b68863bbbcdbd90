"""Folders of images with their captions in them: Hugging Face's image folders, and x.txt beside x.jpg.

Hugging Face's have metadata.csv or metadata.jsonl, each with the names of the files below its own folder. The folders
train, validation and test, if there are such, are the splits (huggingface.co/docs/datasets/image_dataset).
"""

import pathlib

from captioning.data.captioned_images import RejectedRecords, find_split
from captioning.data.tables import IMAGE_ENDINGS, Row, Source, make_splits, read_table, read_text
from support.errors import UserError
from support.files import walk_folder

_METADATA = ("metadata.csv", "metadata.jsonl")


def read_folder(folder, columns, max_words):
    """Read the captions in a folder of images. Arguments, result and errors are as in `tables.read_table`."""
    files = _list_files(folder)
    tables = [name for name in files if pathlib.PurePosixPath(name).name in _METADATA]
    if not tables:
        return _read_sidecars(folder, files, max_words)
    splits, first_id = {}, 1
    by_parent = {str(pathlib.PurePosixPath(name).parent).removeprefix("."): name for name in reversed(tables)}
    for parent, name in sorted(by_parent.items()):  # of two in one folder the .csv
        split = find_split(parent.split("/")[0])
        found = read_table(Source(pathlib.Path(folder, name), split, parent), columns, max_words, first_id)
        for split, images in found.items():
            splits.setdefault(split, []).extend(images)
            first_id = max(first_id, *(image.image_id + 1 for image in images))
    return splits


def _list_files(folder):
    """The files below a folder and in linked ones, with slashes, in order of their names. Path -> list of str.

    Raises:
      OSError: it, or a folder in it, cannot be listed. Captions would be missing without a word.
    """
    found = []
    for place, folders, files in walk_folder(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        place = pathlib.Path(place).relative_to(folder)
        found += [(place / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def _raise(error):
    raise error


def _read_sidecars(folder, files, max_words):
    """Read the captions of images that have a .txt file of the same name beside them, one caption a line.

    Arguments and result are as in `read_folder`. `files` is what `_list_files` returned.

    Raises:
      UserError: no image has such a file.
    """
    rejected = RejectedRecords(folder)
    texts = {name[: -len(".txt")]: name for name in files if name.lower().endswith(".txt")}
    rows = []
    for name in files:
        if not name.lower().endswith(IMAGE_ENDINGS):
            continue
        text = texts.get(name.rpartition(".")[0])
        if text is None:
            rejected.add("an image without a .txt file of its name", name)
            continue
        try:
            lines = read_text(pathlib.Path(folder, text)).splitlines()
        except UserError as error:
            rejected.add("a text that cannot be read", str(error))
            continue
        rows += [
            Row(number, name, line, None, f"{text}: {line}") for number, line in enumerate(lines, 1) if line.strip()
        ]
    if not rows:
        raise UserError(
            f"{folder} has no metadata.csv or .jsonl and no image with a .txt file beside it{rejected.main_reason()}: "
            "name the file with the captions by --captions"
        )
    return make_splits(rows, Source(folder), max_words, rejected)
