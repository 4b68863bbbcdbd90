import codecs
import csv
import dataclasses
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np
import pytest

from captioning.data.tables import Source, read_table
from captioning.decoder.generated_caption import GeneratedCaption
from captioning.inference.captions_file import (
    _DECODING_SETTINGS,
    CaptionRecord,
    appending,
    begin_captions,
    describe_maker,
    figure_name,
    file_state,
    find_finished,
    find_records,
    image_key,
    keep_latest,
    make_record,
    read_record,
    read_records,
    restore_prediction,
    write_table,
)
from config import Config
from conftest import full_disk
from support.errors import UserError
from support.files import read_json

NOT_UTF8 = os.fsdecode(b"/images/caf\xe9.jpg")
MAKER = describe_maker(Config(), "0123")


class ImageToCaption(NamedTuple):
    """What these functions need of a Image."""

    path: pathlib.Path
    name: str
    references: list[str] = ()


def predict(image, words=("a", "dog"), evidence=True):
    rng = np.random.default_rng(len(words))
    weights = rng.random((len(words), 64)).astype(np.float32)
    return GeneratedCaption(
        path=image.path,
        name=image.name,
        words=list(words),
        log_probs=-rng.random(len(words) + 1),
        attention_weights=weights,
        evidence=weights[:, ::-1] if evidence else None,
    )


@pytest.fixture
def images(tmp_path):
    """Five files of different sizes; the captions are in the folder beside them."""
    (tmp_path / "out").mkdir()
    paths = [tmp_path / f"{name}.jpg" for name in "abcde"]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(100 + number))
    return [ImageToCaption(path, str(path)) for path in paths]


def write_finished(images, folder, num_figures=2, all_attention=False, maker=MAKER):
    """What a run leaves that captioned all images. Returns the path of its captions."""
    path = folder / "captions.jsonl"
    begin_captions(path, maker)
    with appending(path) as add:
        for number, image in enumerate(images):
            figure = figure_name(image) if number < num_figures else ""
            if figure:
                (folder / figure).write_text(image.name)
            add(record_of(predict(image), figure, number < num_figures or all_attention))
    return path


def record_of(prediction, figure="", keep_attention=True):
    return make_record(prediction, file_state(prediction.path), figure, "weights" if figure else "", keep_attention)


def names(path):
    """The images' names, without folder and ending, in the order of the lines."""
    return "".join(pathlib.PurePath(record.image).stem for record in read_records(path))


def figures(folder):
    """The figures' names without the digest of the image."""
    return sorted(path.stem.rpartition("_")[0] for path in folder.glob("*.png"))


def finished(path, images, num_figures=2, all_attention=False):
    """The finished images' names, without folder and ending, in order."""
    return "".join(
        sorted(pathlib.PurePath(key).stem for key in find_finished(path, images, num_figures, all_attention, "weights"))
    )


def touch(image, nanoseconds):
    status = os.stat(image.path)
    os.utime(image.path, ns=(status.st_atime_ns, status.st_mtime_ns + nanoseconds))


# --- Lines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("a",), ("tüür", "犬", "<unk>", "a\nb")])
@pytest.mark.parametrize("name", ["a.jpg", "http://a/b?c=%20&d", NOT_UTF8, "two\nlines\u2028 and \r a \x85.jpg"])
@pytest.mark.parametrize("evidence", [False, True])
def test_a_record_comes_back_from_its_line(tmp_path, words, name, evidence):
    prediction = dataclasses.replace(predict(ImageToCaption(tmp_path / "a.jpg", name), words, evidence), image_id=7)
    record = record_of(prediction, "a.png")
    (tmp_path / "captions.jsonl").write_bytes(2 * record.line())
    assert list(read_records(tmp_path / "captions.jsonl")) == [record, record]
    again = restore_prediction(record, ImageToCaption(tmp_path / "a.jpg", name, ["a dog"]))
    for field in ("path", "name", "words", "image_id", "caption"):
        assert getattr(again, field) == getattr(prediction, field)
    assert again.references == ["a dog"]
    assert restore_prediction(record).path == tmp_path / "a.jpg" and restore_prediction(record).references == ()
    np.testing.assert_allclose(again.log_probs, prediction.log_probs, atol=1e-4)
    assert len(again.attention_weights) == len(words)
    assert (again.evidence is None) == (not evidence)
    if words:
        np.testing.assert_allclose(again.attention_weights, prediction.attention_weights, atol=1e-6)
        if evidence:
            np.testing.assert_allclose(again.evidence, prediction.evidence, atol=1e-6)


@pytest.mark.parametrize("keep_attention", [True, False])
def test_several_captions_come_back_from_their_line(tmp_path, keep_attention):
    image = ImageToCaption(tmp_path / "a.jpg", "a.jpg")
    others = [predict(image, words, evidence=True) for words in (("a", "cat", "runs"), (), ("tüür",))]
    prediction = dataclasses.replace(predict(image, evidence=True), others=others)
    record = record_of(prediction, keep_attention=keep_attention)
    (tmp_path / "captions.jsonl").write_bytes(record.line())
    (again,) = read_records(tmp_path / "captions.jsonl")
    assert again == record and again.all_captions() == ["a dog", "a cat runs", "", "tüür"]
    line = json.loads(record.line())
    assert [each["log_probability"] for each in line["captions"]] == [
        round(each.log_probability, 4) for each in (prediction, *others)
    ]
    first = {"caption": line["caption"], "log_probability": line["log_probability"]}
    assert line["captions"][0] == first and first["caption"] == "a dog"
    assert all((each.keys() > first.keys()) == keep_attention for each in line["captions"][1:])
    if keep_attention:
        restored = restore_prediction(again, image)
        for ours, theirs in zip((restored, *restored.others), (prediction, *others), strict=True):
            assert (ours.words, ours.path, ours.name) == (theirs.words, theirs.path, theirs.name)
            np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-4)
            np.testing.assert_allclose(np.ravel(ours.attention_weights), np.ravel(theirs.attention_weights), atol=1e-6)
            np.testing.assert_allclose(np.ravel(ours.evidence), np.ravel(theirs.evidence), atol=1e-6)


def test_a_line_is_json_in_plain_letters_with_what_there_is(tmp_path):
    path = tmp_path / "Köln.jpg"
    path.write_bytes(bytes(10))
    os.utime(path, ns=(5, 1_234_567_890_123_456_789))
    record = record_of(predict(ImageToCaption(path, "Köln.jpg")), keep_attention=False)
    assert b"K\xc3\xb6ln" in record.line()
    assert json.loads(record.line()) == {
        "image": "Köln.jpg",
        "caption": "a dog",
        "log_probability": record.log_probability,
        "size": 10,
        "modified": 1_234_567_890_123_456_789,
        "file": str(path),
    }
    assert "file" not in json.loads(record_of(predict(ImageToCaption(path, str(path)))).line())


def test_a_line_without_attention_is_short(tmp_path):
    name = "/photographs of everybody/Images/2024-07 Holiday in the mountains/IMG_20240713_183052.jpg"
    words = "a man in a red jacket is standing on top of a snow covered mountain".split()
    prediction = predict(ImageToCaption(pathlib.Path(name), name), words)
    assert len(record_of(prediction, keep_attention=False).line()) < 300
    with_attention = record_of(prediction).line()
    assert len(with_attention) < 1400 * len(words)
    assert b"e-" not in with_attention  # so many digits are noise


def test_a_name_that_is_not_utf8_is_json_all_the_same(tmp_path):
    line = record_of(predict(ImageToCaption(tmp_path, NOT_UTF8)), keep_attention=False).line()
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
        b'{"image": "a", "caption": "b", "log_probability": -1, "size": 1, "modified": 2, "captions": 3}',
        b'{"image": "a", "caption": "b", "log_probability": -1, "size": 1, "modified": 2, "captions": [{"a": "b"}]}',
        b'{"image": "a", "caption": "b", "log_probability": 0, "size": 1, "modified": 2, "captions": [{"caption": 1}]}',
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
    found = list(find_records(path))
    assert [record for record, _ in found] == records
    assert [read_record(path, place) for _, place in found] == records


# --- Figures' names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("a", "a"),
        ("a.b c", "a.b c"),
        (os.fsdecode(b"caf\xe9"), "caf"),
        ("x" * 250, "x" * 120),
        ("犬" * 80, "犬" * 40),
        ("x" + "犬" * 80, f"x{'犬' * 39}"),
        ("a\x1b[31m\nb", "a_[31m_b"),
    ],
)
def test_a_figures_name_is_short_and_can_be_written(stem, name):
    image = ImageToCaption(pathlib.Path(f"/a/{stem}.jpg"), f"/a/{stem}.jpg")
    assert figure_name(image).rpartition("_")[0] == name
    assert len(figure_name(image)) == len(name) + len("_01234567.png")


def test_no_two_images_have_one_figure_and_one_image_has_one_however_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = [
        ImageToCaption(pathlib.Path(name), name)
        for name in ("a.jpg", "deep/a.jpg", "a.png", "./a.jpg", "deep/../a.jpg")
    ]
    named.append(ImageToCaption(tmp_path / "a.jpg", str(tmp_path / "a.jpg")))
    web = [ImageToCaption(tmp_path / "downloads" / "a.jpg", f"http://{host}/a.jpg") for host in "ab"]
    assert len({figure_name(image) for image in [*named, *web]}) == 5
    assert {figure_name(named[0])} == {figure_name(image) for image in (named[0], *named[3:])}


# --- What made the captions -------------------------------------------------------------------------------------


def test_a_new_file_is_empty_and_says_who_makes_its_lines(tmp_path):
    path = tmp_path / "out" / "captions.jsonl"
    begin_captions(path, MAKER)
    assert path.read_bytes() == b""
    assert read_json(path.with_name("made_by.json")) == MAKER


def test_the_same_maker_goes_on(tmp_path, images):
    path = write_finished(images, tmp_path / "out")
    before = path.read_bytes()
    begin_captions(path, MAKER)
    assert path.read_bytes() == before and figures(path.parent) == ["a", "b"]
    assert finished(path, images) == "abcde"


@pytest.mark.parametrize("name", ["checkpoint", *_DECODING_SETTINGS])
def test_another_model_or_other_decoding_is_refused_and_costs_nothing(tmp_path, images, name):
    assert MAKER.keys() == {"checkpoint", *_DECODING_SETTINGS}
    path = write_finished(images, tmp_path / "out")
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"made with {name} {MAKER[name]}, not 9: .*--output.* --anew, which deletes"):
        begin_captions(path, MAKER | {name: 9})
    assert path.read_bytes() == before and figures(path.parent) == ["a", "b"]
    assert read_json(path.with_name("made_by.json")) == MAKER


SAMPLING = {"sample": "yes", "captions_per_image": 5, "temperature": 0.8, "sample_seed": 3}


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"captions_per_image": 5}, "made with captions_per_image 1, not 5: "),
        ({}, SAMPLING, "made with captions_per_image 1, not 5, sample no, not yes: "),
        (SAMPLING, SAMPLING | {"temperature": 1.0}, "made with temperature 0.8, not 1.0: "),
        (SAMPLING, SAMPLING | {"top_p": 0.5}, "made with top_p 0.9, not 0.5: "),
        (SAMPLING, SAMPLING | {"sample_seed": 4}, "made with seed 3, not 4: "),
        (SAMPLING, SAMPLING, ""),
        ({}, {"temperature": 0.8, "top_p": 0.5, "sample_seed": 3}, ""),  # nothing is drawn
    ],
)
def test_another_number_of_captions_and_another_way_to_draw_are_refused(tmp_path, images, before, now, message):
    before, now = (describe_maker(dataclasses.replace(Config(), **settings), "0123") for settings in (before, now))
    path = write_finished(images, tmp_path / "out", maker=before)
    if message:
        with pytest.raises(UserError, match=message):
            begin_captions(path, now)
    else:
        begin_captions(path, now)
    assert finished(path, images) == "abcde"


def test_a_folder_of_before_there_were_several_captions_goes_on(tmp_path, images):
    old = {name: value for name, value in MAKER.items() if name not in ("captions_per_image", "sample")}
    path = write_finished(images, tmp_path / "out", maker=old)
    begin_captions(path, MAKER)
    with pytest.raises(UserError, match="captions_per_image 1, not 2"):
        begin_captions(path, MAKER | {"captions_per_image": 2})


@pytest.mark.parametrize("damage", [None, "{", "[]", "{}", '{"checkpoint": "0123"}', "\0"])
def test_a_note_that_is_gone_or_damaged_is_one_line_and_costs_nothing(tmp_path, images, damage):
    path = write_finished(images, tmp_path / "out")
    note, before = path.with_name("made_by.json"), path.read_bytes()
    note.unlink() if damage is None else note.write_text(damage)
    with pytest.raises(UserError, match="--output, or give --anew, which deletes the captions") as raised:
        begin_captions(path, MAKER)
    assert "delete " not in str(raised.value)
    assert path.read_bytes() == before and len(figures(path.parent)) == 2
    begin_captions(path, MAKER, anew=True)
    assert path.read_bytes() == b"" and figures(path.parent) == [] and json.loads(note.read_text()) == MAKER


def test_without_a_line_nothing_is_lost_by_another_maker(tmp_path, images):
    path = write_finished([], tmp_path / "out")
    path.write_bytes(b'{"image": "half a li')
    begin_captions(path, MAKER | {"checkpoint": "another"})
    assert path.read_bytes() == b""
    assert read_json(path.with_name("made_by.json"))["checkpoint"] == "another"


def test_anew_deletes_what_the_lines_name_and_nothing_else(tmp_path, images):
    path = write_finished(images, tmp_path / "out")
    (path.parent / "mine_01234567.png").write_text("not of these captions")
    begin_captions(path, MAKER | {"checkpoint": "another"}, anew=True)
    assert path.read_bytes() == b"" and figures(path.parent) == ["mine"]


# --- What an earlier run finished -------------------------------------------------------------------------------


def test_half_a_line_at_the_end_is_cut_off(tmp_path, images):
    path = write_finished(images, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-30])
    begin_captions(path, MAKER)
    assert finished(path, images) == "abcd"
    with appending(path) as add:
        add(record_of(predict(images[-1]), keep_attention=False))
    assert names(path) == "abcde"


def change_time(images):
    touch(images[0], 1)


def change_size(images):
    status = os.stat(images[0].path)
    images[0].path.write_bytes(b"other")
    os.utime(images[0].path, ns=(status.st_atime_ns, status.st_mtime_ns))


def delete(images):
    images[0].path.unlink()


@pytest.mark.parametrize("change", [change_time, change_size, delete])
def test_an_image_that_has_changed_is_not_finished_and_its_line_stays_until_the_new_one_is_there(
    tmp_path, images, change
):
    path = write_finished(images, tmp_path / "out")
    change(images)
    begin_captions(path, MAKER)
    assert finished(path, images) == "bcde"
    assert names(path) == "abcde" and figures(path.parent) == ["a", "b"]
    with appending(path) as add:
        add(record_of(predict(images[0], ("a", "cat")), keep_attention=False))
    keep_latest(path)
    assert names(path) == "bcdea" and list(read_records(path))[-1].caption == "a cat"
    assert figures(path.parent) == ["b"]  # a's showed what it was


@pytest.mark.parametrize(
    ("had", "wanted", "expected"),
    [  # (number of figures, attention of all)
        ((2, False), (3, False), "abde"),
        ((2, False), (0, False), "abcde"),
        ((2, False), (2, True), "ab"),
        ((0, True), (1, True), "bcde"),
        ((1, True), (1, False), "abcde"),
    ],
)
def test_a_figure_or_attention_that_is_now_wanted_is_missing(tmp_path, images, had, wanted, expected):
    path = write_finished(images, tmp_path / "out", *had)
    assert finished(path, images, *wanted) == expected


def test_a_figure_that_is_gone_is_made_again(tmp_path, images):
    path = write_finished(images, tmp_path / "out")
    (path.parent / figure_name(images[1])).unlink()
    assert finished(path, images) == "acde"


def test_images_that_are_not_asked_for_stay_with_their_figures(tmp_path, images):
    path = write_finished(images, tmp_path / "out")
    begin_captions(path, MAKER)
    assert finished(path, images[3:], 0) == "de"
    keep_latest(path)
    assert names(path) == "abcde" and figures(path.parent) == ["a", "b"]


def test_an_image_is_the_same_from_another_folder_and_another_one_of_its_name_is_not(tmp_path, images, monkeypatch):
    path = write_finished(images[:1], tmp_path / "out", num_figures=0)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jpg").write_bytes(bytes(100))
    here = ImageToCaption(pathlib.Path("a.jpg"), "a.jpg")
    monkeypatch.chdir(tmp_path)
    assert (
        find_finished(path, [here], 0, False, "weights") == {str(images[0].path)} == {image_key(here.name, here.path)}
    )
    monkeypatch.chdir(tmp_path / "deep")
    assert find_finished(path, [here], 0, False, "weights") == set()
    with appending(path) as add:
        add(record_of(predict(here), keep_attention=False))
    monkeypatch.chdir(tmp_path)
    keep_latest(path)
    assert [record.key for record in read_records(path)] == [str(images[0].path), str(tmp_path / "deep" / "a.jpg")]


def test_an_image_has_one_line_whatever_the_file_held(tmp_path, images):
    path = write_finished(images, tmp_path / "out")
    path.write_bytes(2 * path.read_bytes())
    begin_captions(path, MAKER)
    assert names(path) == "abcde"
    assert figures(path.parent) == ["a", "b"]


def test_no_figure_outside_of_the_folder_is_deleted(tmp_path, images):
    path = tmp_path / "out" / "captions.jsonl"
    target = tmp_path / "target.png"
    target.touch()
    lines = [CaptionRecord(name, "a", -1.0, 1, 2, figure=name) for name in (str(target), "../target.png", "..", "\0")]
    path.write_bytes(b"".join(line.line() for line in lines))
    begin_captions(path, MAKER, anew=True)
    assert path.read_bytes() == b"" and target.exists()


def test_a_full_disk_leaves_the_captions_as_they_were(tmp_path, images):
    path = write_finished(images, tmp_path / "out")
    before = path.read_bytes()
    with full_disk(200), pytest.raises(UserError, match="cannot write .*captions.jsonl: .* MB free there"):
        begin_captions(path, MAKER)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".tmp*")) and len(figures(path.parent)) == 2


# --- Adding lines -----------------------------------------------------------------------------------------------


def test_a_line_is_in_the_file_as_soon_as_it_is_added(tmp_path, images):
    path = tmp_path / "captions.jsonl"
    with appending(path) as add:
        for count, image in enumerate(images, 1):
            add(record_of(predict(image)))
            assert len(list(read_records(path))) == count


def test_a_full_disk_is_one_line_and_keeps_the_lines_before(tmp_path, images):
    path = tmp_path / "captions.jsonl"
    line = record_of(predict(images[0]), keep_attention=False)
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


def test_the_table_has_a_row_for_each_image_whatever_its_name(tmp_path):
    rows = [("a,b.jpg", "a dog"), ('"quoted".jpg', ""), ("two\nlines.jpg", "ein Hündchen"), (NOT_UTF8, "犬")]
    path = tmp_path / "captions.jsonl"
    path.write_bytes(b"".join(CaptionRecord(*row, -1.0, 1, 2).line() for row in rows))
    write_table(tmp_path / "captions.csv", path)
    with (tmp_path / "captions.csv").open(newline="", encoding="utf-8-sig") as file:
        header, *written = csv.reader(file)
    assert header == ["image", "caption"]
    assert [tuple(row) for row in written] == [*rows[:3], ("/images/caf?.jpg", "犬")]


def test_excel_knows_the_letters_of_the_table_and_script_1_reads_it(tmp_path):
    """Excel takes a file without a byte order mark for one in the system's own encoding."""
    path = tmp_path / "captions.jsonl"
    path.write_bytes(CaptionRecord("é.jpg", "ein Hündchen", -1.0, 1, 2).line())
    write_table(tmp_path / "captions.csv", path)
    assert (tmp_path / "captions.csv").read_bytes().startswith(codecs.BOM_UTF8 + b'"image"')
    splits = read_table(Source(tmp_path / "captions.csv"), ("", ""), 40)
    assert [(image.name, image.references) for image in splits["train"]] == [("é.jpg", ["ein Hündchen"])]


def test_the_table_has_a_row_for_each_of_several_captions(tmp_path):
    several = [{"caption": text, "log_probability": -1.0} for text in ("a dog", "=1", "")]
    records = CaptionRecord("a.jpg", "a dog", -1.0, 1, 2, captions=several), CaptionRecord("b.jpg", "a cat", -1.0, 1, 2)
    (tmp_path / "captions.jsonl").write_bytes(b"".join(record.line() for record in records))
    write_table(tmp_path / "captions.csv", tmp_path / "captions.jsonl")
    with (tmp_path / "captions.csv").open(newline="", encoding="utf-8-sig") as file:
        _, *written = csv.reader(file)
    assert written == [["a.jpg", "a dog"], ["a.jpg", "'=1"], ["a.jpg", ""], ["b.jpg", "a cat"]]


def test_no_cell_of_the_table_is_a_formula(tmp_path):
    """Also not behind a semicolon, which splits cells in many countries."""
    rows = [('=HYPERLINK("http://a")', "@SUM(1)"), ("-1.jpg", "+1"), ("\t=1", "\n=1"), ("a=1", "b;=2"), ("＝1", "")]
    path = tmp_path / "captions.jsonl"
    path.write_bytes(b"".join(CaptionRecord(*row, -1.0, 1, 2).line() for row in rows))
    write_table(tmp_path / "captions.csv", path)
    with (tmp_path / "captions.csv").open(newline="", encoding="utf-8-sig") as file:
        text = file.read()
        _, *written = csv.reader(text.splitlines(keepends=True))
    live = ("=", "+", "-", "@", "\t", "\r", "\n", "＝")
    assert [tuple(f"'{cell}" if cell.startswith(live) else cell for cell in row) for row in rows] == [
        *map(tuple, written)
    ]
    assert '"b;=2"' in text
