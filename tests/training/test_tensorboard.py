import importlib.util
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from captioning.decoder.generated_caption import GeneratedCaption
from captioning.settings import make_config
from captioning.training import tensorboard as module
from captioning.training.tensorboard import log_epoch, tensorboard_log
from support.errors import UserError

PREDICTIONS = [
    GeneratedCaption(pathlib.Path(f"/images/{name}.jpg"), name, ["a", name], np.zeros(2), np.ones((2, 64)))
    for name in ("dog", "tüür")
]


def row(epoch):
    return {"epoch": epoch, "train_loss": 2.0 / epoch, "captions_per_second": 50.0, "validation_loss": 3.0 / epoch}


def events(folder):
    """dict of (step, tag) to a number or a text, from all event files of a folder."""
    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                content = tf.make_ndarray(value.tensor)
                assert (event.step, value.tag) not in found
                found[event.step, value.tag] = content.item()
    return found


def test_by_default_there_is_no_writer_and_nothing_is_written(tmp_path):
    with tensorboard_log(make_config({"run_dir": str(tmp_path)})) as writer:
        assert writer is None
        log_epoch(writer, row(1), 0.1, PREDICTIONS)
    assert list(tmp_path.iterdir()) == []


def test_losses_the_learning_rate_and_samples_are_events_also_of_a_run_that_is_continued(tmp_path):
    pytest.importorskip("tensorboard")
    config = make_config({"run_dir": str(tmp_path), "tensorboard": "yes"})
    with tensorboard_log(config) as writer:
        log_epoch(writer, row(1), 0.5, PREDICTIONS)
        assert len(events(tmp_path / "tensorboard")) == 6  # as soon as an epoch is done
    with tensorboard_log(config) as writer:
        log_epoch(writer, row(2), 0.25, PREDICTIONS)
    expected = {}
    for epoch in (1, 2):
        expected |= {(epoch, "train_loss"): 2 / epoch, (epoch, "validation_loss"): 3 / epoch}
        expected |= {(epoch, "learning_rate"): 0.5 / epoch, (epoch, "captions_per_second"): 50}
        expected |= {(epoch, "dog.jpg"): b"a dog", (epoch, "tüür.jpg"): "a tüür".encode()}
    assert events(tmp_path / "tensorboard") == pytest.approx(expected)


def test_the_file_is_closed_when_training_stops(tmp_path):
    pytest.importorskip("tensorboard")
    config = make_config({"run_dir": str(tmp_path), "tensorboard": "yes"})
    with pytest.raises(KeyboardInterrupt), tensorboard_log(config) as writer:
        log_epoch(writer, row(1), 0.5, [])
        raise KeyboardInterrupt
    assert len(events(tmp_path / "tensorboard")) == 4


def test_of_several_workers_only_the_chief_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "is_chief", lambda: False)
    with tensorboard_log(make_config({"run_dir": str(tmp_path), "tensorboard": "yes"})) as writer:
        assert writer is None
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = make_config({"run_dir": str(tmp_path), "tensorboard": "yes"})
    with pytest.raises(UserError, match="pip install tensorboard") as raised, tensorboard_log(config):
        pass
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    with tensorboard_log(make_config({"run_dir": str(tmp_path)})) as writer:  # which needs none
        assert writer is None
