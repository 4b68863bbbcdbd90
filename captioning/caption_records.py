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
DECODING_SETTINGS = ("beam_width", "length_penalty", "repeat_block", "max_words")


@dataclasses.dataclass(frozen=True)
class CaptionRecord:
    """A line of captions.jsonl.

    Attributes:
      image: str, the picture as the user knows it: a path or an address.
      caption: str
      log_probability: float, natural, of the whole caption.
      size, modified: bytes of the picture's file, and its modification time in nanoseconds.
      image_id: int, or None for a picture that is not of the data set.
      figure: str, the name of its figure in the same folder, "" for none.
      words, log_probs, attention_weights: as in PredictedCaption. None where attention is not kept.
    """

    image: str
    caption: str
    log_probability: float
    size: int
    modified: int
    image_id: int | None = None
    figure: str = ""
    words: list[str] | None = None
    log_probs: list[float] | None = None
    attention_weights: list[list[float]] | None = None

    def line(self):
        """The record as a line of JSON, without what it does not have."""
        fields = {name: value for name, value in vars(self).items() if value not in (None, "")}
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
        log_probs=np.asarray(prediction.log_probs, np.float64).round(4).tolist(),
        attention_weights=np.asarray(prediction.attention_weights, np.float64).round(6).tolist(),
    )


def restore_prediction(record, picture):
    """The PredictedCaption of a record that kept its attention."""
    count = len(record.words)
    return PredictedCaption(
        path=picture.path,
        name=record.image,
        words=record.words,
        log_probs=np.array(record.log_probs),
        attention_weights=np.array(record.attention_weights).reshape(count, -1),
        image_id=record.image_id,
        references=picture.references,
    )


def describe_maker(config, checkpoint):
    """What all lines of a file depend on, as made_by.json holds it."""
    return {"checkpoint": checkpoint, **{name: getattr(config, name) for name in DECODING_SETTINGS}}


def read_records(path):
    """The CaptionRecords of a captions file, one after the other. A line that a kill cut off is left out."""
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError):  # half a line, or one of another program
                yield CaptionRecord(**json.loads(line))


def keep_finished(path, pictures, maker, keeps_attention):
    """Rewrite a captions file so that it holds what an earlier run of the same kind finished, and nothing else.

    A picture is finished if its file has not changed, and if its attention is there where it is to be kept. Figures of
    the lines that go are deleted.

    Args:
      path: pathlib.Path of captions.jsonl; it may be missing.
      pictures: list of Pictures.
      maker: dict, see `describe_maker`.
      keeps_attention: function of a picture's position in the list -> bool.

    Returns:
      set of the names of finished pictures
    """
    positions = {picture.name: number for number, picture in enumerate(pictures)}
    finished, old_figures = set(), set()
    note = path.with_name("made_by.json")
    same_maker = note.exists() and read_json(note, f"delete {note}") == maker
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for record in read_records(path) if path.exists() else ():
            number = positions.get(record.image)
            if same_maker and number is not None and record.image not in finished:
                whole = record.attention_weights is not None or not keeps_attention(number)
                if whole and file_state(pictures[number].path) == (record.size, record.modified):
                    finished.add(record.image)
                    file.write(record.line())
                    continue
            old_figures.add(record.figure)
    write_json(note, maker)
    for name in old_figures - {""}:
        (path.parent / pathlib.PurePath(name).name).unlink(missing_ok=True)
    return finished


@contextlib.contextmanager
def appending(path):
    """Give a function that adds CaptionRecords to a captions file, and sees to it that they are on the disk.

    Raises:
      UserError: the disk is full or the file cannot be written; the lines before are kept.
    """
    try:
        with open(path, "ab") as file:

            def add(records):
                file.write(b"".join(record.line() for record in records))
                file.flush()

            yield add
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason_and_remedy(error, path.parent)}") from error


def write_table(path, records_path):
    """Write picture and caption of each record as a CSV file, for people with a spreadsheet."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors="replace") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption"))
        table.writerows((record.image, record.caption) for record in read_records(records_path))
