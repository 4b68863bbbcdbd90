"""Annotation files of the kinds that people have, through script 1."""

import collections
import json
import pathlib
import shutil

import numpy as np
import pytest

import data_utils
from captioning.data.captioned_images import image_path
from captioning.data.sources import all_images
from captioning.features.cache import feature_path, features_folder, load_data
from captioning.settings import read_settings
from support.errors import UserError

SHARED = pathlib.Path(__file__).parents[3] / "shared"
FILES = SHARED / "field_inputs"
pytestmark = pytest.mark.skipif(not FILES.is_dir(), reason="../shared with its field_inputs is not there")

PLAIN = [f"pic{n}.jpg" for n in range(8)]
NAMES = {  # what the images are called in the folder, where it is not PLAIN
    "coco_subfolders.json": [f"set{n % 2}/pic{n}.jpg" for n in range(8)],
    "coco_backslash.json": [f"images/pic{n}.jpg" for n in range(8)],
    "coco_same_stem.json": "a/pic.jpg b/pic.jpg c/pic.png c/pic.jpg d/pic.jpeg d/pic.webp e/pic.jpg f/pic.jpg".split(),
    "coco_narrow_space.json": None,  # as the file has them
}
HALVES = {"train": (6, 12), "validation": (2, 4)}  # of 8 images and 16 captions, with --val_fraction 0.25
EXPECTED = {
    "coco_plain.json": HALVES,
    "coco_bom.json": HALVES,
    "coco_ids_text.json": HALVES,
    "coco_ids_hex.json": HALVES,
    "coco_ids_mixed.json": HALVES,
    "coco_ids_float.json": HALVES,
    "coco_subfolders.json": HALVES,
    "coco_backslash.json": HALVES,
    "coco_same_stem.json": HALVES,
    "coco_per_caption.json": HALVES,
    "coco_narrow_space.json": HALVES,
    "coco_precanned.json": {"train": (4, 6), "validation": (2, 3)},
    "coco_boxes_without_size.json": HALVES,
    "coco_chinese.json": HALVES,
    "coco_thai.json": HALVES,
    "coco_persian.json": HALVES,
    "coco_apostrophes.json": HALVES,
    "coco_line_breaks.json": HALVES,
    "karpathy_no_test.json": {"train": (5, 10), "validation": (3, 6)},
    "karpathy_no_raw.json": {"train": (5, 10), "validation": (2, 4), "test": (1, 2)},
    "karpathy_no_imgid.json": {"train": (5, 10), "validation": (2, 4), "test": (1, 2)},
    "flickr8k.token.txt": HALVES,
    "flickr30k_results.csv": {"train": (6, 11), "validation": (2, 4)},
    "kaggle_captions.txt": HALVES,
    "metadata.csv": HALVES,
    "metadata.jsonl": HALVES,
    "excel.csv": HALVES,
    "with_splits.csv": {"train": (5, 10), "validation": (2, 4), "test": (1, 2)},
    "sidecars": HALVES,
}
SAID = {  # a part of the one line that says what was left out or joined
    "coco_precanned.json": "7 left out: a caption that is marked is_precanned or is_rejected",
    "coco_per_caption.json": "8 image records name a file that an earlier one names",
    "flickr30k_results.csv": "1 left out: a row with too few columns, such as line 11: 'pic4.jpg| 1   a plane",
}


def lay_out(root, name):
    """Put a file and its images where its kind of data set has them. Returns the options of script 1."""
    images = root / "coco" / "train2014"
    names = NAMES.get(name, PLAIN)
    if names is None:
        names = [image["file_name"] for image in json.loads((FILES / name).read_text())["images"]]
    for source, target in zip(sorted((SHARED / "coco_mini" / "train2017").iterdir())[:8], names, strict=True):
        (images / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, images / target)
    argv = ["--data_dir", str(root / "data"), "--val_fraction", "0.25", "--num_examples", "none"]
    if name.startswith(("coco_", "image_info")):
        (root / "coco" / "annotations").mkdir()
        shutil.copy(FILES / name, root / "coco" / "annotations" / "captions_train2014.json")
        return [*argv, "--coco_dir", str(root / "coco")]
    argv += ["--images", str(images)]
    if name.startswith("karpathy_"):
        return [*argv, "--dataset", "karpathy", "--karpathy_json", str(FILES / name)]
    if name.startswith("metadata."):
        shutil.copy(FILES / name, images)
    elif name == "sidecars":
        shutil.copytree(FILES / name, images, dirs_exist_ok=True)
    else:
        argv += ["--captions", str(FILES / name)]
    return [*argv, "--dataset", "table"]


def make_features(argv):
    """Fill the cache with noise under the names that it expects. Returns Config."""
    config, _ = read_settings(argv, "")
    images = all_images(data_utils.read_splits(config))
    assert all(image_path(image, config).is_file() for image in images)
    features_folder(config).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for image in images:
        np.save(feature_path(image, features_folder(config)), rng.random((64, 2048), np.float32).astype(np.float16))
    assert len(list(features_folder(config).iterdir())) == len(images)
    return config


@pytest.mark.parametrize("name", EXPECTED)
def test_what_must_come_of_each_file(tmp_path, capsys, name):
    argv = lay_out(tmp_path, name)
    config = make_features(argv)
    capsys.readouterr()
    data_utils.main(argv)
    prepared = load_data(config)
    splits = {split: getattr(prepared, split) for split in ("train", "validation", "test")}
    counts = {split: (len(images), sum(map(len, (i.captions for i in images)))) for split, images in splits.items()}
    assert {split: count for split, count in counts.items() if count[0]} == EXPECTED[name]
    out = capsys.readouterr().out.splitlines()
    said = [line for line in out if "left out" in line or "joined" in line]
    assert len(said) == (name in SAID) and SAID.get(name, "") in "".join(said)
    if len(set(NAMES.get(name) or PLAIN)) == 8 and name != "coco_same_stem.json":  # found by the plain stem
        stems = {path.stem for path in features_folder(config).glob("*.npy")}
        images = [image for images in splits.values() for image in images]
        assert stems == {pathlib.PurePath(image.file_name).stem for image in images}


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("coco_ids_text.json", [str(n) for n in range(1, 9)]),
        ("coco_ids_hex.json", [f"d7495e8d036dd20{n}" for n in range(8)]),
        ("coco_ids_mixed.json", list(range(1, 9))),
        ("coco_ids_float.json", list(range(1, 9))),
        ("coco_per_caption.json", list(range(1, 17, 2))),
        ("karpathy_no_imgid.json", list(range(8))),
        ("excel.csv", list(range(1, 9))),
    ],
)
def test_results_have_the_ids_of_the_file(tmp_path, name, ids):
    config, _ = read_settings(lay_out(tmp_path, name), "")
    images = all_images(data_utils.read_splits(config))
    assert sorted(image.image_id for image in images) == ids


def test_captions_are_those_of_the_list(tmp_path):
    """Caption k and caption k + 1 belong to image k."""
    captions = (FILES / "captions.txt").read_text().splitlines()
    for name in ("coco_plain.json", "karpathy_no_raw.json", "excel.csv", "metadata.jsonl", "sidecars"):
        config, _ = read_settings(lay_out(tmp_path / name, name), "")
        found = {image.file_name: image.references for image in all_images(data_utils.read_splits(config))}
        assert found == {f"pic{k}.jpg": [captions[k], captions[(k + 1) % 8]] for k in range(8)}, name


def test_line_breaks_are_blanks(tmp_path):
    config, _ = read_settings(lay_out(tmp_path, "coco_line_breaks.json"), "")
    captions = [text for image in all_images(data_utils.read_splits(config)) for text in image.captions]
    assert len(captions) == 16 and all(len(text.splitlines()) == 1 for text in captions)
    assert collections.Counter(captions)["a man rides a horse fast"] > 0


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("karpathy_long.json", "all captions of the 2 validation images are longer than --max_words 40: raise it"),
        ("image_info.json", "lists images without captions, as COCO's image_info files do, and cannot be trained on"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line_and_nothing_is_prepared(tmp_path, name, line):
    with pytest.raises(UserError, match=line):
        data_utils.main(lay_out(tmp_path, name))
    assert not (tmp_path / "data" / "settings.json").exists()


def test_long_captions_are_validated_on_where_they_are_allowed(tmp_path):
    argv = [*lay_out(tmp_path, "karpathy_long.json"), "--max_words", "50"]
    config = make_features(argv)
    data_utils.main(argv)
    assert sum(len(image.captions) for image in load_data(config).validation) == 4
