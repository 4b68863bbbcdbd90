import errno
import math
import os
import pathlib
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from captioning.training import checkpoints
from captioning.training.checkpoints import (
    _checkpoint_number,
    captioner_checkpoint,
    list_checkpoints,
    restore_newest,
    save_checkpoint,
)
from captioning.training.state import Progress, TrainingState, check_finite
from conftest import full_disk
from support.errors import UserError


def make_objects(value=0.0, size=3):
    return tf.train.Checkpoint(weight=tf.Variable(tf.fill((size,), value)), progress=Progress())


def save(folder, *numbers):
    """Save a checkpoint of each number, whose weight is that number."""
    for number in numbers:
        save_checkpoint(make_objects(float(number)), folder, number)


def names(folder):
    return {path.name.partition(".")[0] for path in folder.iterdir()}


# --- Progress -----------------------------------------------------------------------------------------------------


ROW = {"epoch": 1, "train_loss": 2.5, "captions_per_second": 100.0, "validation_loss": 2.25}


@pytest.mark.parametrize(
    "progress",
    [
        Progress(),  # its best loss is infinite
        Progress(2, 1, 2.25, 2**32 - 1, 48, 12.5, 5.0, 0.1, 3, [ROW, {**ROW, "epoch": 2}]),
    ],
)
def test_progress_comes_back_from_a_checkpoint(tmp_path, progress):
    tf.train.Checkpoint(progress=progress).write(tmp_path / "ckpt-1")
    restored = Progress(epoch=9, history=[{"epoch": 7}])
    tf.train.Checkpoint(progress=restored).read(tmp_path / "ckpt-1").assert_consumed()
    assert vars(restored).items() >= {name: getattr(progress, name) for name in Progress.__dataclass_fields__}.items()
    assert restored.history == progress.history


def test_each_progress_has_a_history_of_its_own():
    Progress().history.append(ROW)
    assert Progress().history == []
    assert Progress().best_loss == math.inf


# --- Saving -------------------------------------------------------------------------------------------------------


def test_two_checkpoints_are_kept_and_the_newest_is_restored(tmp_path):
    save(tmp_path / "last", 1, 2, 9, 10)
    assert names(tmp_path / "last") == {"ckpt-9", "ckpt-10"}
    assert [path.name for path in list_checkpoints(tmp_path / "last")] == ["ckpt-10", "ckpt-9"]
    objects = make_objects()
    assert restore_newest(objects, [tmp_path / "last"]) == tmp_path / "last" / "ckpt-10"
    assert objects.weight.numpy().tolist() == [10, 10, 10]


def test_what_a_killed_or_failed_save_left_goes_with_the_next(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "ckpt-3_temp").mkdir()
    (tmp_path / "ckpt-3_temp" / "part").write_bytes(b"half")
    (tmp_path / "ckpt-3.data-00000-of-00001").write_bytes(b"half")
    save(tmp_path, 3)
    assert names(tmp_path) == {"ckpt-2", "ckpt-3"}
    assert not (tmp_path / "ckpt-3_temp").exists()


def test_checkpoints_of_an_epoch_that_is_done_anew_are_replaced(tmp_path):
    """The run went back, as `last` was damaged: what is newer than this epoch was of the other course."""
    save(tmp_path, 4, 5)
    save_checkpoint(make_objects(-3.0), tmp_path, 3)
    objects = make_objects()
    restore_newest(objects, [tmp_path])
    assert objects.weight.numpy().tolist() == [-3, -3, -3]


def test_of_several_workers_only_the_chief_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "is_chief", lambda: False)
    save(tmp_path / "last", 1)
    assert not (tmp_path / "last").exists()


def test_a_full_disk_is_one_line_and_the_checkpoints_before_stay(tmp_path):
    save(tmp_path, 1, 2)
    with full_disk(2_000), pytest.raises(UserError) as raised:
        save_checkpoint(make_objects(size=10_000), tmp_path, 3)
    text = str(raised.value)
    assert text.startswith(f"cannot write {tmp_path / 'ckpt-3'}: {os.strerror(errno.EFBIG)} (")
    assert text.endswith(" MB free there; make room and run the same command again)")
    assert names(tmp_path) == {"ckpt-1", "ckpt-2"}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "last").write_text("a file in its place")
    with pytest.raises(UserError, match="cannot write .*last/ckpt-1") as raised:
        save_checkpoint(make_objects(), tmp_path / "last", 1)
    assert "\n" not in str(raised.value)


def edit_model(path, monkeypatch):
    """Let the file at `path` be model.py, as a process that starts now finds it."""
    monkeypatch.setattr(checkpoints.model, "__file__", str(path))
    checkpoints.model_digest.cache_clear()


def test_weights_of_another_model_file_are_told(tmp_path, monkeypatch, capsys):
    """They may fit it, as those of another score without weights do, and mean nothing to it."""
    monkeypatch.setattr(checkpoints.model, "__file__", checkpoints.model.__file__)
    code = pathlib.Path(checkpoints.model.__file__).read_text(encoding="utf-8")
    folder, path = tmp_path / "run" / "last", tmp_path / "edited.py"
    save(folder, 1)
    path.write_text(code.replace("tf.tanh(keys", "tf.nn.relu(keys"), encoding="utf-8")
    restore_newest(make_objects(), [folder])  # this process still has the one it began with
    assert capsys.readouterr().out == ""
    try:
        edit_model(path, monkeypatch)
        restore_newest(make_objects(), [folder])
        (note,) = capsys.readouterr().out.splitlines()
        assert note.startswith("note: model.py has changed since last/ckpt-1 was trained") and "train anew" in note
        save(folder, 2)
        restore_newest(make_objects(), [folder])
        path.write_text("# why\n\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
        edit_model(path, monkeypatch)
        restore_newest(make_objects(), [folder])
        (folder / "ckpt-2.json").write_text("damaged")
        restore_newest(make_objects(), [folder])
        (folder / "ckpt-2.json").unlink()
        restore_newest(make_objects(), [folder])
        assert capsys.readouterr().out == ""
    finally:
        checkpoints.model_digest.cache_clear()


# --- Restoring ----------------------------------------------------------------------------------------------------


def test_without_a_checkpoint_nothing_is_restored(tmp_path):
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "ckpt-3.data-00000-of-00001").write_bytes(b"half")  # of the first save, which was killed
    objects = make_objects(7.0)
    assert restore_newest(objects, [tmp_path / "none", tmp_path / "last"]) is None
    assert objects.weight.numpy().tolist() == [7, 7, 7]


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "other bytes": lambda path: path.write_bytes(path.read_bytes()[:5] + bytes(9) + path.read_bytes()[14:]),
    "a folder": lambda path: path.unlink() or path.mkdir(),
}


@pytest.mark.parametrize(
    ("ending", "damage"),
    [(ending, name) for ending in (".index", ".data-00000-of-00001") for name in DAMAGES]
    + [(".data-00000-of-00001", "missing")],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, capsys, ending, damage):
    save(tmp_path, 1, 2)
    spoil = {**DAMAGES, "missing": os.unlink}[damage]
    spoil(tmp_path / f"ckpt-2{ending}")
    objects = make_objects()
    assert restore_newest(objects, [tmp_path]) == tmp_path / "ckpt-1"
    assert objects.weight.numpy().tolist() == [1, 1, 1]
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'ckpt-2'} cannot be read" in printed
    assert printed.endswith(f": {tmp_path.name}/ckpt-1 is taken instead\n")

    spoil(tmp_path / f"ckpt-1{ending}")
    with pytest.raises(UserError, match="ckpt-2 cannot be read") as raised:
        restore_newest(objects, [tmp_path])
    assert "\n" not in str(raised.value)


def test_a_damaged_best_leaves_the_last_which_is_named(tmp_path, capsys):
    save(tmp_path / "best", 1)
    save(tmp_path / "last", 1, 2)
    (tmp_path / "best" / "ckpt-1.index").write_bytes(b"damaged")
    objects = make_objects()
    assert restore_newest(objects, [tmp_path / "best", tmp_path / "last"]) == tmp_path / "last" / "ckpt-2"
    assert objects.weight.numpy().tolist() == [2, 2, 2]
    assert "last/ckpt-2 is taken instead" in capsys.readouterr().out


def test_a_checkpoint_of_other_objects_is_not_taken_for_one_of_these(tmp_path):
    save(tmp_path, 1)
    other = tf.train.Checkpoint(bias=tf.Variable(1.0))
    with pytest.raises(UserError, match="ckpt-1 does not fit model.py: it has no weights for all of it$"):
        restore_newest(other, [tmp_path])


def test_what_does_not_fit_a_changed_model_is_named(tmp_path):
    """In words of the user's, not in those of TensorFlow, which would print weights."""

    def make(size, *names):
        return tf.train.Checkpoint(layers=[keras.Variable(tf.zeros(size), name=name) for name in names])

    save_checkpoint(make(3, "a"), tmp_path, 1)
    with pytest.raises(UserError, match=r"ckpt-1 does not fit model.py: it has no weights for \w+$"):
        restore_newest(make(3, "a", "b"), [tmp_path])
    with pytest.raises(
        UserError,
        match=r"ckpt-1 does not fit model.py and the vocabulary: \w+ has the shape \(4,\) by them, and \(3,\) in the",
    ):
        restore_newest(make(4, "a"), [tmp_path])


def test_files_of_the_user_are_no_checkpoints_and_stay(tmp_path):
    save(tmp_path, 3)
    own = ["ckpt-final.index", "ckpt-3 (copy).index", "ckpt-.index", "checkpoint", "ckpt-3 (copy).data-00000-of-00001"]
    own += ["ckpt-3.index.bak", "ckpt-3.txt", "ckpt-03.index", "ckpt-3.data-00000-of-00001.gz", "ckpt-3.data"]
    own += ["ckpt-3", "ckpt-2_temp", "ckpt-notes.txt"]
    for name in own:
        (tmp_path / name).write_bytes(b"")
    own += ["ckpt-2", "ckpt-3.old/ckpt-3.index"]  # folders
    for name in own[-2:]:
        (tmp_path / name).mkdir(parents=True)
    assert [_checkpoint_number(path) for path in list_checkpoints(tmp_path)] == [3]
    save(tmp_path, 4, 5)
    assert not (tmp_path / "ckpt-3.index").exists()
    assert [_checkpoint_number(path) for path in list_checkpoints(tmp_path)] == [5, 4]
    assert all((tmp_path / name).exists() for name in own)


# --- States that count as good ------------------------------------------------------------------------------------


class Model(tf.Module):
    """What a TrainingState needs of encoder and decoder."""

    detector = types.SimpleNamespace(trainable_variables=[])

    def __init__(self, *values):
        super().__init__()
        self.trainable_variables_ = [tf.Variable(value) for value in values]

    @property
    def trainable_variables(self):
        return self.trainable_variables_


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_not_good(bad):
    optimizer = tf.Module()
    check_finite(TrainingState(Model([1.0, 2.0]), Model([[3.0]]), optimizer))
    for models in ((Model([1.0, bad]), Model([[3.0]])), (Model([1.0, 2.0]), Model([[3.0]], [1.0, bad]))):
        with pytest.raises(UserError, match="no longer finite numbers: lower --learning_rate"):
            check_finite(TrainingState(*models, optimizer))


def test_a_state_without_loss_scaling_steps_by_its_optimizer():
    state = TrainingState(Model([1.0]), Model([2.0]), tf.Module())
    assert state.scaled_optimizer is state.optimizer
    state.loss_scale = tf.Module()
    assert state.scaled_optimizer is state.loss_scale


def test_best_holds_the_captioner_alone(tmp_path):
    state = TrainingState(Model([1.0]), Model([2.0]), tf.Module())
    state.captioner().write(tmp_path / "ckpt-1")
    stored = [name for name, _ in tf.train.list_variables(str(tmp_path / "ckpt-1"))]
    assert {name.partition("/")[0] for name in stored} == {"encoder", "decoder", "_CHECKPOINTABLE_OBJECT_GRAPH"}
    encoder, decoder = Model([0.0]), Model([0.0])
    captioner_checkpoint(encoder, decoder).read(tmp_path / "ckpt-1").assert_consumed()
    assert (encoder.trainable_variables[0][0], decoder.trainable_variables[0][0]) == (1.0, 2.0)
