"""captions.jsonl: one line for each captioned image, written as its batch is done, so that a stopped run goes on.

The file holds the captions of one checkpoint with one set of settings, from any number of calls. made_by.json beside it
names both, and a call with others is refused. So lines of other images stay. A line holds the size and time of its
image's file. An image with others is captioned again, and its new line then takes the place of the old one.
"""

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import pathlib

import numpy as np

from captioning.captioner import sampling_settings
from captioning.decoder.generated_caption import GeneratedCaption
from captioning.inference.own_images import is_address
from support.errors import FileError, UserError, printable
from support.file_states import find_stat
from support.files import read_json, reason_and_remedy, replacing, write_json

# Settings that the captions depend on, besides the model.
_DECODING_SETTINGS = ("beam_width", "length_penalty", "repeat_block", "max_words", "captions_per_image", "sample")
_BEFORE = {"captions_per_image": 1, "sample": "no"}  # in a made_by.json of before there were these settings
_FORMER_SETTINGS = ("attention_map",)  # in a made_by.json of before each line told what its figure draws
_LONGEST_STEM = 120  # bytes of an image's name in that of its figure; file systems allow 255, temporary files need some
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # what begins a cell that spreadsheets compute


@dataclasses.dataclass(frozen=True)
class CaptionRecord:
    """A line of captions.jsonl.

    Attributes:
      image: str, the image as the user knows it: a path or an address.
      caption: str
      log_probability: float, natural, of the whole caption. That of a caption that was drawn is the model's too, at
        temperature 1 and without a nucleus.
      size, modified: bytes of the image's file, and its modification time in nanoseconds.
      image_id: int or str, or None for an image that is not of the data set.
      file: str, the absolute path of the image's file, "" where `image` is that.
      figure: str, the name of its figure in the same folder, "" for none.
      figure_map: str, what the figure draws, as config.attention_map says it; "" in lines of before this was kept.
      words, log_probs, attention_weights, evidence, references: as in GeneratedCaption. None where attention is not
        kept.
      captions: list of dict, where the image has several: all of them, the first one too, each with its `caption` and
        its `log_probability`. Those after the first have words, log_probs, attention_weights and evidence of their own.
    """

    image: str
    caption: str
    log_probability: float
    size: int
    modified: int
    image_id: int | str | None = None
    file: str = ""
    figure: str = ""
    figure_map: str = ""
    words: list[str] | None = None
    log_probs: list[float] | None = None
    attention_weights: list[list[float]] | None = None
    evidence: list[list[float]] | None = None
    references: list[str] | None = None
    captions: list[dict] | None = None

    @property
    def key(self):
        """See `image_key`."""
        return image_key(self.image, self.file or self.image)

    def all_captions(self):
        """The texts of all captions of the image, one or more. list of str."""
        return [each["caption"] for each in self.captions or [vars(self)]]

    def line(self):
        """The record as a line of JSON, without what it does not have."""
        # A caption may be empty, and must be there all the same.
        fields = {name: value for name, value in vars(self).items() if name == "caption" or value not in (None, "")}
        # A file name that is not UTF-8 gets JSON's escape.
        return (json.dumps(fields, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def file_state(path):
    """(bytes, modification time in nanoseconds) of a file, or (0, 0) where it is gone."""
    found = find_stat(path)
    return (found.st_size, found.st_mtime_ns) if found else (0, 0)


def image_key(name, path):
    """What no other image has, from whichever folder it is named: an address, or the absolute path of a file."""
    return name if is_address(name) else os.path.abspath(path)


def make_record(prediction, state, figure="", figure_map="", keep_attention=True):
    """The CaptionRecord of a GeneratedCaption.

    Args:
      state: the `file_state` of the image before it was read, so that a change since then shows in the next run.
      figure, figure_map: str, as in CaptionRecord.
      keep_attention: bool, whether the record keeps the words, their probabilities and the maps.
    """
    file = os.path.abspath(prediction.path)
    size, modified = state
    first, *others = [
        _said(each) | (_attention(each) if keep_attention else {}) for each in (prediction, *prediction.others)
    ]
    return CaptionRecord(
        prediction.name,
        **first,
        size=size,
        modified=modified,
        image_id=prediction.image_id,
        file="" if file == prediction.name else file,
        figure=figure,
        figure_map=figure_map,
        references=list(prediction.references) or None if keep_attention else None,
        captions=[_said(prediction), *others] if others else None,
    )


def _said(prediction):
    return {"caption": prediction.caption, "log_probability": round(prediction.log_probability, 4)}


def _attention(prediction):
    """What a record keeps of a GeneratedCaption's attention, as dict."""
    return {
        "words": prediction.words,
        "log_probs": _rounded(prediction.log_probs, 4),
        "attention_weights": _rounded(prediction.attention_weights, 6),
        "evidence": None if prediction.evidence is None else _rounded(prediction.evidence, 6),
    }


def _rounded(values, decimals):
    return np.asarray(values, np.float64).round(decimals).tolist()


def restore_prediction(record, image=None):
    """The GeneratedCaption of a record that kept its attention.

    Args:
      image: ImageToCaption or None. Its path and references count instead of the record's, as files may move.
    """
    about = {
        "path": image.path if image else pathlib.Path(record.file or record.image),
        "name": record.image,
        "image_id": record.image_id,
        "references": (image.references if image else ()) or record.references or (),
    }
    first, *others = [
        GeneratedCaption(
            **about,
            words=fields["words"],
            log_probs=np.array(fields["log_probs"]),
            attention_weights=np.array(fields["attention_weights"]),
            evidence=None if fields["evidence"] is None else np.array(fields["evidence"]),
        )
        for fields in (vars(record), *(record.captions or ())[1:])
    ]
    return dataclasses.replace(first, others=others)


def describe_maker(config, checkpoint):
    """What all lines of a file depend on, as made_by.json holds it."""
    sampling = sampling_settings(config) if config.sample == "yes" else {}
    return {"checkpoint": checkpoint, **{name: getattr(config, name) for name in _DECODING_SETTINGS}, **sampling}


def _parse_record(line):
    """The CaptionRecord of a line; None for half a line, which a kill leaves, and for one of another program."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        record = CaptionRecord(**json.loads(line))
        texts = record.image, record.caption, record.file, record.figure, *record.all_captions()
        if all(isinstance(text, str) for text in texts):
            return record
    return None


def read_records(path):
    """The CaptionRecords of a captions file, one after the other. Lines that are none are left out."""
    with open(path, "rb") as file:
        yield from filter(None, map(_parse_record, file))


def find_records(path):
    """The records of a captions file with their positions, for read_record: yields (CaptionRecord, int bytes)."""
    place = 0
    with open(path, "rb") as file:
        for line in file:
            if record := _parse_record(line):
                yield record, place
            place += len(line)


def read_record(path, place):
    """The CaptionRecord at a position that `find_records` gave."""
    with open(path, "rb") as file:
        file.seek(place)
        return _parse_record(file.readline())


def figure_name(image):
    """The file name of an image's figure, which no other image's has. image: what has a `path` and a `name` -> str."""
    stem = os.fsencode(image.path.stem)[:_LONGEST_STEM].decode(errors="ignore")
    stem = "".join(letter if letter.isprintable() else "_" for letter in stem)
    digest = hashlib.sha256(os.fsencode(image_key(image.name, image.path))).hexdigest()[:8]
    return f"{stem}_{digest}.png"


def begin_captions(path, maker, anew=False):
    """Make a captions file ready for more lines of the same maker. A half line, which a kill leaves, goes.

    Args:
      path: pathlib.Path of captions.jsonl; it may be missing.
      maker: dict, see `describe_maker`.
      anew: bool, delete the lines that are there, and the figures that they name.

    Raises:
      UserError: the lines that are there have another maker, or an unknown one. They stay.
    """
    note = path.with_name("made_by.json")
    if path.exists() and not anew:
        keep_latest(path)
    if anew or not path.exists() or not path.stat().st_size:
        figures = {record.figure for record in read_records(path)} if path.exists() else set()
        with replacing(path) as temporary:
            temporary.touch()
        _delete_figures(figures, path.parent)
        write_json(note, maker)
        return
    choices = "name another folder behind --output, or give --anew, which deletes the captions that are there"
    try:
        before = _BEFORE | read_json(note, dict)
    except FileError as error:
        raise UserError(f"it is not known what made the captions in {path}: {error}: {choices}") from None
    before = {name: value for name, value in before.items() if name not in _FORMER_SETTINGS}
    if differing := [name for name in {**maker, **before} if before.get(name) != maker.get(name)]:
        of_both = [name for name in differing if name in before and name in maker]  # temperature is none of greedy's
        changes = ", ".join(f"{name} {before.get(name)}, not {maker.get(name)}" for name in of_both or differing)
        raise UserError(f"the captions in {path} were made with {changes}: {choices}")


def keep_latest(path):
    """Rewrite a captions file so that it holds the last line of each image and nothing else.

    Figures that no line names any more are deleted.
    """
    last = {record.key: place for record, place in find_records(path)}
    kept, gone = set(), set()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for record, place in find_records(path):
            if last[record.key] == place:
                file.write(record.line())
                kept.add(record.figure)
            else:
                gone.add(record.figure)
    _delete_figures(gone - kept, path.parent)


def _delete_figures(names, folder):
    for name in names - {""}:
        with contextlib.suppress(OSError, ValueError):  # it is gone, or another program has it open
            (folder / pathlib.PurePath(name).name).unlink()


def find_finished(path, images, num_figures, all_attention, figure_map):
    """Which images need no caption any more, by a captions file.

    An image is finished if its file has not changed, and if its figure and its attention are there where they are
    wanted. A figure that draws another map is drawn anew.

    Args:
      path: pathlib.Path of captions.jsonl.
      images: list of ImageToCaption.
      num_figures: int, how many of the images, the first ones, get a figure.
      all_attention: bool, whether the attention of the others is kept too.
      figure_map: str, what figures draw, as config.attention_map says it.

    Returns:
      set of the keys of finished images, see `image_key`
    """
    positions = {image_key(image.name, image.path): number for number, image in enumerate(images)}
    finished = set()
    for record in read_records(path):
        number = positions.get(record.key)
        if number is None:
            continue
        drawn = number < num_figures
        wanted_map = figure_map if drawn else ""
        if _is_finished(record, images[number], path.parent, wanted_map, drawn or all_attention):
            finished.add(record.key)
    return finished


def _is_finished(record, image, folder, figure_map, with_attention):
    """Whether a record holds what is wanted of an image, and the image is still the same file.

    Args:
      figure_map: str, what the image's figure is to draw; "" where none is wanted.
      with_attention: bool, whether both maps are to be there.
    """
    if with_attention and (record.attention_weights is None or record.evidence is None):
        return False
    if figure_map and record.figure_map != figure_map:
        return False
    if (figure_map or record.figure) and not (record.figure and (folder / record.figure).exists()):
        return False
    return file_state(image.path) == (record.size, record.modified)


@contextlib.contextmanager
def appending(path):
    """Give a function that adds a CaptionRecord to a captions file at once, so that a kill cannot lose them.

    Raises:
      UserError: the disk is full or the file cannot be written; the lines before are kept.
    """
    with _naming_file(path):
        file = open(path, "ab", buffering=0)  # without a buffer, closing the file writes nothing and cannot fail

    def add(record):
        data = memoryview(record.line())
        with _naming_file(path):
            while data:
                data = data[file.write(data) :]

    with file:
        yield add


@contextlib.contextmanager
def _naming_file(path):
    """Turn an error in writing the file `path` into a UserError. Other errors while it is open are not about it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason_and_remedy(error, path.parent)}") from error


def write_results(path, images, records_path):
    """Write the captions of some images in COCO's results format, and print how many it holds.

    [{"image_id": ..., "caption": ...}] is what pycocoevalcap and evaluation servers take. An image has the id of its
    annotation file, or else its name.

    Args:
      images: list of ImageToCaption. Those without a line in the captions file are left out.
      records_path: pathlib.Path of captions.jsonl.
    """
    captions = {record.key: record.caption for record in read_records(records_path)}
    results = [
        {"image_id": image.name if image.image_id is None else image.image_id, "caption": captions[key]}
        for image in images
        if (key := image_key(image.name, image.path)) in captions
    ]
    write_json(path, results)
    print(f"{len(results)} captions are in {printable(path)}, in COCO's results format")


def write_table(path, records_path):
    """Write image and caption as a CSV file, for people with a spreadsheet: a row for each caption of each record.

    A cell that a spreadsheet would compute gets an apostrophe before it, and all are quoted, as OWASP advises against
    CSV injection.
    """
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8-sig", errors="replace") as file:
        table = csv.writer(file, quoting=csv.QUOTE_ALL)
        table.writerow(("image", "caption"))
        for record in read_records(records_path):
            for row in ((record.image, caption) for caption in record.all_captions()):
                table.writerow(f"'{cell}" if cell.startswith(_FORMULA) else cell for cell in row)
