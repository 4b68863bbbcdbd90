"""The three scripts with a CNN other than the default's: sizes, figure, page and exports follow, and none are mixed."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import data_utils
import inference_image_caption as inference
import train_image_caption_model
from captioning.settings import read_saved_settings
from conftest import SMALL
from support.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small demo, prepared and trained with MobileNetV3Large; tests only read it."""
    root = pathlib.Path(tmp_path_factory.mktemp("mobilenet"))
    data_utils.main([*places(root), "--cnn", "MobileNetV3Large"])
    train_image_caption_model.main([*places(root), "--epochs", "1"])  # which finds the CNN in the data
    return root


def places(root):
    folders = {"coco_dir": root / "scenes", "data_dir": root / "data", "run_dir": root / "run"}
    given = [part for name, path in folders.items() for part in (f"--{name}", str(path))]
    return ["--dataset", "demo", *given, "--demo_images", "12", *SMALL]


def an_image(root):
    return sorted((root / "scenes" / "train2014").glob("*.jpg"))[0]


def caption_own(root, output, *more):
    inference.main(["--run_dir", str(root / "run"), "--image", str(an_image(root)), "--output", str(output), *more])
    (line,) = (output / "captions.jsonl").read_text().splitlines()
    return json.loads(line)


def test_features_settings_and_maps_have_its_sizes(root, tmp_path, capsys):
    paths = list((root / "data" / "features").glob("*.npy"))
    assert len(paths) == 12 and {np.load(path).shape for path in paths} == {(49, 960)}
    assert read_saved_settings(root / "run" / "config.json")["cnn"] == "MobileNetV3Large"

    record = caption_own(root, tmp_path / "a")
    assert "MobileNetV3Large is kept ready in" in capsys.readouterr().out
    assert {len(weights) for weights in record["attention_weights"]} == {49}
    assert (tmp_path / "a" / record["figure"]).stat().st_size > 10_000
    assert 'data-weights="' in (tmp_path / "a" / "index.html").read_text()
    again = caption_own(root, tmp_path / "b")
    assert "kept ready" not in capsys.readouterr().out  # the graph beside the run was taken
    assert (again["caption"], again["attention_weights"]) == (record["caption"], record["attention_weights"])


def test_exports_say_what_the_script_says(root, tmp_path):
    caption = caption_own(root, tmp_path / "own", "--figures", "0", "--extract_precision", "float32")["caption"]
    export = ["--run_dir", str(root / "run"), "--export"]
    inference.main([*export, str(tmp_path / "saved")])
    model = tf.saved_model.load(str(tmp_path / "saved")).signatures["one"]
    answer = model(image=tf.constant(an_image(root).read_bytes()))
    assert answer["attention_weights"].shape[1] == 49
    assert answer["caption"].numpy().decode() == caption

    inference.main([*export, str(tmp_path / "bundle"), "--format", "litert", "--weights", "float32"])
    sizes = json.loads((tmp_path / "bundle" / "captioner.json").read_text())["sizes"]
    assert (sizes["image"], sizes["locations"], sizes["channels"]) == (224, 49, 960)
    readme = (tmp_path / "bundle" / "README.md").read_text()
    assert "RGB squeezed to 224 x 224" in readme and "over 7 x 7 locations" in readme and "SIZE" not in readme
    script = [sys.executable, tmp_path / "bundle" / "caption.py", an_image(root), "--figure", tmp_path / "figure.png"]
    ended = subprocess.run(script, capture_output=True, text=True)
    assert ended.stdout == f"{an_image(root)}: {caption}\n", ended.stderr
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_features_and_runs_of_two_networks_do_not_mix(root, trained, tmp_path):
    with pytest.raises(UserError, match=r"features of another network \(MobileNetV3Large, .*: give the --cnn"):
        caption_own(root, tmp_path, "--cnn", "EfficientNetV2B0")
    with pytest.raises(UserError, match="prepared with --cnn MobileNetV3Large, not VGG16: give --cnn MobileNetV3Large"):
        inference.main(["--run_dir", str(root / "run"), "--cnn", "VGG16"])
    other_data = ["--run_dir", str(root / "run"), "--data_dir", str(trained / "data")]
    with pytest.raises(UserError, match=r"another network \(MobileNetV3Large, .*\) than .*\(made elsewhere"):
        inference.main(other_data)
    with pytest.raises(UserError, match=r"made by another network \(MobileNetV3Large, .*\(EfficientNetV2B0, .*delete"):
        data_utils.main([*places(root), "--cnn", "EfficientNetV2B0"])
