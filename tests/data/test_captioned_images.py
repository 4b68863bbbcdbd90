import dataclasses
import pathlib
import unicodedata

import pytest

from captioning.data.captioned_images import (
    CaptionedImage,
    RejectedRecords,
    add_captions,
    clean_folder,
    clean_id,
    find_caption_problem,
    id_order,
    image_path,
    images_folder,
    name_features,
    names_on_disk,
    split_file_name,
)
from captioning.features.cache import feature_stem
from config import Config


def test_rejected_records_are_counted_by_problem_with_the_first_as_an_example(capsys):
    rejected = RejectedRecords("a.json")
    rejected.report()
    assert capsys.readouterr().out == rejected.main_reason() == ""
    for problem, record in (("of one kind", {"id": "first\n\ud800"}), ("of another", "x" * 500), ("of one kind", 2)):
        rejected.add(problem, record)
    rejected.report()
    assert capsys.readouterr().out.splitlines() == [
        "a.json: 2 left out: of one kind, such as {'id': 'first\\n\\ud800'}",
        "a.json: 1 left out: of another, such as '" + "x" * 159,
    ]
    assert rejected.main_reason() == " (2 left out: of one kind, such as {'id': 'first\\n\\ud800'})"


def test_an_example_comes_with_its_line_and_may_be_nested_deeply(capsys):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    rejected = RejectedRecords("a.csv")
    rejected.add("no good", "a;b", line=12)
    rejected.add("too deep", deep)
    rejected.report()
    assert capsys.readouterr().out.splitlines() == [
        "a.csv: 1 left out: no good, such as line 12: 'a;b'",
        "a.csv: 1 left out: too deep, such as a deeply nested list",
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 7),
        ("7", "7"),
        ("007", "007"),
        ("d7495e8d036dd200", "d7495e8d036dd200"),
        (7.0, 7),
        ("7.0", 7),
        ("-7.00", -7),
        (7.5, None),
        (float("nan"), None),
        (float("inf"), None),
        (1e300, None),
        (True, None),
        (None, None),
        ("", None),
        ("\ud800", None),
        ("x" * 201, None),
        ([7], None),
    ],
)
def test_ids_stay_what_they_are_but_for_those_of_tables(value, expected):
    assert clean_id(value) == expected and type(clean_id(value)) is type(expected)


def test_numbers_sort_before_texts():
    assert sorted(["b", 10, "10", 9, "a"], key=id_order) == [9, 10, "10", "a", "b"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.jpg", ("", "a.jpg")),
        ("./a.jpg", ("", "a.jpg")),
        ("set0//b/a.jpg", ("set0/b", "a.jpg")),
        ("images\\b\\a.jpg", ("images/b", "a.jpg")),
        ("Bildschirmfoto 10.15.30\u202fAM.png", ("", "Bildschirmfoto 10.15.30\u202fAM.png")),
        ("\U0001f469\u200d\U0001f52c \u200f.jpg", ("", "\U0001f469\u200d\U0001f52c \u200f.jpg")),
    ],
)
def test_file_names_may_have_folders_and_all_visible_letters(value, expected):
    assert split_file_name(value) == expected


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("../a.jpg", "leads out"),
        ("a/../b.jpg", "leads out"),
        ("a\\.. \\b.jpg", "leads out"),
        ("/etc/a.jpg", "leads out"),
        ("/a.jpg", "leads out"),
        ("\\a.jpg", "leads out"),
        ("\\\\host\\share\\a.jpg", "leads out"),
        ("C:a.jpg", "leads out"),
        ("C:\\a.jpg", "leads out"),
        ("https://host/a.jpg", "an address"),
        ("a/", "empty or not printable"),
        ("", "empty or not printable"),
        ("a\n.jpg", "empty or not printable"),
        ("a\u2028.jpg", "empty or not printable"),
        ("a\0b/a.jpg", "leads out"),
        ("a\nb/a.jpg", "leads out"),
        ("a/..", "a dot in front"),
        (".tmp-1-a.jpg", "a dot in front"),
        ("é" * 101, "more than 200 bytes"),
        (None, "without a file name"),
        (3, "without a file name"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(value, problem):
    folder, reason = split_file_name(value)
    assert folder is None and problem in reason


def test_no_two_images_share_a_feature_file():
    names = ["a/pic.jpg", "b/pic.jpg", "c/pic.png", "c/Pic.jpg", "other.jpg", "e/\u00e9.jpg", "f/e\u0301.jpg"]
    images = [CaptionedImage(n, name.rpartition("/")[2], name.rpartition("/")[0]) for n, name in enumerate(names)]
    again = dataclasses.replace(images[4], image_id=99)  # the same image in another split
    named = name_features({"train": images, "validation": [again]})
    stems = [feature_stem(image) for image in named["train"]]
    assert len({unicodedata.normalize("NFC", stem).casefold() for stem in stems}) == len(names)
    assert stems[4] == feature_stem(named["validation"][0]) == "other"
    assert name_features({"train": images[::-1]})["train"][::-1] == named["train"]  # whatever the order
    assert feature_stem(name_features({"train": images[:1]})["train"][0]) == "pic"


def test_names_are_found_in_the_other_spelling_of_unicode(tmp_path):
    composed, taken_apart = "caf\u00e9", "cafe\u0301"
    (tmp_path / taken_apart).mkdir()
    (tmp_path / taken_apart / f"{composed}.jpg").touch()
    config = Config(dataset="table", images=str(tmp_path))
    named = [
        CaptionedImage(1, f"{taken_apart}.jpg", composed),
        CaptionedImage(2, f"{composed}.jpg", taken_apart),
        CaptionedImage(3, "gone\u00e9.jpg", "nowhere"),
    ]
    first, second, third = names_on_disk(named, config)
    assert (first.folder, first.file_name) == (second.folder, second.file_name) == (taken_apart, f"{composed}.jpg")
    assert image_path(first, config).is_file() and third == named[2]


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\u2028", "\x0b", "\x85"])
def test_line_breaks_in_captions_are_blanks(line_break):
    captions = [(1, f"a dog{line_break}runs", None)]
    (image,) = add_captions([CaptionedImage(1, "a.jpg")], captions, 40, RejectedRecords("x"))
    assert image.captions == image.references == ["a dog runs"]


def test_a_caption_is_text_of_a_length_that_people_write():
    assert find_caption_problem("a dog") is None
    assert "not text" in find_caption_problem(3)
    assert "not text" in find_caption_problem("a\0dog")
    assert "more than 10,000 letters" in find_caption_problem("x" * 10_001)


def test_folders_are_below_the_images_folder():
    assert [clean_folder(value) for value in (None, "", "a//b/", "..", "a/..", 3)] == ["", "", "a/b", None, None, None]


def test_an_images_file_is_below_the_images_folder():
    image = CaptionedImage(1, "a.jpg", "val2014")
    karpathy = Config(dataset="karpathy", images="images", coco_dir="coco")
    assert images_folder(karpathy) == pathlib.Path("images")
    assert image_path(image, karpathy) == pathlib.Path("images/val2014/a.jpg")
    coco = Config(coco_dir="coco", coco_split="train2014", images="images")
    assert image_path(CaptionedImage(1, "a.jpg"), coco) == pathlib.Path("coco/train2014/a.jpg")
    assert image_path(CaptionedImage(1, "a.jpg", "b", coco_split="val"), coco) == pathlib.Path("coco/val/b/a.jpg")
    table = Config(dataset="table", images="images")
    assert image_path(CaptionedImage(1, "a.jpg", "train"), table) == pathlib.Path("images/train/a.jpg")
