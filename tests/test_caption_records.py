import csv
import dataclasses
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np
import pytest

from captioning.caption_records import (
    DECODING_SETTINGS,
    CaptionRecord,
    appending,
    describe_maker,
    figure_name,
    file_state,
    find_records,
    keep_finished,
    make_record,
    read_record,
    read_records,
    restore_prediction,
    write_table,
)
from captioning.predictions import PredictedCaption
from config import Config
from conftest import full_disk
from support.errors import UserError
from support.files import read_json

NOT_UTF8 = os.fsdecode(b"/pictures/caf\xe9.jpg")
MAKER = describe_maker(Config(), "0123")


class Picture(NamedTuple):
    """What these functions need of a Picture."""

    path: pathlib.Path
    name: str
    references: list[str] = ()


def predict(picture, words=("a", "dog"), evidence=False):
    rng = np.random.default_rng(len(words))
    weights = rng.random((len(words), 64)).astype(np.float32)
    return PredictedCaption(
        path=picture.path,
        name=picture.name,
        words=list(words),
        log_probs=-rng.random(len(words) + 1),
        attention_weights=weights,
        evidence=weights[:, ::-1] if evidence else None,
    )


@pytest.fixture
def pictures(tmp_path):
    """Five files of different sizes; the captions are in the folder beside them."""
    (tmp_path / "out").mkdir()
    paths = [tmp_path / f"{name}.jpg" for name in "abcde"]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(100 + number))
    return [Picture(path, str(path)) for path in paths]


def write_finished(pictures, folder, num_figures=2, all_attention=False, maker=MAKER):
    """What a run leaves that captioned all pictures. Returns the path of its captions."""
    path = folder / "captions.jsonl"
    keep_finished(path, [], maker, num_figures, all_attention)
    with appending(path) as add:
        for number, picture in enumerate(pictures):
            figure = figure_name(number, picture) if number < num_figures else ""
            if figure:
                (folder / figure).write_text(picture.name)
            add(make_record(predict(picture), figure, number < num_figures or all_attention))
    return path


def names(path):
    """The pictures' names, without folder and ending, in the order of the lines."""
    return "".join(pathlib.PurePath(record.image).stem for record in read_records(path))


def figures(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def touch(picture, nanoseconds):
    status = os.stat(picture.path)
    os.utime(picture.path, ns=(status.st_atime_ns, status.st_mtime_ns + nanoseconds))


# --- Lines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("a",), ("tüür", "犬", "<unk>", "a\nb")])
@pytest.mark.parametrize("name", ["a.jpg", "http://a/b?c=%20&d", NOT_UTF8, "two\nlines\u2028 and \r a \x85.jpg"])
@pytest.mark.parametrize("evidence", [False, True])
def test_a_record_comes_back_from_its_line(tmp_path, words, name, evidence):
    prediction = dataclasses.replace(predict(Picture(tmp_path / "a.jpg", name), words, evidence), image_id=7)
    record = make_record(prediction, "001_a.png")
    (tmp_path / "captions.jsonl").write_bytes(2 * record.line())
    assert list(read_records(tmp_path / "captions.jsonl")) == [record, record]
    again = restore_prediction(record, Picture(tmp_path / "a.jpg", name, ["a dog"]))
    for field in ("path", "name", "words", "image_id", "caption"):
        assert getattr(again, field) == getattr(prediction, field)
    assert again.references == ["a dog"]
    np.testing.assert_allclose(again.log_probs, prediction.log_probs, atol=1e-4)
    assert len(again.attention_weights) == len(again.shown_maps()) == len(words)
    if words:
        np.testing.assert_allclose(again.attention_weights, prediction.attention_weights, atol=1e-6)
        np.testing.assert_allclose(again.shown_maps(), prediction.shown_maps(), atol=1e-6)


def test_a_line_is_json_in_plain_letters_with_what_there_is(tmp_path):
    path = tmp_path / "Köln.jpg"
    path.write_bytes(bytes(10))
    os.utime(path, ns=(5, 1_234_567_890_123_456_789))
    record = make_record(predict(Picture(path, "Köln.jpg")), keep_attention=False)
    assert b"K\xc3\xb6ln" in record.line()
    assert json.loads(record.line()) == {
        "image": "Köln.jpg",
        "caption": "a dog",
        "log_probability": record.log_probability,
        "size": 10,
        "modified": 1_234_567_890_123_456_789,
    }


def test_a_line_without_attention_is_short(tmp_path):
    name = "photographs of everybody/Pictures/2024-07 Holiday in the mountains/IMG_20240713_183052.jpg"
    words = "a man in a red jacket is standing on top of a snow covered mountain".split()
    prediction = predict(Picture(tmp_path, name), words)
    assert len(make_record(prediction, keep_attention=False).line()) < 300
    with_attention = make_record(prediction).line()
    assert len(with_attention) < 700 * len(words)
    assert b"e-" not in with_attention  # so many digits are noise


def test_a_name_that_is_not_utf8_is_json_all_the_same(tmp_path):
    line = make_record(predict(Picture(tmp_path, NOT_UTF8)), keep_attention=False).line()
    assert line.isascii()
    assert json.loads(line.decode())["image"] == NOT_UTF8


def test_a_file_that_is_gone_has_a_state_that_no_file_has(tmp_path):
    (tmp_path / "empty").touch()
    assert file_state(tmp_path / "gone") == (0, 0) != file_state(tmp_path / "empty")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'["image", "caption"]',
        b"{}",
        b"[" * 100_000,
        b'{"image": "a", "caption": "b", "log_probability": -1, "size": 1, "modified": 2, "more": 3}',
        b'{"image": ["a"], "caption": "b", "log_probability": -1, "size": 1, "modified": 2}',
        b'{"image": "a", "caption": null, "log_probability": -1, "size": 1, "modified": 2}',
        b'{"image": "a", "caption": "b", "log_probability": -1, "size": 1, "modified": 2, "figure": 3}',
        b'{"image": "a", "caption": "b", "log_probability": -1, "words": ["b"], "attention_weights": []}',
        CaptionRecord("a", "b", -1.0, 1, 2).line()[:-3],
    ],
)
def test_a_line_that_is_no_record_is_left_out(tmp_path, line):
    good = CaptionRecord("good", "a dog", -1.5, 1, 2)
    (tmp_path / "captions.jsonl").write_bytes(good.line() + line + b"\n" + good.line() + line)
    assert list(read_records(tmp_path / "captions.jsonl")) == [good, good]


def test_single_records_are_found_among_many(tmp_path):
    path = tmp_path / "captions.jsonl"
    records = [CaptionRecord(name, f"caption of {name}", -1.0, 1, 2) for name in ("ä", "b", NOT_UTF8, "d")]
    path.write_bytes(b"no record\n".join(record.line() for record in records))
    places = find_records(path, {"ä", NOT_UTF8, "d", "gone"})
    assert places.keys() == {"ä", NOT_UTF8, "d"}
    assert {name: read_record(path, place).caption for name, place in places.items()} == {
        name: f"caption of {name}" for name in places
    }


# --- Figures' names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "stem", "name"),
    [
        (0, "a", "001_a.png"),
        (1233, "a.b c", "1234_a.b c.png"),
        (1, os.fsdecode(b"caf\xe9"), "002_caf.png"),
        (1, "x" * 250, f"002_{'x' * 120}.png"),
        (1, "犬" * 80, f"002_{'犬' * 40}.png"),
        (1, "x" + "犬" * 80, f"002_x{'犬' * 39}.png"),
    ],
)
def test_a_figures_name_is_short_and_can_be_written(number, stem, name):
    assert figure_name(number, Picture(pathlib.Path(f"/a/{stem}.jpg"), "")) == name


# --- What an earlier run finished -------------------------------------------------------------------------------


def test_nothing_is_finished_at_first(tmp_path, pictures):
    path = tmp_path / "out" / "captions.jsonl"
    assert keep_finished(path, pictures, MAKER, 2, False) == set()
    assert path.read_bytes() == b""
    assert read_json(path.with_name("made_by.json"), "") == MAKER


def test_all_is_finished_when_nothing_has_changed(tmp_path, pictures):
    path = write_finished(pictures, tmp_path / "out")
    before = path.read_bytes()
    assert keep_finished(path, pictures, MAKER, 2, False) == {picture.name for picture in pictures}
    assert path.read_bytes() == before
    assert figures(path.parent) == ["001_a.png", "002_b.png"]


def test_half_a_line_at_the_end_is_cut_off(tmp_path, pictures):
    path = write_finished(pictures, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-30])
    assert keep_finished(path, pictures, MAKER, 2, False) == {picture.name for picture in pictures[:-1]}
    with appending(path) as add:
        add(make_record(predict(pictures[-1]), keep_attention=False))
    assert names(path) == "abcde"


def change_time(pictures):
    touch(pictures[0], 1)


def change_size(pictures):
    status = os.stat(pictures[0].path)
    pictures[0].path.write_bytes(b"other")
    os.utime(pictures[0].path, ns=(status.st_atime_ns, status.st_mtime_ns))


def delete(pictures):
    pictures[0].path.unlink()


@pytest.mark.parametrize("change", [change_time, change_size, delete])
def test_a_picture_that_has_changed_is_not_finished_and_its_figure_goes(tmp_path, pictures, change):
    path = write_finished(pictures, tmp_path / "out")
    change(pictures)
    assert keep_finished(path, pictures, MAKER, 2, False) == {picture.name for picture in pictures[1:]}
    assert names(path) == "bcde"
    assert figures(path.parent) == ["002_b.png"]


@pytest.mark.parametrize("name", ["checkpoint", *DECODING_SETTINGS])
def test_another_model_or_other_decoding_finishes_nothing(tmp_path, pictures, name):
    assert MAKER.keys() == {"checkpoint", *DECODING_SETTINGS}
    path = write_finished(pictures, tmp_path / "out")
    other = MAKER | {name: 9}
    assert keep_finished(path, pictures, other, 2, False) == set()
    assert path.read_bytes() == b"" and figures(path.parent) == []
    assert read_json(path.with_name("made_by.json"), "") == other


def test_captions_of_which_nobody_knows_who_made_them_are_not_finished(tmp_path, pictures):
    path = write_finished(pictures, tmp_path / "out")
    path.with_name("made_by.json").unlink()
    assert keep_finished(path, pictures, MAKER, 2, False) == set()


def test_a_damaged_note_is_one_line_and_costs_nothing(tmp_path, pictures):
    path = write_finished(pictures, tmp_path / "out")
    before = path.read_bytes()
    path.with_name("made_by.json").write_text("{")
    with pytest.raises(UserError, match="made_by.json cannot be read .*: delete .*made_by.json"):
        keep_finished(path, pictures, MAKER, 2, False)
    assert path.read_bytes() == before and len(figures(path.parent)) == 2


@pytest.mark.parametrize(
    ("had", "wanted", "finished", "left"),
    [  # (number of figures, attention of all)
        ((2, False), (3, False), "abde", ["001_a.png", "002_b.png"]),
        ((2, False), (0, False), "abcde", ["001_a.png", "002_b.png"]),
        ((2, False), (2, True), "ab", ["001_a.png", "002_b.png"]),
        ((0, True), (1, True), "bcde", []),
        ((1, True), (1, False), "abcde", ["001_a.png"]),
    ],
)
def test_a_figure_or_attention_that_is_now_wanted_is_missing(tmp_path, pictures, had, wanted, finished, left):
    path = write_finished(pictures, tmp_path / "out", *had)
    kept = keep_finished(path, pictures, MAKER, *wanted)
    assert kept == {picture.name for picture in pictures if picture.path.stem in finished}
    assert names(path) == finished
    assert figures(path.parent) == left


def test_a_figure_that_is_gone_is_made_again(tmp_path, pictures):
    path = write_finished(pictures, tmp_path / "out")
    (path.parent / "002_b.png").unlink()
    keep_finished(path, pictures, MAKER, 2, False)
    assert names(path) == "acde"


def test_pictures_that_are_not_asked_for_go_with_their_figures(tmp_path, pictures):
    path = write_finished(pictures, tmp_path / "out")
    (path.parent / "003_mine.png").write_text("not of these captions")
    assert keep_finished(path, pictures[:1] + pictures[3:], MAKER, 1, False) == {pictures[i].name for i in (0, 3, 4)}
    assert names(path) == "ade"
    assert figures(path.parent) == ["001_a.png", "003_mine.png"]


@pytest.mark.parametrize("num_figures", [0, 1, 3])
def test_a_figure_is_not_kept_under_a_number_that_another_picture_may_get(tmp_path, pictures, num_figures):
    """Two pictures of one name in two folders: whichever comes first has figure 001."""
    (tmp_path / "deep").mkdir()
    first = Picture(tmp_path / "deep" / "a.jpg", "deep/a.jpg")
    first.path.write_bytes(b"x")
    path = write_finished(pictures, tmp_path / "out", num_figures=1)
    finished = keep_finished(path, [first, *pictures], MAKER, num_figures, False)
    assert pictures[0].name not in finished and first.name not in finished
    assert figures(path.parent) == []


def test_a_picture_has_one_line_whatever_the_file_held(tmp_path, pictures):
    path = write_finished(pictures, tmp_path / "out")
    path.write_bytes(2 * path.read_bytes())
    assert len(keep_finished(path, pictures, MAKER, 2, False)) == 5
    assert names(path) == "abcde"
    assert figures(path.parent) == ["001_a.png", "002_b.png"]


def test_no_figure_outside_of_the_folder_is_deleted(tmp_path, pictures):
    path = tmp_path / "out" / "captions.jsonl"
    target = tmp_path / "target.png"
    target.touch()
    lines = [CaptionRecord(name, "a", -1.0, 1, 2, figure=name) for name in (str(target), "../target.png", "..", "\0")]
    path.write_bytes(b"".join(line.line() for line in lines))
    keep_finished(path, pictures, MAKER, 2, False)
    assert target.exists()


def test_a_full_disk_leaves_the_captions_as_they_were(tmp_path, pictures):
    path = write_finished(pictures, tmp_path / "out")
    before = path.read_bytes()
    with full_disk(200), pytest.raises(UserError, match="cannot write .*captions.jsonl: .* MB free there"):
        keep_finished(path, pictures, MAKER, 2, False)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".tmp*")) and len(figures(path.parent)) == 2


# --- Adding lines -----------------------------------------------------------------------------------------------


def test_a_line_is_in_the_file_as_soon_as_it_is_added(tmp_path, pictures):
    path = tmp_path / "captions.jsonl"
    with appending(path) as add:
        for count, picture in enumerate(pictures, 1):
            add(make_record(predict(picture)))
            assert len(list(read_records(path))) == count


def test_a_full_disk_is_one_line_and_keeps_the_lines_before(tmp_path, pictures):
    path = tmp_path / "captions.jsonl"
    line = make_record(predict(pictures[0]), keep_attention=False)
    with full_disk(3 * len(line.line()) + 20), pytest.raises(UserError) as raised, appending(path) as add:
        for _ in range(9):
            add(line)
    assert str(raised.value).startswith(f"cannot write {path}: ") and "MB free there" in str(raised.value)
    assert len(path.read_bytes()) == 3 * len(line.line()) + 20
    assert list(read_records(path)) == 3 * [line]


def test_a_folder_that_is_no_folder_is_one_line(tmp_path):
    (tmp_path / "captions.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot write .*captions.jsonl"), appending(tmp_path / "captions.jsonl"):
        pass


def test_an_error_that_is_not_the_files_stays_what_it_is(tmp_path):
    with pytest.raises(BrokenPipeError), appending(tmp_path / "captions.jsonl"):
        raise BrokenPipeError("of a program that reads what this one prints")


# --- The table --------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_picture_whatever_its_name(tmp_path):
    rows = [("a,b.jpg", "a dog"), ('"quoted".jpg', ""), ("two\nlines.jpg", "ein Hündchen"), (NOT_UTF8, "犬")]
    path = tmp_path / "captions.jsonl"
    path.write_bytes(b"".join(CaptionRecord(*row, -1.0, 1, 2).line() for row in rows))
    write_table(tmp_path / "captions.csv", path)
    with (tmp_path / "captions.csv").open(newline="", encoding="utf-8") as file:
        header, *written = csv.reader(file)
    assert header == ["image", "caption"]
    assert [tuple(row) for row in written] == [*rows[:3], ("/pictures/caf?.jpg", "犬")]
