"""captions.jsonl: one line for each captioned picture, written as its batch is done, so that a stopped run goes on.

made_by.json beside it says which model and which settings made the lines. A line tells by size and time whether its
picture has changed since. So the same command captions only what is missing.
"""

import contextlib
import csv
import dataclasses
import json
import os
import pathlib

import numpy as np

from captioning.predictions import PredictedCaption
from support.errors import UserError
from support.files import read_json, reason_and_remedy, replacing, write_json

# Settings that the captions depend on, besides the model.
DECODING_SETTINGS = ("beam_width", "length_penalty", "repeat_block", "max_words", "attention_map")
LONGEST_STEM = 120  # bytes of a picture's name in that of its figure; file systems allow 255, temporary files need some


@dataclasses.dataclass(frozen=True)
class CaptionRecord:
    """A line of captions.jsonl.

    Attributes:
      image: str, the picture as the user knows it: a path or an address.
      caption: str
      log_probability: float, natural, of the whole caption.
      size, modified: bytes of the picture's file, and its modification time in nanoseconds.
      image_id: int or str, or None for a picture that is not of the data set.
      figure: str, the name of its figure in the same folder, "" for none.
      words, log_probs, attention_weights, evidence: as in PredictedCaption. None where attention is not kept.
    """

    image: str
    caption: str
    log_probability: float
    size: int
    modified: int
    image_id: int | str | None = None
    figure: str = ""
    words: list[str] | None = None
    log_probs: list[float] | None = None
    attention_weights: list[list[float]] | None = None
    evidence: list[list[float]] | None = None

    def line(self):
        """The record as a line of JSON, without what it does not have."""
        # A caption may be empty, and must be there all the same.
        fields = {name: value for name, value in vars(self).items() if name == "caption" or value not in (None, "")}
        # A file name that is not UTF-8 gets JSON's escape.
        return (json.dumps(fields, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def file_state(path):
    """(bytes, modification time in nanoseconds) of a file, or (0, 0) where it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def make_record(prediction, figure="", keep_attention=True):
    """The CaptionRecord of a PredictedCaption."""
    record = CaptionRecord(
        prediction.name,
        prediction.caption,
        round(prediction.log_probability, 4),
        *file_state(prediction.path),
        prediction.image_id,
        figure,
    )
    if not keep_attention:
        return record
    return dataclasses.replace(
        record,
        words=prediction.words,
        log_probs=rounded(prediction.log_probs, 4),
        attention_weights=rounded(prediction.attention_weights, 6),
        evidence=None if prediction.evidence is None else rounded(prediction.evidence, 6),
    )


def rounded(values, decimals):
    return np.asarray(values, np.float64).round(decimals).tolist()


def restore_prediction(record, picture):
    """The PredictedCaption of a record that kept its attention."""
    return PredictedCaption(
        path=picture.path,
        name=record.image,
        words=record.words,
        log_probs=np.array(record.log_probs),
        attention_weights=np.array(record.attention_weights),
        image_id=record.image_id,
        references=picture.references,
        evidence=None if record.evidence is None else np.array(record.evidence),
    )


def describe_maker(config, checkpoint):
    """What all lines of a file depend on, as made_by.json holds it."""
    return {"checkpoint": checkpoint, **{name: getattr(config, name) for name in DECODING_SETTINGS}}


def parse_record(line):
    """The CaptionRecord of a line; None for half a line, which a kill leaves, and for one of another program."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        record = CaptionRecord(**json.loads(line))
        if all(isinstance(text, str) for text in (record.image, record.caption, record.figure)):
            return record
    return None


def read_records(path):
    """The CaptionRecords of a captions file, one after the other. Lines that are none are left out."""
    with open(path, "rb") as file:
        yield from filter(None, map(parse_record, file))


def find_records(path, names):
    """Where in a captions file the lines of some pictures are: dict of name to position in bytes, for read_record."""
    places, place = {}, 0
    with open(path, "rb") as file:
        for line in file:
            record = parse_record(line)
            if record and record.image in names:
                places[record.image] = place
            place += len(line)
    return places


def read_record(path, place):
    """The CaptionRecord at a position that `find_records` gave."""
    with open(path, "rb") as file:
        file.seek(place)
        return parse_record(file.readline())


def figure_name(number, picture):
    """The file name of a picture's figure.

    Args:
      number: int, the picture's position among all pictures.
      picture: Picture, or anything that has its `path`.
    """
    stem = os.fsencode(picture.path.stem)[:LONGEST_STEM].decode(errors="ignore")
    return f"{number + 1:03d}_{stem}.png"


def keep_finished(path, pictures, maker, num_figures, all_attention):
    """Rewrite a captions file so that it holds what an earlier run of the same kind finished, and nothing else.

    A picture is finished if its file has not changed, and if its figure and its attention are there where they are
    wanted. Figures of the lines that go are deleted.

    Args:
      path: pathlib.Path of captions.jsonl; it may be missing.
      pictures: list of Pictures.
      maker: dict, see `describe_maker`.
      num_figures: int, how many of the pictures, the first ones, get a figure.
      all_attention: bool, whether the attention of the others is kept too.

    Returns:
      set of the names of finished pictures
    """
    positions = {picture.name: number for number, picture in enumerate(pictures)}
    finished, figures, old_figures = set(), set(), set()
    note = path.with_name("made_by.json")
    same_maker = note.exists() and read_json(note, f"delete {note}") == maker
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for record in read_records(path) if path.exists() else ():
            number = positions.get(record.image)
            same = same_maker and number is not None and record.image not in finished
            if same and is_finished(record, number, pictures[number], path.parent, num_figures, all_attention):
                finished.add(record.image)
                figures.add(record.figure)
                file.write(record.line())
            else:
                old_figures.add(record.figure)
    write_json(note, maker)
    for name in old_figures - figures - {""}:
        with contextlib.suppress(OSError, ValueError):  # it is gone, or another program has it open
            (path.parent / pathlib.PurePath(name).name).unlink()
    return finished


def is_finished(record, number, picture, folder, num_figures, all_attention):
    """Whether a record of the same model holds what is wanted of a picture, and the picture is still the same file."""
    drawn = number < num_figures
    if record.attention_weights is None and (drawn or all_attention):
        return False
    name = figure_name(number, picture)
    has_figure = record.figure == name and (folder / name).exists()
    if not has_figure and (drawn or record.figure):  # other pictures before it give it another name
        return False
    return file_state(picture.path) == (record.size, record.modified)


@contextlib.contextmanager
def appending(path):
    """Give a function that adds a CaptionRecord to a captions file at once, so that a kill cannot lose them.

    Raises:
      UserError: the disk is full or the file cannot be written; the lines before are kept.
    """
    with naming_file(path):
        file = open(path, "ab", buffering=0)  # without a buffer, closing the file writes nothing and cannot fail

    def add(record):
        data = memoryview(record.line())
        with naming_file(path):
            while data:
                data = data[file.write(data) :]

    with file:
        yield add


@contextlib.contextmanager
def naming_file(path):
    """Turn an error in writing the file `path` into a UserError. Other errors while it is open are not about it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason_and_remedy(error, path.parent)}") from error


def write_table(path, records_path):
    """Write picture and caption of each record as a CSV file, for people with a spreadsheet."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors="replace") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption"))
        table.writerows((record.image, record.caption) for record in read_records(records_path))
