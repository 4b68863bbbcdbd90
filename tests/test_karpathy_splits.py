import copy
import json
import random

from command_line import UserError
from data_utils import count_words, image_problem
from karpathy_splits import read_karpathy

import pytest


def coco_record(number, split, *captions, folder="val2014"):
    sentences = [{"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": 0} for text in captions]
    name = f"COCO_{folder}_{number:012d}.jpg"
    record = {"filepath": folder, "filename": name, "imgid": number, "cocoid": 1000 - number, "split": split}
    return record | {"sentids": [0], "sentences": sentences}


def flickr_record(number, split, *captions):
    record = coco_record(number, split, *captions) | {"filename": f"{number}_a.jpg"}
    return {key: value for key, value in record.items() if key not in ("filepath", "cocoid")}


RECORDS = [
    coco_record(1, "train", "A dog.", "Two cats, it's late", folder="train2014"),
    coco_record(2, "restval", "A boat."),
    coco_record(3, "val", "A bird."),
    coco_record(4, "test", "A red cow."),
    coco_record(5, "test", "A blue cow."),
]


def read(folder, images, max_words=40):
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return read_karpathy(path, folder, max_words, count_words, image_problem)


def ids(splits):
    return {split: [image["image_id"] for image in images] for split, images in splits.items()}


def test_the_published_splits_with_restval_in_train(tmp_path, capsys):
    splits = read(tmp_path, RECORDS)
    assert ids(splits) == {"train": [998, 999], "val": [997], "test": [995, 996]}  # by cocoid
    assert splits["train"][1] == {
        "image_id": 999,
        "file_name": "COCO_train2014_000000000001.jpg",
        "folder": "train2014",
        "url": None,
        "captions": ["A dog.", "Two cats, it's late"],
        "references": ["A dog.", "Two cats, it's late"],
    }
    assert splits["train"][0]["folder"] == "val2014"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("filepath", [{}, {"filepath": ""}, {"filepath": None}, {"filepath": "."}])
def test_flickr_has_neither_cocoid_nor_folder(tmp_path, filepath):
    records = [flickr_record(n, split, "A dog") | filepath for n, split in enumerate(("train", "val", "test"))]
    splits = read(tmp_path, records)
    assert ids(splits) == {"train": [0], "val": [1], "test": [2]}
    assert {image["folder"] for images in splits.values() for image in images} == {""}


def test_long_captions_are_references_only_and_cost_no_test_image(tmp_path, capsys):
    long = "one two three four"
    records = [*RECORDS, coco_record(6, "train", long), coco_record(7, "test", long), coco_record(8, "val", "a", long)]
    splits = read(tmp_path, records, max_words=3)
    assert ids(splits) == {"train": [998, 999], "val": [992, 997], "test": [993, 995, 996]}
    assert (splits["test"][0]["captions"], splits["test"][0]["references"]) == ([], [long])
    assert (splits["val"][0]["captions"], splits["val"][0]["references"]) == (["a"], ["a", long])
    printed = capsys.readouterr().out
    assert '4 left out, longer than 3 words, such as "Two cats, it\'s late"' in printed
    assert "1 left out, an image without a usable caption" in printed


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"filepath": "../elsewhere"}, "leads out"),
        ({"filepath": "val2014/../.."}, "leads out"),
        ({"filepath": "val2014\\.. \\x"}, "leads out"),
        ({"filepath": "/etc"}, "leads out"),
        ({"filepath": "C:x"}, "leads out"),
        ({"filepath": "\\\\host\\share"}, "leads out"),
        ({"filepath": "a\0b"}, "leads out"),
        ({"filepath": 3}, "leads out"),
        ({"filename": "../a.jpg"}, "a file name with a folder"),
        ({"filename": "a\\b.jpg"}, "a file name with a folder"),
        ({"filename": ""}, "without a file name"),
        ({"filename": "\ud800.jpg"}, "without a file name"),
        ({"filename": None}, "without a file name"),
        ({"filename": "COCO_train2014_000000000001.png"}, "another has"),  # the stem names the feature file
        ({"cocoid": 999}, "another has"),
        ({"cocoid": "7"}, "without id"),
        ({"cocoid": True}, "without id"),
        ({"split": "dev"}, "a split other than"),
        ({"split": ["test"]}, "a split other than"),
        ({"sentences": None}, "without sentences"),
        ({"sentences": []}, "without a usable caption"),
        ({"sentences": [{"raw": "!?"}]}, "a caption without words"),
        ({"sentences": ["text", {"tokens": ["a"]}, {"raw": 3}, {"raw": "\udfff"}]}, "a caption that is no text"),
    ],
)
def test_a_record_that_cannot_be_used_is_left_out_and_named(tmp_path, capsys, change, problem):
    splits = read(tmp_path, [*RECORDS, coco_record(6, "test", "A dog.") | change])
    assert splits == read(tmp_path, RECORDS)
    assert problem in capsys.readouterr().out


def test_a_deeper_folder_is_kept(tmp_path):
    splits = read(tmp_path, [*RECORDS, coco_record(6, "val", "A dog.") | {"filepath": "images/val2014/"}])
    assert splits["val"][0]["folder"] == "images/val2014"


@pytest.mark.parametrize("text", ["not json", "[1, 2]", "{}", '{"images": 3}', '{"images": []}'])
def test_a_wrong_file_is_one_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json .*--karpathy_json"):
        read_karpathy(tmp_path / "a.json", tmp_path, 40, count_words, image_problem)


@pytest.mark.parametrize("lost", ["train", "val", "test"])
def test_a_file_without_a_split_is_one_line(tmp_path, lost):
    records = [record for record in RECORDS if not record["split"].replace("rest", "").startswith(lost)]
    records = [record for record in records if lost != "train" or record["split"] != "restval"]
    with pytest.raises(UserError, match=f"no usable image of the split {lost}"):
        read(tmp_path, records)


def test_missing_files_and_folders_are_one_line(tmp_path):
    with pytest.raises(UserError, match="a.json is missing"):
        read_karpathy(tmp_path / "a.json", tmp_path, 40, count_words, image_problem)
    for folder in (tmp_path / "nowhere", ""):
        with pytest.raises(UserError, match="is no folder: name the one that holds the images by --images"):
            read_karpathy(tmp_path / "a.json", folder, 40, count_words, image_problem)


def test_wrong_types_anywhere_are_left_out_or_one_line(tmp_path):
    """One value somewhere in the file becomes another: what comes back is sound, or a UserError comes."""
    rng = random.Random(0)
    for _ in range(300):
        data = {"images": copy.deepcopy(RECORDS)}
        for _ in range(rng.choice((1, 3))):
            place, key = rng.choice(list(places(data)))
            place[key] = rng.choice((None, True, -1, 1e300, float("nan"), "", "\ud800", "..", [], [[]], {}, {"raw": 1}))
        (tmp_path / "a.json").write_text(json.dumps(data))
        try:
            splits = read_karpathy(tmp_path / "a.json", tmp_path, 40, lambda texts: [2] * len(texts), image_problem)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        for image in (image for images in splits.values() for image in images):
            assert type(image["image_id"]) is int and image["file_name"] and ".." not in image["folder"]
            assert image["references"] and all(type(text) is str for text in image["references"])


def places(value):
    """Every (container, key) inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])
