"""A folder may be called anything: TensorFlow takes some paths that it reads for patterns."""

import gc
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow as tf

from captioning.export import bundle as export_bundle
from captioning.export import saved_model as export
from captioning.features.cnn import CNNS
from captioning.features.feature_files import read_feature
from captioning.training.checkpoints import _readable_path, restore_newest, save_checkpoint
from captioning.training.tensorboard import log_epoch, tensorboard_log
from config import Config
from support.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ["a[1] b", "[ab]", "[", "a\\b", "a*b", "a?b", "{a,b}", 'it\'s "é" #%20']


@pytest.fixture(params=NAMES)
def folder(request, tmp_path):
    """An empty folder of such a name."""
    (tmp_path / request.param).mkdir()
    return tmp_path / request.param


def checkpoint_of(value):
    return tf.train.Checkpoint(weight=tf.Variable(value))


def test_a_checkpoint_is_read_where_it_was_written(folder):
    save_checkpoint(checkpoint_of(1.0), folder, 1)
    objects = checkpoint_of(0.0)
    assert restore_newest(objects, [folder]) == folder / "ckpt-1"
    assert objects.weight.numpy() == 1.0


def test_what_is_added_to_objects_later_is_restored_too(folder):
    """As the loss scale is."""
    save_checkpoint(checkpoint_of(1.0), folder, 1)
    objects = tf.train.Checkpoint()
    restore_newest(objects, [folder])
    gc.collect()
    objects.weight = tf.Variable(0.0)
    assert objects.weight.numpy() == 1.0


def test_the_link_goes_with_what_was_restored(folder):
    objects = checkpoint_of(0.0)
    path = _readable_path(folder / "ckpt-1", objects)
    assert path == folder / "ckpt-1" or path.parent.resolve() == folder.resolve()
    del objects
    gc.collect()
    assert path == folder / "ckpt-1" or not path.parent.parent.exists()


def test_features_and_events_are_read_and_written_there(folder):
    shape = CNNS["InceptionV3"].feature_shape
    np.save(folder / "1.npy", np.ones(shape, np.float16))
    assert tf.reduce_all(read_feature(str(folder / "1.npy"), shape, "float16") == 1)
    pytest.importorskip("tensorboard")
    with tensorboard_log(types.SimpleNamespace(tensorboard="yes", run_dir=str(folder))) as writer:
        log_epoch(writer, {"epoch": 1, "loss": 1.0}, 0.1, [])
    assert list((folder / "tensorboard").iterdir())


def test_a_saved_model_can_be_loaded_or_is_refused_before_anything_is_written(folder, monkeypatch):
    def write(captioner, network, config, target):
        module = tf.Module()
        module.weight = tf.Variable(1.0)
        tf.saved_model.save(module, str(target))

    monkeypatch.setattr(export, "_write_saved_model", write)
    try:
        export.export_captioner(None, None, Config(), str(folder / "model"))
    except UserError as error:
        assert "give another --export" in str(error)
        assert not list(folder.iterdir())
    else:
        assert tf.saved_model.load(str(folder / "model")).weight.numpy() == 1.0


def test_a_bundle_is_written_there(tmp_path):
    (tmp_path / "a[1] b").mkdir()
    model = types.SimpleNamespace(weights=[])
    double = tf.function(lambda x: {"y": 2 * x}, input_signature=[tf.TensorSpec((1,), name="x")])
    functions = dict.fromkeys(("encoder", "decoder", "evidence"), double)
    captioner = types.SimpleNamespace(encoder=model, decoder=model)
    export_bundle._write_litert(functions, captioner, "float32", None, tmp_path / "a[1] b")
    assert {path.name for path in (tmp_path / "a[1] b").iterdir()} == {"encoder.tflite", "decoder.tflite"}


@pytest.mark.slow
def test_the_three_scripts_in_a_folder_of_such_a_name(tmp_path):
    root = tmp_path / "a[1] b"
    places = {"coco_dir": root / "scenes", "data_dir": root / "data[2]", "run_dir": root / "run*[3]"}
    places["features_dir"] = root / "{features}[4]"
    argv = ["--dataset", "demo", *(part for name, path in places.items() for part in (f"--{name}", str(path)))]
    argv += ["--demo_images", "12", "--val_fraction", "0.2"]
    argv += ["--units", "32", "--plot_images", "2", "--tensorboard", "yes"]

    def run(script, *more):
        ended = subprocess.run([sys.executable, script, *argv, *more], cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
        return ended.stdout

    run("data_utils.py")
    run("train_image_caption_model.py", "--epochs", "1")
    assert "after epoch 1" in run("train_image_caption_model.py", "--epochs", "2")
    run("inference_image_caption.py")
    lines = (root / "run*[3]" / "captions" / "captions.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"].startswith(str(root)) for line in lines] == [True, True]
    image = next((root / "scenes" / "train2014").glob("*.jpg"))
    run("inference_image_caption.py", "--image", str(image), "--output", str(root / "own[5]"))
    assert (root / "own[5]" / "captions.jsonl").exists()
