import json
import pathlib
import shutil

import numpy as np
import pytest

from captioning.captioner import Picture
from captioning.demo_scenes import draw_demo
from captioning.evaluation import evaluate
from captioning.settings import make_config
from tiny_captioner import SIZES, tiny_captioner

PICTURES = [
    Picture(pathlib.Path(f"{number}.jpg"), f"{number}.jpg", number, ["word1 word2 word3 tüür", "word4"])
    for number in range(1, 6)
]


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Paths of cached features, all of which differ."""
    rng = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("features")
    paths = [folder / f"{picture.image_id}.npy" for picture in PICTURES]
    for path in paths:
        np.save(path, (rng.standard_normal((64, 2048)).clip(0) + rng.standard_normal()).astype(np.float16))
    return paths


@pytest.fixture(scope="module")
def tiny(features):
    """One captioner for all tests: each would be compiled anew."""
    stacked = np.stack([np.load(path) for path in features]).astype(np.float32)
    return tiny_captioner(make_config(SIZES), stacked, seed=5)


def evaluate_tiny(tiny, features, split, output, **settings):
    config = make_config({**SIZES, "max_words": 5, "decode_batch": 3, "run_dir": "runs/x", **settings})
    evaluate(tiny, PICTURES, features, split, output, config)


def test_each_split_has_files_of_its_own(tiny, features, tmp_path, capsys):
    output = tmp_path / "captions"
    evaluate_tiny(tiny, features, "validation", output, dataset="karpathy")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    evaluate_tiny(tiny, features, "test", output, dataset="karpathy")
    assert before == {name: (output / name).read_bytes() for name in before}
    runs = ("greedy", "beam3", "beam5")
    expected = {f"captions_{split}_{run}_results.json" for split in ("validation", "test") for run in runs}
    assert {path.name for path in output.iterdir()} == expected | {"metrics_validation.json", "metrics_test.json"}
    printed = capsys.readouterr().out
    assert "metrics_validation.json and the captions" in printed and "metrics_test.json and the captions" in printed


def test_the_metrics_name_their_data_set_split_and_checkpoint_and_keep_meteors_place(tiny, features, tmp_path, capsys):
    evaluate_tiny(tiny, features, "test", tmp_path / "out", dataset="karpathy", beam_width=2)
    metrics = json.loads((tmp_path / "out" / "metrics_test.json").read_text())
    assert metrics["dataset"] == "karpathy"
    assert metrics["split"] == "test"
    assert metrics["images"] == 5
    assert metrics["checkpoint"] == "runs/x/best/ckpt-1"
    for run in ("greedy", "beam 2", "beam 3", "beam 5"):
        assert list(metrics[run])[4] == "METEOR" and metrics[run]["METEOR"] is None
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "| METEOR |" in header
    assert len(rows) == 4


def test_the_results_are_the_captions_of_every_image(tiny, features, tmp_path):
    evaluate_tiny(tiny, features, "validation", tmp_path / "out")
    by_run = {}
    for run in ("greedy", "beam3"):
        results = json.loads((tmp_path / "out" / f"captions_validation_{run}_results.json").read_text())
        assert [result["image_id"] for result in results] == [1, 2, 3, 4, 5]
        by_run[run] = [result["caption"] for result in results]
    assert len(set(by_run["greedy"])) > 2
    assert by_run["greedy"] != by_run["beam3"]


def test_demo_captions_are_compared_with_the_scenes(tiny, features, tmp_path, capsys):
    draw_demo(tmp_path / "scenes", 10, seed=0)
    evaluate_tiny(tiny, features, "validation", tmp_path / "out", dataset="demo", coco_dir=str(tmp_path / "scenes"))
    metrics = json.loads((tmp_path / "out" / "metrics_validation.json").read_text())
    assert metrics["greedy"]["scenes"]["objects"] == 0  # no such words
    assert metrics["greedy"]["attention"] == {"words": 0, "inside": None, "chance": None}
    assert "greedy, scenes: objects 0" in capsys.readouterr().out


def test_attention_is_scored_where_cocos_boxes_are(tiny, features, tmp_path):
    (tmp_path / "annotations").mkdir()
    box = {"category_id": 1, "bbox": [0, 0, 50, 100], "iscrowd": 0}
    instances = {
        "images": [{"id": picture.image_id, "width": 100, "height": 100} for picture in PICTURES],
        "categories": [{"id": 1, "name": name} for name in ["word1"]],
        "annotations": [{"id": i, "image_id": picture.image_id, **box} for i, picture in enumerate(PICTURES, 1)],
    }
    (tmp_path / "annotations" / "instances_train2014.json").write_text(json.dumps(instances))
    evaluate_tiny(tiny, features, "validation", tmp_path / "out", coco_dir=str(tmp_path))
    metrics = json.loads((tmp_path / "out" / "metrics_validation.json").read_text())
    assert metrics["greedy"]["attention"].keys() == {"words", "inside", "chance", "absent"}
    (tmp_path / "annotations" / "instances_train2014.json").unlink()
    evaluate_tiny(tiny, features, "validation", tmp_path / "out", coco_dir=str(tmp_path))
    assert "attention" not in json.loads((tmp_path / "out" / "metrics_validation.json").read_text())["greedy"]
