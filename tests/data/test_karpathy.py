import copy
import json
import random

import pytest

from captioning.data.captioned_images import CaptionedImage
from captioning.data.karpathy import read_karpathy
from strategies import places
from support.errors import UserError


def image_ids(images):
    return [image.image_id for image in images]


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
    return read_karpathy(path, folder, max_words)


def ids(splits):
    return {split: image_ids(images) for split, images in splits.items()}


def test_the_published_splits_with_restval_in_train(tmp_path, capsys):
    splits = read(tmp_path, RECORDS)
    assert ids(splits) == {"train": [998, 999], "validation": [997], "test": [995, 996]}  # by cocoid
    assert splits["train"][1] == CaptionedImage(
        image_id=999,
        file_name="COCO_train2014_000000000001.jpg",
        folder="train2014",
        url="http://images.cocodataset.org/train2014/COCO_train2014_000000000001.jpg",
        captions=["A dog.", "Two cats, it's late"],
        references=["A dog.", "Two cats, it's late"],
    )
    assert splits["train"][0].folder == "val2014"
    assert splits["train"][0].url == "http://images.cocodataset.org/val2014/COCO_val2014_000000000002.jpg"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("filepath", [{}, {"filepath": ""}, {"filepath": None}, {"filepath": "."}])
def test_flickr_has_neither_cocoid_nor_folder_nor_address(tmp_path, filepath):
    records = [flickr_record(n, split, "A dog") | filepath for n, split in enumerate(("train", "val", "test"))]
    splits = read(tmp_path, records)
    assert ids(splits) == {"train": [0], "validation": [1], "test": [2]}
    assert {(image.folder, image.url) for images in splits.values() for image in images} == {("", None)}


def test_long_captions_are_references_only_and_cost_no_test_image(tmp_path, capsys):
    long = "one two three four"
    records = [*RECORDS, coco_record(6, "train", long), coco_record(7, "test", long), coco_record(8, "val", "a", long)]
    splits = read(tmp_path, records, max_words=3)
    assert ids(splits) == {"train": [998, 999], "validation": [992, 997], "test": [993, 995, 996]}
    assert (splits["test"][0].captions, splits["test"][0].references) == ([], [long])
    assert (splits["validation"][0].captions, splits["validation"][0].references) == (["a"], ["a", long])
    printed = capsys.readouterr().out
    assert ": 4 left out: a caption longer than 3 words, such as " in printed
    assert '"Two cats, it\'s late"' in printed
    assert ": 1 left out: an image without a usable caption, such as " in printed


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
        ({"filepath": "x" * 201}, "leads out"),
        ({"filepath": 3}, "leads out"),
        ({"filename": "../a.jpg"}, "a file name that leads out"),
        ({"filename": "/a/b.jpg"}, "a file name that leads out"),
        ({"filename": ""}, "a file name that is empty or not printable"),
        ({"filename": "\ud800.jpg"}, "a file name that is empty or not printable"),
        ({"filename": None}, "without a file name"),
        ({"filepath": "val2014", "filename": "COCO_val2014_000000000002.jpg"}, "another image has"),
        ({"cocoid": 999}, "another image has"),
        ({"cocoid": "999"}, "another image has"),
        ({"cocoid": True}, "without an id"),
        ({"split": "extra"}, "a split other than"),
        ({"split": ["test"]}, "a split other than"),
        ({"sentences": None}, "without sentences"),
        ({"sentences": []}, "without a usable caption"),
        ({"sentences": [{"raw": "!?"}]}, "a caption without words"),
        (
            {"sentences": ["text", {"tokens": ["a", 3]}, {"raw": 3, "tokens": ["a"]}, {"raw": "\udfff"}]},
            "4 left out: a caption that is not",
        ),
    ],
)
def test_a_karpathy_record_that_cannot_be_used_is_left_out_and_named(tmp_path, capsys, change, problem):
    splits = read(tmp_path, [*RECORDS, coco_record(6, "test", "A dog.") | change])
    printed = capsys.readouterr().out
    assert splits == read(tmp_path, RECORDS)
    assert problem in printed


@pytest.mark.parametrize(
    ("filepath", "folder"), [("images/val2014/", "images/val2014"), ("images\\val2014", "images/val2014")]
)
def test_a_deeper_folder_is_kept_and_has_no_address(tmp_path, filepath, folder):
    splits = read(tmp_path, [*RECORDS, coco_record(6, "val", "A dog.") | {"filepath": filepath}])
    assert (splits["validation"][0].folder, splits["validation"][0].url) == (folder, None)


def test_an_address_leads_to_the_file_of_that_very_name(tmp_path):
    splits = read(tmp_path, [*RECORDS, coco_record(6, "val", "A dog.") | {"filename": "a b?c#d%e.jpg"}])
    assert splits["validation"][0].url == "http://images.cocodataset.org/val2014/a%20b%3Fc%23d%25e.jpg"


@pytest.mark.parametrize("text", ["not json", "[1, 2]", "{}", '{"images": 3}', '{"images": []}'])
def test_a_wrong_split_file_is_one_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="a.json .*--karpathy_json"):
        read_karpathy(tmp_path / "a.json", tmp_path, 40)


def test_a_file_without_images_to_train_on_is_one_line(tmp_path):
    records = [record for record in RECORDS if record["split"] not in ("train", "restval")]
    with pytest.raises(UserError, match="no usable image of the split train"):
        read(tmp_path, records)


@pytest.mark.parametrize("named", ["val", "test"])
def test_a_split_that_a_file_names_and_of_which_nothing_can_be_used_is_one_line(tmp_path, named):
    records = [record | ({"sentences": []} if record["split"] == named else {}) for record in RECORDS]
    split = {"val": "validation"}.get(named, named)
    with pytest.raises(
        UserError, match=rf"no usable image of the split {split} \(\d left out: an image without a usable"
    ):
        read(tmp_path, records)


def test_a_file_of_ones_own_has_the_splits_that_it_names(tmp_path):
    records = [flickr_record(n, split, "A dog") for n, split in enumerate(("training", "Valid", "train"))]
    assert ids(read(tmp_path, records)) == {"train": [0, 2], "validation": [1]}
    assert ids(read(tmp_path, records[:1])) == {"train": [0]}


def test_a_file_of_ones_own_needs_no_raw_no_ids_and_no_sentids(tmp_path, capsys):
    records = []
    for number, split in enumerate(("train", "val", "test", "train")):
        record = {"filename": f"deep\\er/{number}.jpg", "filepath": "all", "split": split}
        records.append(record | {"sentences": [{"tokens": ["a", "dog", str(number)]}]})
    records[3]["imgid"] = 7
    splits = read(tmp_path, records)
    assert ids(splits) == {"train": [7, 8], "validation": [9], "test": [10]}  # above the id that is there
    assert splits["train"][1].references == ["a dog 0"] and splits["train"][1].name == "all/deep/er/0.jpg"
    assert capsys.readouterr().out == ""


def test_missing_files_and_folders_are_one_line(tmp_path):
    with pytest.raises(UserError, match="a.json is missing"):
        read_karpathy(tmp_path / "a.json", tmp_path, 40)
    for folder in (tmp_path / "nowhere", ""):
        with pytest.raises(UserError, match="is not a folder: name the one that holds the images by --images"):
            read_karpathy(tmp_path / "a.json", folder, 40)


def test_wrong_types_anywhere_are_left_out_or_one_line(tmp_path, monkeypatch):
    """Values somewhere in the file become others. What comes back is sound, or a UserError comes."""
    monkeypatch.setattr("captioning.data.captioned_images.split_words", lambda caption: ["a", "b"])  # for its speed
    rng = random.Random(0)
    for _ in range(300):
        data = {"images": copy.deepcopy(RECORDS)}
        for _ in range(rng.choice((1, 3))):
            place, key = rng.choice(list(places(data)))
            place[key] = rng.choice((None, True, -1, 1e300, float("nan"), "", "\ud800", "..", [], [[]], {}, {"raw": 1}))
        (tmp_path / "a.json").write_text(json.dumps(data))
        try:
            splits = read_karpathy(tmp_path / "a.json", tmp_path, 40)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        for image in (image for images in splits.values() for image in images):
            assert type(image.image_id) in (int, str) and image.file_name and ".." not in image.folder
            assert image.references and all(type(text) is str for text in image.references)
