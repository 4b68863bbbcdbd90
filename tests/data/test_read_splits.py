"""Which images script 1 trains on, validates on and scores, as the settings and the files say."""

import json

import numpy as np
import pytest

import data_utils
from captioning.data.captioned_images import image_path
from captioning.data.sources import all_images
from captioning.features.cache import feature_path, features_folder, load_data
from captioning.settings import read_settings
from conftest import IMAGES, options, write_coco, write_features
from support.errors import UserError


def read(*argv):
    """dict of split to the names of its images, for the command line of script 1."""
    config, _ = read_settings(list(map(str, argv)), "")
    return {split: [image.name for image in images] for split, images in data_utils.read_splits(config).items()}


def write_tables(root, **tables):
    """A table for each name, with an image and a caption a row, and the options that go with the folder."""
    for name, rows in tables.items():
        text = "image,caption\n" + "".join(f"{image},{caption}\n" for image, caption in rows)
        (root / f"{name}.csv").write_text(text)
    return ["--dataset", "table", "--images", root]


OWN = [(f"{n}.jpg", "a dog") for n in range(10)]


def test_tables_without_splits_are_split_by_image(tmp_path):
    argv = [*write_tables(tmp_path, own=[*OWN, *OWN[:5]]), "--captions", tmp_path / "own.csv"]
    splits = read(*argv)
    assert [len(images) for images in splits.values()] == [8, 2]
    assert read(*argv, "--seed", 1) != splits == read(*argv)
    assert sorted(splits["train"] + splits["validation"]) == [name for name, _ in OWN]


def test_a_table_for_each_split(tmp_path, capsys):
    argv = write_tables(tmp_path, train=OWN[:6], val=OWN[6:8], test=[("8.jpg", "dog " * 41), ("9.jpg", "a dog")])
    argv += ["--captions", tmp_path / "train.csv"]
    val, test = ["--validation_captions", tmp_path / "val.csv"], ["--test_captions", tmp_path / "test.csv"]
    names = [name for name, _ in OWN]
    assert read(*argv, *val, *test, "--val_fraction", 0) == {
        "train": names[:6],
        "validation": names[6:8],
        "test": names[8:],  # one that is scored only keeps its place, however long its captions are
    }
    assert read(*argv, *val) == {"train": names[:6], "validation": names[6:8]}
    with_test = read(*argv, *test)
    assert [len(images) for images in with_test.values()] == [4, 2, 2]
    capsys.readouterr()
    without = read(*argv, *test, "--val_fraction", 0)
    assert without["train"] == names[:6] and without["validation"] == without["test"] == names[8:]
    assert "the best epoch is chosen on the test images" in capsys.readouterr().out


def test_ids_differ_from_table_to_table(tmp_path):
    argv = [*write_tables(tmp_path, train=OWN[:6], val=OWN[6:]), "--captions", tmp_path / "train.csv"]
    argv += ["--validation_captions", tmp_path / "val.csv"]
    config, _ = read_settings(list(map(str, argv)), "")
    images = all_images(data_utils.read_splits(config))
    assert sorted(image.image_id for image in images) == list(range(1, 11))


def test_images_that_are_trained_on_and_scored_are_told(tmp_path, capsys):
    argv = [*write_tables(tmp_path, train=OWN, val=OWN[:3]), "--captions", tmp_path / "train.csv"]
    splits = read(*argv, "--validation_captions", tmp_path / "val.csv")
    assert [len(images) for images in splits.values()] == [10, 3]
    assert "note: 3 of 3 images of validation are trained on too" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--captions", "own.csv", "--val_fraction", "0"], "--val_fraction 0 leaves no image to validate on"),
        (["--validation_captions", "own.csv", "--captions", "long.csv"], "no usable captions of the split train"),
        (["--captions", "own.csv", "--validation_captions", "long.csv"], "longer than --max_words 40: raise it"),
        (["--captions", "own.csv", "--images", "nowhere"], "'nowhere' is not a folder: .* --images"),
        (["--captions", "own.csv", "--images", ""], "'' is not a folder: .* --images"),
        (["--captions", "own.csv", "--caption_column", "text"], "has the columns 'image', 'caption'"),
        ([], "has no metadata.csv"),
        (["--captions", "test.csv"], "has no captions of the split train"),
        (["--dataset", "coco", "--captions", "own.csv"], "--captions does not go with --dataset coco"),
        (
            ["--dataset", "karpathy", "--test_captions", "own.csv"],
            "--test_captions does not go with --dataset karpathy",
        ),
        (["--dataset", "coco"], "--images does not go with --dataset coco: leave it out, or give --dataset table"),
        (["--karpathy_json", "x.json"], "--karpathy_json does not go with --dataset table: .* --dataset karpathy"),
        (["--dataset", "demo", "--image_column", "x"], "--image_column does not go with --dataset demo"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, monkeypatch, argv, line):
    monkeypatch.chdir(tmp_path)
    own = write_tables(tmp_path, own=OWN, long=[(name, "dog " * 41) for name, _ in OWN])
    (tmp_path / "test.csv").write_text("image,caption,split\n1.jpg,a dog,test\n")
    with pytest.raises(UserError, match=line):
        read(*own, *argv)


def test_one_file_of_coco_is_trained_on_and_another_scored(tmp_path):
    """Their images lie in folders of their own, and may have the same names."""
    root = tmp_path
    write_coco(root / "coco")
    write_coco(root / "other", count=5)
    (root / "other" / "train2014").rename(root / "coco" / "val2014")
    theirs = root / "coco" / "annotations" / "captions_val2014.json"
    (root / "other" / "annotations" / "captions_train2014.json").rename(theirs)
    argv = [*options(root), "--validation_captions", str(theirs), "--test_captions", str(theirs), "--val_fraction", "0"]
    config, _ = read_settings(argv, "")
    splits = data_utils.read_splits(config)
    assert {split: len(images) for split, images in splits.items()} == {"train": IMAGES, "validation": 5, "test": 5}
    assert all(image_path(image, config).is_file() for images in splits.values() for image in images)
    assert image_path(splits["validation"][0], config).parent == root / "coco" / "val2014"
    stems = {feature_path(image, features_folder(config)) for image in all_images(splits)}
    assert len(stems) == IMAGES + 5
    assert feature_path(splits["train"][-1], features_folder(config)).stem == splits["train"][
        -1
    ].file_name.removesuffix(".jpg")


def test_a_file_of_coco_by_another_name_has_its_images_in_the_same_folder(coco):
    path = coco / "coco" / "annotations" / "captions_train2014.json"
    data = json.loads(path.read_text())
    own = data | {"images": data["images"][:4]}
    path.with_name("own.json").write_text(json.dumps(own))
    path.write_text(json.dumps(data | {"images": data["images"][4:]}))
    splits = read(*options(coco), "--validation_captions", path.with_name("own.json"))
    assert [len(images) for images in splits.values()] == [IMAGES - 4, 4]
    assert splits["validation"][0] == "COCO_train2014_000000000001.jpg"


def test_a_test_split_of_any_data_is_prepared_and_goes_when_it_is_not_named_any_more(tmp_path):
    root = tmp_path
    write_coco(root / "coco")
    write_features(root / "features")
    names = [f"COCO_train2014_{n:012d}.jpg" for n in range(1, IMAGES + 1)]
    own = write_tables(
        root, own=[(name, "a dog") for name in names[:20]], test=[(name, "a cat") for name in names[20:]]
    )
    own += ["--images", root / "coco" / "train2014", "--captions", root / "own.csv", "--data_dir", root / "data"]
    own = [*map(str, own), "--features_dir", str(root / "features")]
    argv = [*own, "--test_captions", str(root / "test.csv")]
    data_utils.main(argv)
    prepared = load_data(read_settings(argv, "")[0])
    assert [len(prepared.train), len(prepared.validation), len(prepared.test)] == [16, 4, 4]
    assert prepared.test[0].references == ["a cat"]
    with pytest.raises(UserError, match="prepared with --test_captions"):
        load_data(read_settings(own, "")[0])
    data_utils.main(own)
    assert load_data(read_settings(own, "")[0]).test == []


def test_names_and_features_in_the_other_spelling_of_unicode_are_found(tmp_path):
    """NFC in the file, NFD on disk, and the reverse."""
    composed, taken_apart = [[f"{letters}{n}" for n in range(4)] for letters in ("caf\u00e9", "cafe\u0301")]
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "data" / "features").mkdir(parents=True)
    for name in taken_apart[:2]:
        (images / f"{name}.jpg").touch()
    for name in [*taken_apart[:2], *composed[2:]]:
        np.save(tmp_path / "data" / "features" / f"{name}.npy", np.ones((64, 2048), np.float16))
    argv = write_tables(tmp_path, own=[(f"{name}.jpg", "a dog") for name in composed[:2] + taken_apart[2:]])
    argv += ["--images", images, "--captions", tmp_path / "own.csv", "--data_dir", tmp_path / "data"]
    argv = list(map(str, argv))
    data_utils.main(argv)
    prepared = load_data(read_settings(argv, "")[0])
    assert len(prepared.train + prepared.validation) == 4
    names = {image.file_name for image in prepared.train + prepared.validation}
    assert names == {f"{name}.jpg" for name in taken_apart}  # the last two have no image, and keep their names


def test_a_wrong_captions_file_of_coco_is_one_line_that_says_what_mends_it(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match=r"other.json does not have .* COCO captions: name another by --test_captions$"):
        read("--coco_dir", tmp_path, "--test_captions", tmp_path / "other.json")
    (tmp_path / "annotations" / "captions_train2014.json").write_text("[]")
    with pytest.raises(UserError, match=r"captions_train2014.json does not have .* COCO captions: put COCO's own file"):
        read("--coco_dir", tmp_path)
