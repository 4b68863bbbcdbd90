"""The three scripts as a user runs them, one process each: on a small demo, and on real photographs where they are."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
WEIGHTS = SHARED / "weights" / "inception_v3_notop.weights.h5"


def run(script, *argv, cwd=ROOT):
    done = subprocess.run([sys.executable, ROOT / script, *argv], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def check_figures(folder, count):
    figures = sorted(folder.glob("*.png"))
    assert len(figures) == count
    for figure in figures:
        with Image.open(figure) as image:
            assert image.width > 200
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert len(lines) == count
    return lines


def test_a_small_demo_from_drawing_to_figures(tmp_path):
    places = ["--coco_dir", str(tmp_path / "scenes"), "--data_dir", str(tmp_path), "--run_dir", str(tmp_path / "run")]
    argv = ["--dataset", "demo", *places, "--demo_images", "30", "--epochs", "2", "--plot_images", "2"]
    assert "27 images, 135 captions" in run("data_utils.py", *argv)
    assert "30 of 30 are in" in run("data_utils.py", *argv)
    run("train_image_caption_model.py", *argv)
    out = run("inference_image_caption.py", *argv)
    assert out.count("generated") == 2
    check_figures(tmp_path / "run" / "captions", 2)

    image = tmp_path / os.fsdecode(b"caf\xe9.jpg")  # not UTF-8
    next((tmp_path / "scenes" / "train2014").glob("*.jpg")).rename(image)
    run("inference_image_caption.py", *argv, "--image", str(image), "--output", str(tmp_path / "own"))
    (own,) = check_figures(tmp_path / "own", 1)
    assert own["image"] == str(image)

    run("inference_image_caption.py", *argv, "--export", str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "saved_model.pb").exists()

    out = run("inference_image_caption.py", *argv, "--evaluate")
    metrics = json.loads((tmp_path / "run" / "captions" / "metrics_validation.json").read_text())
    assert {"greedy", "beam 3", "beam 5"} <= metrics.keys()
    for name in ("BLEU-4", "CIDEr", "ROUGE-L"):
        assert name in out
        assert metrics["greedy"][name] >= 0
    assert 0 <= metrics["greedy"]["scenes"]["objects"] <= 1
    assert "inside" in metrics["greedy"]["attention"]["maps"]["attention weights"]  # None where no object was named


def test_a_run_folder_moved_alone_to_an_empty_place_captions_an_image(tmp_path):
    """Its network has random weights, whose statistics come from the data."""
    old, new = tmp_path / "old", tmp_path / "new"
    places = ["--coco_dir", str(old / "scenes"), "--data_dir", str(old / "data"), "--run_dir", str(old / "run")]
    argv = ["--dataset", "demo", *places, "--demo_images", "12", "--epochs", "1", "--units", "32"]
    run("data_utils.py", *argv)
    run("train_image_caption_model.py", *argv)
    image = next((old / "scenes" / "train2014").glob("*.jpg"))
    own = ["--image", str(image), "--output", str(tmp_path / "before")]
    assert "InceptionV3 is kept ready" in run("inference_image_caption.py", *argv, *own)
    (before,) = check_figures(tmp_path / "before", 1)
    assert "kept ready" not in run("inference_image_caption.py", *argv, *own, "--anew")
    assert check_figures(tmp_path / "before", 1) == [before]

    new.mkdir()
    shutil.move(image, new / "a.jpg")
    shutil.move(old / "run", new / "runs" / "x")
    shutil.rmtree(old)
    run("inference_image_caption.py", "--run_dir", "runs/x", "--image", "a.jpg", cwd=new)
    (after,) = check_figures(new / "runs" / "x" / "captions", 1)
    assert after == {**before, "image": "a.jpg", "file": str(new / "a.jpg"), "figure": after["figure"]}


@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs ../shared: real photographs and pretrained weights")
def test_real_photographs_in_coco_2017_layout(tmp_path):
    argv = ["--coco_dir", str(SHARED / "coco_mini"), "--coco_split", "train2017", "--inception_weights", str(WEIGHTS)]
    argv += ["--data_dir", str(tmp_path / "data"), "--run_dir", str(tmp_path / "run"), "--num_examples", "24"]
    argv += ["--units", "64"]
    run("data_utils.py", *argv)
    run("train_image_caption_model.py", *argv, "--epochs", "2")
    run("inference_image_caption.py", "--run_dir", str(tmp_path / "run"), "--plot_images", "2")
    check_figures(tmp_path / "run" / "captions", 2)
