"""Tables of captions: CSV and its relatives, and JSON Lines, as people and other programs write them.

A table has a row for each caption or each image: name.jpg,a dog runs. The columns are recognised by their usual names.
Flickr8k's name.jpg#0<tab>a dog runs has no header. A cell may hold a list of captions.
"""

import ast
import codecs
import csv
import dataclasses
import json
import pathlib
import re
import unicodedata
from typing import NamedTuple

from captioning.data.captioned_images import (
    CaptionedImage,
    RejectedRecords,
    add_captions,
    find_caption_problem,
    find_split,
    split_file_name,
)
from captioning.data.coco import captions_of
from support.errors import UserError, mended_by

_DELIMITERS = ("\t", "|", ";", ",")  # the rarest in captions first
_IMAGE_COLUMNS = "image image_name file_name filename filepath path image_path image_file file img".split()
_CAPTION_COLUMNS = "caption captions text comment raw sentence sentences description prompt".split()
IMAGE_ENDINGS = tuple(".jpg .jpeg .png .webp .gif .bmp .tif .tiff .heic .heif .avif .jp2 .jpe .jfif .mpo".split())
# What files of Excel, Parquet, Arrow and gzip, and PDF files, begin with.
_BINARY = b"PK\3\4", b"\xd0\xcf\x11\xe0", b"PAR1", b"ARROW1", b"\x1f\x8b", b"%PDF"
_MOST_LINES = 100  # of a caption in quotes; after as many lines a quote counts as a letter of the caption
_LONGEST_LIST = 1_000_000  # letters of a list in a cell


class Row(NamedTuple):
    """A row of a table. The values are those of a JSON file, or texts.

    Attributes:
      line: int, the number of its line.
      image, captions: the image's file name, and a caption or a list of captions.
      split: the split it names; None where the table has no such column.
      shown: str, the row as an example for messages.
    """

    line: int
    image: object
    captions: object
    split: object
    shown: object


@dataclasses.dataclass(frozen=True)
class Source:
    """A table to read.

    Attributes:
      path: path of the file.
      split: str, the split that all its images belong to, or None.
      folder: str, the folder below the images' folder that its file names begin in.
    """

    path: pathlib.Path
    split: str | None = None
    folder: str = ""


def read_table(source, columns, max_words, first_id=1):
    """Read one table, or a JSON file in COCO's layout.

    Rows that cannot be used are left out. One line for each kind of them is printed.

    Args:
      columns: (name of the column of images, name of the column of captions), "" for the usual names.
      max_words: int, length of the longest caption to train on, in words.
      first_id: int, the id of the first image; the others are numbered from there.

    Returns:
      dict of "train", "validation" and "test", as far as the table has them, to lists of CaptionedImage in the order of
      the table. Each image of train has a caption to train on, the others have a reference.

    Raises:
      UserError: the file is missing or no table, its columns are not known, or a split has no usable row.
    """
    text = read_text(source.path)
    rejected = RejectedRecords(source.path)
    if text.lstrip()[:1] in ("{", "["):
        data = _read_whole_json(source.path, text)
        if isinstance(data, dict) and "images" in data:
            split = source.split or "train"
            with mended_by("give a table, or COCO's captions_*.json"):
                return {split: captions_of(data, source.path, max_words, split != "train")}
        rows = _read_json_rows(source.path, text, _find_records(data, columns), columns, rejected)
    else:
        rows = _read_text_rows(source.path, text, columns, rejected)
    return make_splits(rows, source, max_words, rejected, first_id)


# --- From rows to images ----------------------------------------------------------------------------------------


def make_splits(rows, source, max_words, rejected, first_id=1):
    """The images of rows by split. Arguments and result are as in `read_table`."""
    images, split_of, captions = _collect_images(rows, source, rejected, first_id)
    if not source.split and images and all(split is None for split in split_of.values()):
        by_folder = {image.image_id: find_split(image.folder.split("/")[0]) for image in images}
        # Where a first folder is not named after a split, all images are to train on.
        split_of = by_folder if all(by_folder.values()) else dict.fromkeys(by_folder, "train")
    splits = {split: [] for split in ("train", "validation", "test") if split in split_of.values()}
    for image in add_captions(images, captions, max_words, rejected):
        split = split_of[image.image_id]
        if image.captions if split == "train" else image.references:
            splits[split].append(image)
    empty = [split for split, usable in splits.items() if not usable]
    if empty or not splits:
        of_split = f" of the split {empty[0]}" if empty else ""
        reason = rejected.main_reason() or " (it has no rows)"
        is_long = f": a caption longer than {max_words} words" in reason
        remedy = "raise --max_words" if is_long else "see that it names images and captions"
        raise UserError(f"{source.path} has no usable captions{of_split}{reason}: {remedy}")
    rejected.report()
    return splits


def _collect_images(rows, source, rejected, first_id):
    """Gather the rows of each image.

    Returns:
      (list of CaptionedImage; dict of image id to split, None where the rows name none; list of (image id, caption,
      number of its line))
    """
    images, split_of, captions = {}, {}, {}
    for row in rows:
        folder, file_name = split_file_name(_clean_image_name(row.image))
        split = source.split or find_split(row.split)
        if folder is None:
            rejected.add(file_name, row.shown, row.line)
            continue
        if row.split is not None and split is None:
            rejected.add("a split other than train, validation and test", row.shown, row.line)
            continue
        folder = "/".join(filter(None, (source.folder, folder)))
        name = unicodedata.normalize("NFC", f"{folder}/{file_name}")
        if name not in images:
            images[name] = CaptionedImage(first_id + len(images), file_name, folder)
        image = images[name]
        if split_of.setdefault(image.image_id, split) != split:
            rejected.add("a row of an image that is in another split", row.shown, row.line)
            continue
        for caption in _list_captions(row.captions):
            if problem := find_caption_problem(caption):
                rejected.add(problem, row.shown, row.line)
            elif (image.image_id, caption) in captions:
                rejected.add("a caption that repeats another of the same image", row.shown, row.line)
            else:
                captions[image.image_id, caption] = row.line
    return list(images.values()), split_of, [(*key, line) for key, line in captions.items()]


def _clean_image_name(value):
    """A cell's image without the number of the caption that Flickr8k puts behind it: name.jpg#0."""
    return re.sub(r"(\.\w+)#[0-9]+$", r"\1", value.strip()) if isinstance(value, str) else value


def _list_captions(value):
    """The captions of a cell: a list, a list written as JSON or as Python, or one caption."""
    if isinstance(value, str) and len(value) < _LONGEST_LIST and re.fullmatch(r"(?s)\s*\[\s*[\"'].*\]\s*", value):
        for parse in (json.loads, ast.literal_eval):
            try:
                parsed = parse(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(parsed, list):
                return parsed
    return value if isinstance(value, list) else [value]


# --- Columns ----------------------------------------------------------------------------------------------------


def _find_columns(names, columns):
    """Which of the columns hold images, captions and splits.

    Args:
      names: list of str, the columns there are.
      columns: (name of the images' column, name of the captions' column), "" for the usual names.

    Returns:
      (position of the images, of the captions, of the splits), None for what is not there
    """
    places = {}
    for place, name in enumerate(names):
        places.setdefault(_plain(name), place)
    image_column, caption_column = ([_plain(column)] if column else [] for column in columns)
    groups = (image_column or _IMAGE_COLUMNS, caption_column or _CAPTION_COLUMNS, ["split"])
    return [next((places[name] for name in group if name in places), None) for group in groups]


def _plain(name):
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _check_columns(path, names, columns):
    """What `_find_columns` returns, or UserError where there is no column of images or of captions."""
    found = _find_columns(names, columns)
    wanted = {"images by --image_column": found[0], "captions by --caption_column": found[1]}
    lacking = [what for what, place in wanted.items() if place is None]
    if lacking:
        shown = ", ".join(repr(name[:40]) for name in names[:20]) + (", ..." if len(names) > 20 else "")
        raise UserError(f"{path} has the columns {shown}: name the one that holds the {', the one of '.join(lacking)}")
    return found


# --- JSON -------------------------------------------------------------------------------------------------------


def _read_whole_json(path, text):
    """The value of a file that is one JSON value, or None where it is JSON Lines.

    Raises:
      UserError: it is neither.
    """
    first, *others = text.lstrip().split("\n", 1)
    if others and isinstance(_parse_json(first), dict):
        return None
    data = _parse_json(text)
    if data is None and not any(isinstance(_parse_json(line), dict) for line in _split_lines(text)):
        raise UserError(f"{path} is damaged (it begins like JSON, and is none): write it again, or give another file")
    return data


def _parse_json(text):
    """The value of JSON text, or None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _find_records(data, columns):
    """The list of records of {file name: captions}, or of an object around a list; other JSON values as they are."""
    if not isinstance(data, dict) or not data or None not in _find_columns(data, columns)[:2]:
        return data
    if all(name.lower().endswith(IMAGE_ENDINGS) for name in data):
        names = columns[0] or _IMAGE_COLUMNS[0], columns[1] or _CAPTION_COLUMNS[0]
        return [dict(zip(names, item, strict=True)) for item in data.items()]
    lists = [
        value for value in data.values() if isinstance(value, list) and any(isinstance(each, dict) for each in value)
    ]
    return lists[0] if len(lists) == 1 else data


def _read_json_rows(path, text, data, columns, rejected):
    """Yield the Rows of JSON Lines, or of a list of objects.

    Args:
      data: list of records; or None or a dict, where `text` is JSON Lines.
    """
    if isinstance(data, list):
        records = list(enumerate(data, 1))
    else:
        lines = enumerate(_split_lines(text), 1)
        records = [(number, _parse_json(line)) for number, line in lines if line.strip()]
    names = list(dict.fromkeys(name for _, record in records if isinstance(record, dict) for name in record))
    places = _check_columns(path, names, columns)
    keys = [None if place is None else names[place] for place in places]
    for number, record in records:
        if not isinstance(record, dict):
            rejected.add("what is not a JSON object", record, number)
            continue
        image, captions, split = (record.get(key) for key in keys)
        split = "" if split is None and keys[2] is not None else split
        yield Row(number, image, captions, split, record)


# --- Text -------------------------------------------------------------------------------------------------------


def read_text(path):
    """Read a text file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
      UserError: the file is missing or cannot be read, or is in another encoding; the message names the line.
    """
    remedy = "see that --captions and the other options name the right files"
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from None
    if data.startswith(_BINARY):
        raise UserError(
            f"{path} is no text, but a workbook, an archive or the like: save it as CSV, in Excel as 'CSV UTF-8'"
        )
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    convert = "save it as UTF-8, in Excel as 'CSV UTF-8', or convert it: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
    if b"\0" in data[:2]:
        convert = convert.replace("WINDOWS-1252", "UTF-16")
        raise UserError(f"{path} is UTF-16 without a byte order mark, or no text: {convert}")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line, kind = data[: error.start].count(b"\n") + 1, encoding.upper().removesuffix("-SIG")
        raise UserError(f"line {line} of {path} is no {kind} (byte {data[error.start]:#04x}): {convert}") from None


def _split_lines(text):
    """Lines without their ends. A caption may hold the other characters at which str.splitlines would split."""
    return re.split("\r\n|\n|\r", text)


def _read_text_rows(path, text, columns, rejected):
    """Yield the Rows of a table with a delimiter, with or without a header."""
    lines = _split_lines(text)
    start = next((number for number, line in enumerate(lines) if line.strip()), None)
    if start is None:
        raise UserError(f"{path} is empty: give a file with captions by --captions")
    if mark := re.fullmatch("sep=(.)", lines[start].strip()):  # Excel's own way to name the delimiter
        lines[start], delimiters, start = "", mark[1], start + 1
    else:
        delimiters = _DELIMITERS
    first = lines[start] if start < len(lines) else ""
    delimiter, places, width, has_header = _find_layout(path, first, delimiters, columns)
    image, caption, split = places
    for number, cells, raw in _split_records(lines, start + has_header, delimiter, width, caption):
        if len(cells) <= max(image, caption):
            rejected.add("a row with too few columns", raw, number)
            continue
        named = None
        if split is not None:
            named = cells[split] if split < len(cells) else ""
        yield Row(number, cells[image], cells[caption], named, raw)


def _find_layout(path, first, delimiters, columns):
    """Find out how a table is written, by its first line, the text `first`.

    Args:
      delimiters: the delimiters to try.
      columns: as in `_find_columns`.

    Returns:
      (delimiter, positions of images, captions and splits, number of columns, whether the line is a header)

    Raises:
      UserError: the columns are not known.
    """
    widest = []
    for delimiter in delimiters:
        names = _split_cells(first, delimiter)
        places = _find_columns(names, columns)
        if None not in places[:2]:
            return delimiter, places, len(names), True
        if not any(columns) and len(names) > 1 and _clean_image_name(names[0]).lower().endswith(IMAGE_ENDINGS):
            numbered = len(names) > 2 and names[1].isdecimal()  # as in Flickr30k: name.jpg| 0| caption
            return delimiter, [0, 1 + numbered, None], 2 + numbered, False
        widest = max(widest, names, key=len)
    return _check_columns(path, widest, columns)


def _split_records(lines, start, delimiter, width, caption):
    """Take the lines of a table apart.

    Args:
      start: int, the first line that is a record.
      width: int, the number of columns.
      caption: int, the position of the captions. Surplus delimiters are part of the caption, as in Kaggle's files.

    Yields:
      (number of the first line, list of cells, the text of the record)
    """
    number = start
    while number < len(lines):
        raw, count = _join_quoted(lines, number, delimiter)
        if raw.strip(delimiter + " \t"):
            cells = _split_cells(raw, delimiter)
            end = caption + 1 + max(len(cells) - width, 0)
            if any(cells[width:]):
                cells[caption:end] = [f"{delimiter} ".join(cells[caption:end])]
            yield number + 1, cells, raw
        number += count


def _join_quoted(lines, number, delimiter):
    """The record that begins at a line, and goes on in the next ones inside quotes. Returns (text, number of lines)."""
    first = lines[number]
    if '"' not in first or not _read_csv(first, delimiter)[1]:
        return first, 1
    for count in range(2, min(_MOST_LINES, len(lines) - number) + 1):
        if '"' in lines[number + count - 1]:
            text = "\n".join(lines[number : number + count])
            cells, is_open = _read_csv(text, delimiter)
            if not is_open:
                return (first, 1) if cells is None else (text, count)
    return first, 1


def _read_csv(text, delimiter):
    """Read a record as CSV. Returns (its cells, None where its quotes are not those of CSV; whether a quote is open)"""
    try:
        rows = list(csv.reader([text], delimiter=delimiter, skipinitialspace=True, strict=True))
    except csv.Error as error:
        return None, "unexpected end of data" in str(error)
    return [cell.strip() for cell in rows[0]] if rows else [], False


def _split_cells(text, delimiter):
    """The cells of a record. Where its quotes are not those of CSV, they are letters like others."""
    cells = _read_csv(text, delimiter)[0] if '"' in text else None
    return [cell.strip() for cell in text.split(delimiter)] if cells is None else cells
