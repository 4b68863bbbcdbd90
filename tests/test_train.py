import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import data_utils
import model
import train_image_caption_model as training
from captioning.features.cache import feature_path, features_folder, load_data
from captioning.settings import naming_commands, read_settings
from captioning.training import batches, saving
from captioning.training import samples as epoch_samples
from captioning.training.batches import collect_captions
from captioning.training.checkpoints import list_checkpoints, restore_newest
from captioning.training.optimizer import scheduled_rate
from captioning.training.run_folder import load_captioner
from captioning.training.state import EpochRow, Progress
from conftest import SMALL, full_disk, options, rows, weights
from support.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
CAPTIONS = 95  # to train on, 6 batches of 16


def train(root, *more):
    training.main([*options(root), *more])


def copy_run(trained, root):
    """A copy of the trained run under another root, and the options that continue it there."""
    shutil.copytree(trained / "run", root / "run")
    return ["--run_dir", str(root / "run")]


def settings_of(trained, run, *more):
    return read_settings([*options(trained), "--run_dir", str(run), *more], "")[0]


def saved_progress(root, kind="last"):
    """The Progress in the newest checkpoint."""
    progress = Progress()
    path = list_checkpoints(root / "run" / kind)[0]
    tf.train.Checkpoint(progress=progress).read(path).expect_partial()
    return progress


def losses(root):
    return [[float(row[name]) for name in ("epoch", "train_loss", "validation_loss")] for row in rows(root)]


def check_same_end(root, expected, atol=1e-6):
    theirs = weights(expected)
    for name, value in weights(root).items():
        np.testing.assert_allclose(value, theirs[name], atol=atol, err_msg=name)
    np.testing.assert_allclose(losses(root), losses(expected), atol=1e-5)


def test_the_captioner_learns_the_same_with_the_detector_and_without(trained, monkeypatch):
    """Where gradients are clipped too."""
    config = settings_of(trained, trained / "run", "--clip_norm", "0.1")
    prepared = load_data(config)
    captions, ends = collect_captions(prepared.train, features_folder(config)), []
    for loss in (training.detection_loss, lambda *args: 0.0):
        monkeypatch.setattr(training, "detection_loss", loss)
        state = training.build_state(prepared, "float32", config)
        training.train_epoch(state, captions, 0, config)
        ends.append([weight.numpy() for weight in state.trainable_variables])
    ids = {id(weight) for weight in state.decoder.detector.trainable_variables}
    for weight, mine, theirs in zip(state.trainable_variables, *ends, strict=True):
        if id(weight) in ids:
            assert np.abs(mine - theirs).max() > 1e-3
        else:
            np.testing.assert_allclose(mine, theirs, atol=1e-6, err_msg=weight.path)


def after_each_step(monkeypatch, function, step="train_step"):
    """Have the results of the training's steps pass through function(state, number of the step, loss)."""
    real, count = getattr(training, step), []

    def call(state, *args):
        count.append(1)
        return function(state, len(count), real(state, *args))

    monkeypatch.setattr(training, step, call)


# --- The data's settings ------------------------------------------------------------------------------------------


def training_config(monkeypatch, *argv):
    """The settings that script 2 trains with."""
    seen = []
    monkeypatch.setattr(training, "train_captioner", seen.append)
    training.main(list(argv))
    return seen[0]


def test_training_takes_from_the_data_what_they_were_prepared_with(trained, tmp_path, monkeypatch):
    """Only --data_dir is typed; the rest is as if all had been."""
    own = ["--run_dir", str(tmp_path), *SMALL]
    taken = training_config(monkeypatch, "--data_dir", str(trained / "data"), *own)
    assert (taken.num_examples, taken.inception_weights) == (None, "random")
    assert taken.coco_dir == str(trained / "coco")
    assert taken == training_config(monkeypatch, *options(trained), *own)


def test_a_contradiction_to_the_data_is_one_line(trained, tmp_path):
    given = ["--data_dir", str(trained / "data"), "--run_dir", str(tmp_path / "run"), "--vocab_size", "7"]
    with pytest.raises(UserError, match="was prepared with --vocab_size 5000, not 7: give --vocab_size 5000") as raised:
        training.main(given)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_training_before_preparing_names_the_command(tmp_path):
    with pytest.raises(UserError, match="run python data_utils.py"):
        train(tmp_path)


# --- What training leaves -----------------------------------------------------------------------------------------


def test_training_leaves_checkpoints_history_and_a_loss_curve(trained):
    assert [row["epoch"] for row in rows(trained)] == ["1", "2"]
    train_losses = [float(row["train_loss"]) for row in rows(trained)]
    assert train_losses[1] < train_losses[0] < np.log(21)  # 21 words: it starts better than guessing
    for kind in ("last", "best"):
        assert weights(trained, kind)
    assert any(name.startswith("optimizer") for name in weights(trained))
    assert not any(name.startswith("optimizer") for name in weights(trained, "best"))
    vocabulary = json.loads((trained / "data" / "vocabulary.json").read_text())
    assert json.loads((trained / "run" / "vocabulary.json").read_text()) == vocabulary
    assert json.loads((trained / "run" / "config.json").read_text())["units"] == 16
    with Image.open(trained / "run" / "loss.png") as figure:
        assert figure.width > 300
        assert len(figure.convert("RGB").getcolors(10**6)) > 10


def test_the_checkpoint_holds_the_history(trained):
    progress = saved_progress(trained)
    written = [{name: "" if value is None else str(value) for name, value in row.items()} for row in progress.history]
    assert written == rows(trained)
    assert (progress.epoch, progress.saves, progress.captions_done) == (2, 2, CAPTIONS)
    assert progress.best_loss == min(row["validation_loss"] for row in progress.history)


def test_training_starts_at_the_frequencies_of_words(trained, tmp_path):
    config = settings_of(trained, tmp_path)
    prepared = load_data(config)
    captions = collect_captions(prepared.train, features_folder(config))
    counts = np.zeros(len(prepared.vocabulary))
    for image in prepared.train:
        for words in image.encoded_captions:
            for word in words[1:]:
                counts[word] += 1
    shares = counts / counts.sum() / 2 + 0.5 / len(counts)
    state = training.open_run(prepared, config)
    output_layer = state.decoder.output_layer
    np.testing.assert_allclose(tf.nn.softmax(output_layer.bias), shares, rtol=1e-4)
    output_layer.kernel.assign(0 * output_layer.kernel)
    entropy = -np.sum(counts * np.log(shares)) / np.sum(counts)
    assert training.validate(state, captions, config) == pytest.approx(entropy, abs=1e-4)


# --- Continuing ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stopping_and_continuing_gives_the_weights_of_one_run(trained, tmp_path):
    """Two epochs, then two more, against four in one go; dropout is on and must go on where it stopped."""
    for name, epochs in (("stopped", (2, 4)), ("whole", (4,))):
        for last in epochs:
            run = ["--run_dir", str(tmp_path / name / "run"), "--schedule", "constant"]  # the other goes by --epochs
            train(trained, *run, "--epochs", str(last))
    check_same_end(tmp_path / "stopped", tmp_path / "whole", atol=1e-5)
    assert [row["epoch"] for row in rows(tmp_path / "stopped")] == ["1", "2", "3", "4"]

    before = weights(tmp_path / "stopped")
    train(trained, *run[2:], "--run_dir", str(tmp_path / "stopped" / "run"), "--epochs", "4")  # all done
    for name, value in weights(tmp_path / "stopped").items():
        np.testing.assert_array_equal(value, before[name])


def test_a_run_goes_on_with_other_settings_at_the_rate_of_its_epoch(trained, tmp_path, capsys, monkeypatch):
    """A finished run of 2 epochs goes on to 6 with batches of another size; its history.csv was damaged meanwhile."""
    again = copy_run(trained, tmp_path)
    (tmp_path / "run" / "history.csv").write_bytes(b"epoch\n\xff\0 3,9.9,9.9,9.9,\n")
    rates = []
    after_each_step(monkeypatch, lambda state, number, loss: rates.append(float(state.optimizer.learning_rate)) or loss)
    train(trained, *again, "--epochs", "6", "--batch_size", "48")

    config = settings_of(trained, tmp_path, "--epochs", "6")
    expected = [scheduled_rate(config, epoch + done / CAPTIONS) for epoch in range(2, 6) for done in (0, 48)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert rates == sorted(rates, reverse=True) and 0.7 * config.learning_rate < rates[0] and rates[-1] > 0
    printed = capsys.readouterr().out
    assert f"continuing {tmp_path / 'run'} after epoch 2; learning rate 0.0075, cosine over 6 epochs" in printed
    assert "continuing with --batch_size 48; the run had 16 before" in printed
    assert "continuing with --epochs 6; the run had 2 before" in printed
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2", "3", "4", "5", "6"]
    assert losses(tmp_path)[:2] == losses(trained)


def test_a_new_run_says_its_rate(trained, tmp_path, capsys):
    config = settings_of(trained, tmp_path, "--schedule", "constant")
    training.announce_start(types.SimpleNamespace(progress=Progress()), None, config)
    assert capsys.readouterr().out == "training begins; learning rate 0.01, constant over 8 epochs\n"


@pytest.mark.slow
def test_3_of_8_epochs_at_one_batch_size_go_on_at_another(trained, tmp_path, monkeypatch):
    run = ["--run_dir", str(tmp_path / "run"), "--epochs", "8", "--patience", "99"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 3 * 8 + 1)  # 6 training and 2 validation batches an epoch
        train(trained, *run)
    assert saved_progress(tmp_path).epoch == 3
    rates = []
    after_each_step(monkeypatch, lambda state, number, loss: rates.append(float(state.optimizer.learning_rate)) or loss)
    train(trained, *run, "--batch_size", "64")
    assert len(rates) == 2 * 5
    assert rates[0] == pytest.approx(0.01 * (1 + np.cos(np.pi * 3 / 8)) / 2)  # 0.7 of it; it was 0 by steps
    assert rates == sorted(rates, reverse=True)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_patience_ends_the_run(coco, capsys):
    data_utils.main(options(coco))
    train(coco, "--epochs", "40", "--learning_rate", "0.1", "--patience", "2")  # far too large: it soon gets worse
    validation = [row[2] for row in losses(coco)]
    best = int(np.argmin(validation)) + 1
    assert len(validation) == best + 2 < 40
    assert "stopping" in capsys.readouterr().out
    assert list_checkpoints(coco / "run" / "best")[0].name == f"ckpt-{best}"
    assert list_checkpoints(coco / "run" / "last")[0].name == f"ckpt-{best + 2}"


def test_another_vocabulary_or_size_is_refused_and_both_are_named(trained, tmp_path):
    again = copy_run(trained, tmp_path)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError, match="--units 16, not 20"):
        train(trained, *again, "--units", "20", "--epochs", "3")
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    (tmp_path / "run" / "vocabulary.json").write_text(json.dumps(["<pad>", "<unk>", "<start>", "<end>", "word"]))
    with pytest.raises(UserError, match=r"another vocabulary \(5 words\) than .* \(21 words\)"):
        train(trained, *again, "--epochs", "3")


def content(folder):
    """Dict of path to bytes, of all files in a folder but locks."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize("words", ["the same", "others"])
def test_a_run_without_last_is_refused_and_stays_as_it_is(trained, tmp_path, words):
    """As it may have been given to others. The other data have as many words."""
    copy_run(trained, tmp_path)
    shutil.rmtree(tmp_path / "run" / "last")
    before = content(tmp_path / "run")
    config = settings_of(trained, tmp_path / "run")
    prepared = load_data(config)
    if words == "others":
        prepared = dataclasses.replace(prepared, vocabulary=[*prepared.vocabulary[:-1], "another"])
    with (
        pytest.raises(UserError, match="holds best/ckpt-2 and no checkpoint in last/ .*: give another --run_dir"),
        naming_commands(config),
    ):
        training.open_run(prepared, config)
    assert content(tmp_path / "run") == before


def test_a_run_that_an_edited_model_does_not_fit_is_refused_and_stays_as_it_is(trained, tmp_path, monkeypatch):
    class Another(model.CNN_Encoder):
        def __init__(self, *given):
            super().__init__(*given)
            self.add_weight(shape=(3,), name="another")

    again = copy_run(trained, tmp_path)
    before = content(tmp_path / "run")
    monkeypatch.setattr(model, "CNN_Encoder", Another)
    with pytest.raises(UserError, match=r"does not fit model\.py"):
        train(trained, *again, "--epochs", "3")
    assert content(tmp_path / "run") == before


def test_a_first_epoch_that_is_killed_between_best_and_last_can_be_continued(trained, tmp_path, monkeypatch):
    config = settings_of(trained, tmp_path / "run", "--epochs", "1")
    prepared = load_data(config)
    state = training.open_run(prepared, config)
    state.progress.captions_done = CAPTIONS
    monkeypatch.setattr(saving, "save_last", lambda state, run_dir: cut_power())
    with pytest.raises(PowerCut):
        saving.save_epoch(state, dataclasses.replace(ROW, epoch=1), config)
    assert list_checkpoints(tmp_path / "run" / "best")
    progress = training.open_run(prepared, config).progress
    assert (progress.epoch, progress.captions_done, progress.history) == (0, CAPTIONS, [])


@pytest.mark.slow
def test_a_run_that_has_lost_its_checkpoints_begins_anew_and_says_so(trained, tmp_path, capsys):
    again = copy_run(trained, tmp_path)
    for kind in ("last", "best"):
        shutil.rmtree(tmp_path / "run" / kind)
    train(trained, *again, "--epochs", "1")
    assert "run: training begins anew" in capsys.readouterr().out
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"]


# --- Steps --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_few_graphs_serve_captions_of_all_lengths(trained, tmp_path, monkeypatch):
    traces, lengths = [], set()
    loss, real = training.caption_loss, batches.counted_batches

    def counted_batches(captions, order, config):
        for features, words, num_tokens in real(captions, order, config):
            lengths.add((captions, words.shape[1]))
            yield features, words, num_tokens

    monkeypatch.setattr(training, "caption_loss", lambda *args: traces.append(1) or loss(*args))
    monkeypatch.setattr(batches, "counted_batches", counted_batches)
    train(trained, "--run_dir", str(tmp_path / "run"), "--batch_size", "7", "--epochs", "3")
    assert len(traces) <= 4 < len(lengths)  # two of the training step, two of the validation step


@pytest.mark.slow
def test_two_captions_are_enough_and_each_epoch_trains(coco):
    argv = [*options(coco), "--num_examples", "2"]
    data_utils.main(argv)
    training.main([*argv, "--epochs", "3"])
    (iterations,) = (value for name, value in weights(coco).items() if "iterations" in name)
    assert iterations == 3  # one caption is trained on, so that all epochs have the same order


# --- Numbers that are not finite ----------------------------------------------------------------------------------


def check_nothing_was_saved(trained, root):
    theirs = weights(trained)
    for name, value in weights(root).items():
        np.testing.assert_array_equal(value, theirs[name])
    for kind in ("last", "best"):
        names = {path.name for path in (root / "run" / kind).iterdir()}
        assert names == {path.name for path in (trained / "run" / kind).iterdir()}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(trained, tmp_path, monkeypatch):
    again = copy_run(trained, tmp_path)
    after_each_step(monkeypatch, lambda state, number, loss: loss * np.nan if number == 2 else loss)
    with pytest.raises(UserError, match="loss is nan at batch 2 of epoch 3: lower --learning_rate"):
        train(trained, *again, "--epochs", "3")
    check_nothing_was_saved(trained, tmp_path)


def test_a_validation_loss_that_is_not_finite_stops_before_saving(trained, tmp_path, monkeypatch):
    again = copy_run(trained, tmp_path)
    after_each_step(monkeypatch, lambda state, number, loss: loss * np.nan, "validation_step")
    with pytest.raises(UserError, match="the validation loss is nan: lower --learning_rate") as raised:
        train(trained, *again, "--epochs", "3")
    assert "\n" not in str(raised.value)
    check_nothing_was_saved(trained, tmp_path)


@pytest.fixture
def continued(trained, tmp_path):
    """(state, config) of a copy of the trained run, restored, with one epoch to go."""
    copy_run(trained, tmp_path)
    config = settings_of(trained, tmp_path / "run", "--epochs", "3")
    return training.open_run(load_data(config), config), config


ROW = EpochRow(epoch=3, train_loss=1.5, captions_per_second=9.0, validation_loss=0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_never_saved(trained, tmp_path, continued, bad):
    """A step may spoil weights although its own loss was finite, and validation may not touch them: a rare word's."""
    state, config = continued
    state.decoder.embedding.embeddings.assign(
        tf.tensor_scatter_nd_update(state.decoder.embedding.embeddings, [[1, 0]], [bad])
    )
    for save in (lambda: saving.save_epoch(state, ROW, config), lambda: saving.save_last(state, config.run_dir)):
        with pytest.raises(UserError, match="no longer finite numbers: lower --learning_rate"):
            save()
    check_nothing_was_saved(trained, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["epoch", "interrupt", "checkpoint_minutes"])
def test_weights_that_a_step_spoils_are_never_saved(trained, tmp_path, monkeypatch, ends):
    again = copy_run(trained, tmp_path)

    def spoil(state, number, loss):
        if number == 3:
            state.decoder.embedding.embeddings[1, 0].assign(np.nan)
        return loss

    after_each_step(monkeypatch, spoil)
    if ends == "interrupt":
        interrupt_at(monkeypatch, 5)
    if ends == "checkpoint_minutes":
        hurry(monkeypatch)
    with pytest.raises(UserError, match="no longer finite numbers: lower --learning_rate") as raised:
        train(trained, *again, "--epochs", "3")
    assert "\n" not in str(raised.value)
    for value in weights(tmp_path).values():
        assert np.isfinite(value).all()
    assert saved_progress(tmp_path).captions_done in (CAPTIONS, 16, 32)


# --- Damage -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_beside_the_checkpoints_is_a_warning_behind_them(continued, tmp_path, capsys):
    """A spreadsheet holds history.csv open, or a folder is in its place."""
    state, config = continued
    for name in ("history.csv", "loss.png"):
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).mkdir()
    capsys.readouterr()
    saving.save_epoch(state, ROW, config)
    assert saved_progress(tmp_path).history[2] == dataclasses.asdict(ROW) | {"best_by": "validation loss"}
    assert list_checkpoints(tmp_path / "run" / "best")[0].name == "ckpt-3"
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0].partition(": ")[::2] for line in lines] == [
        ("warning", f"cannot write {tmp_path / 'run' / name}: {os.strerror(errno.EISDIR)}")
        for name in ("history.csv", "loss.png")
    ]

    for name in ("history.csv", "loss.png"):
        (tmp_path / "run" / name).rmdir()
    training.open_run(load_data(config), config)  # the next start makes good for it
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_samples_that_cannot_be_shown_are_a_warning_and_training_goes_on(monkeypatch, capsys):
    def show_samples(samples, state, row, config):
        raise UserError("samples.json is damaged: delete it")

    monkeypatch.setattr(training, "train_epoch", lambda state, train, epoch, *rest: EpochRow(epoch + 1))
    monkeypatch.setattr(training, "validate", lambda *args: 2.0)
    monkeypatch.setattr(epoch_samples, "save_epoch", lambda state, row, config: state.progress.history.append(row))
    monkeypatch.setattr(epoch_samples, "_show_samples", show_samples)
    config = read_settings(["--epochs", "2"], "")[0]
    train = types.SimpleNamespace(lengths=[5, 6])
    training.train_epochs(types.SimpleNamespace(progress=Progress()), train, None, None, None, config)
    assert capsys.readouterr().out == 2 * "warning: samples.json is damaged: delete it\n"


def test_the_checkpoint_comes_first(continued, monkeypatch):
    state, config = continued
    calls = []
    monkeypatch.setattr(saving, "save_checkpoint", lambda objects, folder, number: calls.append(folder.name))
    monkeypatch.setattr(saving, "write_csv", lambda path, history: calls.append(path.name))
    monkeypatch.setattr(saving, "_plot_losses", lambda history, path: calls.append(path.name))
    saving.save_epoch(state, ROW, config)
    assert calls == ["best", "last", "history.csv", "loss.png"]
    saving.save_epoch(state, dataclasses.replace(ROW, epoch=4, validation_loss=9.0), config)
    assert calls[4:] == ["last", "history.csv", "loss.png"]


def spoil_checkpoint(root, kind, number):
    (root / "run" / kind / f"ckpt-{number}.index").write_bytes(b"damaged")


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(trained, tmp_path, capsys):
    copy_run(trained, tmp_path)
    config = settings_of(trained, tmp_path / "run")
    for kind in ("last", "best"):
        spoil_checkpoint(tmp_path, kind, 2)
    state = training.open_run(load_data(config), config)
    assert (state.progress.epoch, len(state.progress.history)) == (1, 1)
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"]  # what the checkpoint knows
    assert load_captioner(config).checkpoint == "best/ckpt-1"
    printed = capsys.readouterr().out
    for kind in ("last", "best"):
        assert f"{kind}/ckpt-2 cannot be read" in printed
        assert f"{kind}/ckpt-1 is taken instead\n" in printed

    spoil_checkpoint(tmp_path, "best", 1)
    assert load_captioner(config).checkpoint == "last/ckpt-1"
    assert "last/ckpt-1 is taken instead" in capsys.readouterr().out

    spoil_checkpoint(tmp_path, "last", 1)
    for load in (lambda: train(trained, "--run_dir", config.run_dir), lambda: load_captioner(config)):
        with (
            pytest.raises(UserError, match=r"ckpt-2 cannot be read .*: give another --run_dir, or move") as raised,
            naming_commands(config),
        ):
            load()
        assert "\n" not in str(raised.value) and "delete" not in str(raised.value)


@pytest.mark.slow
def test_training_goes_on_from_the_checkpoint_before_a_damaged_one_to_the_same_end(trained, tmp_path):
    again = copy_run(trained, tmp_path)
    spoil_checkpoint(tmp_path, "last", 2)
    (tmp_path / "run" / "last" / "ckpt-3_temp").mkdir()  # of a save that was killed
    (tmp_path / "run" / "last" / "ckpt-3.data-00000-of-00001").write_bytes(b"half")
    train(trained, *again, "--epochs", "2")
    check_same_end(tmp_path, trained)
    for kind in ("last", "best"):
        names = {path.name.partition(".")[0] for path in (tmp_path / "run" / kind).iterdir()}
        assert names == {"ckpt-1", "ckpt-2"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "name"), [(60, "config.json"), (60_000, "best/ckpt-2"), (130_000, "last/ckpt-2"), (5_000, "best/ckpt-2")]
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_to_the_same_end(trained, tmp_path, size, name):
    again = copy_run(trained, tmp_path)
    for kind in ("last", "best"):
        for file in (tmp_path / "run" / kind).glob("ckpt-2.*"):
            file.unlink()
    with full_disk(size), pytest.raises(UserError) as raised:
        train(trained, *again, "--epochs", "2")
    reason = os.strerror(errno.EFBIG)
    assert f"cannot write {tmp_path / 'run' / name}: {reason} (" in str(raised.value)
    assert str(raised.value).endswith(" MB free there; make room and run the same command again)")
    for kind in ("last", "best"):
        assert list_checkpoints(tmp_path / "run" / kind)[-1].name == "ckpt-1"
    assert not [path for path in (tmp_path / "run").rglob("*") if "tmp" in path.name or "temp" in path.name]
    train(trained, *again, "--epochs", "2")
    check_same_end(tmp_path, trained)


def test_a_disk_that_is_full_for_the_loss_curve_alone_is_a_warning(continued, tmp_path, capsys):
    state, config = continued
    (tmp_path / "run" / "loss.png").unlink()
    with full_disk(5_000):
        saving.write_history([*state.progress.history, dataclasses.asdict(ROW)], tmp_path / "run")
    assert f"warning: cannot write {tmp_path / 'run' / 'loss.png'}" in capsys.readouterr().out
    assert len(rows(tmp_path)) == 3
    assert not (tmp_path / "run" / "loss.png").exists()


def test_a_feature_that_is_damaged_in_mid_training_is_one_line(trained, tmp_path, monkeypatch):
    """It was whole when the training began and was checked."""
    shutil.copytree(trained / "data" / "features", tmp_path / "features")
    config = settings_of(trained, tmp_path / "run", "--epochs", "1")
    prepared = load_data(config)
    there = dataclasses.replace(config, features_dir=str(tmp_path / "features"))
    path = feature_path(prepared.train[0], features_folder(there))
    path.write_bytes(path.read_bytes()[:1000])
    monkeypatch.setattr(training, "load_data", lambda config: prepared)
    with (
        pytest.raises(UserError, match=f"{path} is damaged: run python data_utils.py") as raised,
        naming_commands(there),
    ):
        training.train_captioner(there)
    assert "\n" not in str(raised.value)


# --- Stopping -----------------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch, batch, number=signal.SIGINT):
    """Have this process interrupted as it reads its batch of that number, training and validation counted together."""

    def interrupt():
        os.kill(os.getpid(), number)

    at_batch(monkeypatch, batch, interrupt)


def at_batch(monkeypatch, batch, action):
    real, read = batches.caption_batches, []

    def counted(*args):
        for item in real(*args):
            read.append(1)
            if len(read) == batch:
                action()
            yield item

    monkeypatch.setattr(batches, "caption_batches", counted)


def hurry(monkeypatch):
    """Let a minute pass whenever the training looks at the clock, so that a checkpoint is due at every batch."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(training.time, "perf_counter", lambda: 3600.0 * next(ticks))


@pytest.mark.slow
def test_an_interrupted_epoch_goes_on_at_its_next_batch_and_ends_as_if_nothing_had_been(trained, tmp_path, monkeypatch):
    """Of 6 training and 2 validation batches an epoch: stopped in training, in validation, and before any batch."""
    more = ["--run_dir", str(tmp_path / "run"), "--epochs", "2"]
    saved = []
    for batch, number in ((4, signal.SIGINT), (5, signal.SIGTERM), (1, signal.SIGINT)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(patch, batch, number)
            train(trained, *more)
        saved.append(saved_progress(tmp_path).captions_done)
    assert saved == [48, 95, 95]
    train(trained, *more)
    check_same_end(tmp_path, trained)


@pytest.mark.slow
def test_an_interrupted_epoch_of_other_batches_starts_over(trained, tmp_path, monkeypatch):
    more = ["--run_dir", str(tmp_path / "run"), "--epochs", "1"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 4)
        train(trained, *more)
    trained_on = []
    step = training.train_step

    def counted(state, features, words, config):
        trained_on.append(len(words))
        return step(state, features, words, config)

    monkeypatch.setattr(training, "train_step", counted)
    train(trained, *more, "--batch_size", "1000")  # more than there are
    assert sum(trained_on) == CAPTIONS


class PowerCut(Exception):
    """Nothing handles it, as nothing handles a power cut."""


def cut_power():
    raise PowerCut


@pytest.mark.slow
def test_a_checkpoint_in_mid_epoch_saves_what_came_before_a_power_cut(trained, tmp_path, monkeypatch):
    """It is written after a batch, every --checkpoint_minutes. The rest of the epoch ends the same."""
    more = ["--run_dir", str(tmp_path / "run"), "--epochs", "2"]
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        at_batch(patch, 5, cut_power)
        train(trained, *more)  # 30 minutes are never over
    assert not (tmp_path / "run" / "last").exists()

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        hurry(patch)
        at_batch(patch, 5, cut_power)
        train(trained, *more, "--checkpoint_minutes", "0.5")
    progress = saved_progress(tmp_path)
    assert (progress.epoch, progress.captions_done, progress.history) == (0, 64, [])

    steps = []
    with monkeypatch.context() as patch:
        after_each_step(patch, lambda state, number, loss: steps.append(number) or loss)
        train(trained, *more)
    assert len(steps) == 2 + 6
    check_same_end(tmp_path, trained)


@pytest.mark.slow
def test_an_interrupted_process_saves_and_exits_with_130(trained, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "train_image_caption_model.py", *options(trained), "--run_dir", str(run)]
    command += ["--epochs", "100000", "--patience", "100000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while "epoch 2/" not in process.stderr.readline(50):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.endswith("interrupted: what was finished is kept; run the same command again to go on\n")
    assert "captions: saved" in out
    assert list_checkpoints(run / "last")


# --- What a step learns -------------------------------------------------------------------------------------------


def first_batch(trained, *more):
    """(state without training, 16 features (B, P, F), their captions (B, T), config)."""
    config = settings_of(trained, trained / "nowhere", "--precision", "float32", *more)
    prepared = load_data(config)
    state = training.build_state(prepared, "float32", config)
    captions = collect_captions(prepared.train, features_folder(config))
    features, words = next(iter(batches.caption_batches(captions, np.arange(0, 80, 5) + np.arange(16) % 5, config)))
    return state, tf.cast(features, tf.float32), words, config


def take_step(state, features, words, config):
    """Returns (loss, the gradients that the first step of Adam took): it keeps a tenth of each."""
    tf.config.run_functions_eagerly(True)  # tracing a step takes longer than one step
    try:
        loss = float(training.train_step(state, features, words, config))
    finally:
        tf.config.run_functions_eagerly(False)
    return loss, [10 * momentum.numpy() for momentum in state.optimizer._momentums]


def word_losses(state, features, words, dropout_seed=None):
    """Cross-entropy of all words of a batch by TensorFlow's own function, and the attention (B, T-1, P)."""
    encoded_features = state.encoder(features, dropout_seed=dropout_seed)
    logits, attention = state.decoder.teacher_forcing(words, encoded_features, dropout_seed)
    said = tf.transpose(words[:, 1:])  # (T-1, B)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(said[said > 0], logits), attention


def test_a_step_learns_words_even_attention_and_where_words_are_seen(trained):
    state, features, words, config = first_batch(
        trained, "--dropout", "0", "--doubly_stochastic", "3", "--clip_norm", "1e9"
    )
    weights = state.trainable_variables
    with tf.GradientTape() as tape:
        losses, attention = word_losses(state, features, words)
        by_caption = [tf.reduce_sum(rows[:length], 0) for rows, length in zip(attention, said(words), strict=True)]
        uneven = tf.reduce_mean((1 - tf.stack(by_caption)) ** 2)
        seen = training.detection_loss(state.decoder.detector, words, state.encoder(features), 0)
        total = tf.reduce_mean(losses) + 3 * uneven + seen
    expected = [tf.convert_to_tensor(gradient).numpy() for gradient in tape.gradient(total, weights)]
    loss, gradients = take_step(state, features, words, config)
    assert loss == pytest.approx(float(tf.reduce_mean(losses)), rel=1e-5)
    for weight, ours, by_hand in zip(weights, gradients, expected, strict=True):
        scale = np.abs(by_hand).max()
        assert scale > 0, weight.path
        np.testing.assert_allclose(ours, by_hand, atol=1e-3 * scale, err_msg=weight.path)


def said(words):
    """How many words each caption of a batch says, <end> among them."""
    return np.count_nonzero(words[:, 1:], axis=1)


@pytest.mark.parametrize(("dropout", "of_features"), [("0.4", "0"), ("0", "0.6")])
def test_a_step_drops_what_the_seed_and_the_step_say(trained, dropout, of_features):
    rates = "--dropout", dropout, "--feature_dropout", of_features
    state, features, words, config = first_batch(trained, *rates, "--seed", "42")
    state.decoder.output_layer.kernel.assign(5 * state.decoder.output_layer.kernel)
    state.optimizer.learning_rate = 0.0  # so that the second step begins with the weights of the first
    for seed, step in ((42, 0), (7, 1)):
        state.optimizer.iterations.assign(step)
        expected, *others = (
            float(tf.reduce_mean(word_losses(state, features, words, mask)[0]))
            for mask in ((seed, step), (seed, 1 - step), (49 - seed, step), None)
        )
        loss, _ = take_step(state, features, words, dataclasses.replace(config, seed=seed))
        assert loss == pytest.approx(expected, rel=1e-5)
        assert min(abs(loss - other) for other in others) > 1e-3


def test_gradients_are_scaled_down_to_the_norm_of_the_settings(trained):
    """Those of the detector apart from all others."""
    groups = []
    for limit in ("1e9", "0.01"):
        state, *batch = first_batch(trained, "--clip_norm", limit)
        _, gradients = take_step(state, *batch)
        others = len(gradients) - len(state.decoder.detector.trainable_variables)
        parts = gradients[:others], gradients[others:]
        groups.append([np.concatenate([gradient.ravel() for gradient in part]) for part in parts])
    for whole, clipped in zip(*groups, strict=True):
        norm = np.linalg.norm(clipped)
        assert np.linalg.norm(whole) > 0.1
        assert norm == pytest.approx(0.01, rel=0.2)  # the parts of a word said twice count one by one
        np.testing.assert_allclose(clipped / norm, whole / np.linalg.norm(whole), atol=1e-4)


# --- Losses of an epoch -------------------------------------------------------------------------------------------


def test_the_validation_loss_is_the_mean_over_words_without_dropout(trained):
    """Of 25 captions in batches of 16, of other lengths in each; by hand one caption after the other."""
    config = settings_of(trained, trained / "nowhere", "--dropout", "0.5")
    prepared = load_data(config)
    state = training.build_state(prepared, "float32", config)
    state.decoder.output_layer.kernel.assign(5 * state.decoder.output_layer.kernel)
    losses = []
    for image in prepared.validation:
        features = np.load(feature_path(image, features_folder(config)))[None].astype(np.float32)
        for caption in image.encoded_captions:
            losses.append(word_losses(state, features, tf.constant([caption]))[0].numpy())
    assert len({len(each) for each in losses}) > 2
    expected = np.concatenate(losses).mean()
    found = training.validate(state, collect_captions(prepared.validation, features_folder(config)), config)
    assert found == pytest.approx(expected, rel=1e-4)


def test_what_history_calls_validation_is_the_loss_of_the_validation_split(trained):
    config = settings_of(trained, trained / "run")
    prepared = load_data(config)
    state = training.build_state(prepared, "float32", config)
    assert restore_newest(state, [trained / "run" / "last"])
    loss, of_training = (
        training.validate(state, collect_captions(images, features_folder(config)), config)
        for images in (prepared.validation, prepared.train)
    )
    written = losses(trained)[-1][2]
    assert written == pytest.approx(loss, rel=5e-3)  # it may have been computed in another number type
    assert abs(written - of_training) > 2 * abs(written - loss) + 1e-3


def epoch_of_stubs(trained, monkeypatch, epoch, seed=42):
    """Train an epoch whose steps cost nothing. Returns (EpochRow, (loss, captions (B, T)) of each step)."""
    config = settings_of(trained, trained / "nowhere", "--seed", str(seed))
    captions = collect_captions(load_data(dataclasses.replace(config, seed=42)).train, features_folder(config))
    steps = []

    def step(state, features, words, config):
        steps.append((len(steps) + 1.0, words.numpy()))
        return steps[-1][0]

    monkeypatch.setattr(training, "train_step", step)
    optimizer = types.SimpleNamespace(learning_rate=0.0)
    state = types.SimpleNamespace(progress=Progress(), optimizer=optimizer)
    return training.train_epoch(state, captions, epoch, config), steps


def test_the_training_loss_is_the_mean_over_words(trained, monkeypatch):
    row, steps = epoch_of_stubs(trained, monkeypatch, 0)
    counts = [said(words).sum() for _, words in steps]
    assert len(set(counts)) > 2
    assert row.train_loss == pytest.approx(np.average([loss for loss, _ in steps], weights=counts))


def test_the_order_of_captions_depends_on_the_seed_and_the_epoch(trained, monkeypatch):
    orders = [
        [tuple(row) for _, words in epoch_of_stubs(trained, monkeypatch, epoch, seed)[1] for row in words.tolist()]
        for epoch, seed in ((0, 42), (0, 42), (1, 42), (0, 43))
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]


def test_the_encoder_has_the_statistics_of_the_training_features(trained):
    config = settings_of(trained, trained / "nowhere")
    prepared = load_data(config)
    encoder = training.build_state(prepared, "float32", config).encoder
    features = np.stack([np.load(feature_path(image, features_folder(config))) for image in prepared.train]).astype(
        np.float32
    )
    np.testing.assert_allclose(encoder.feature_mean, features.mean((0, 1)), atol=1e-4)
    assert float(encoder.feature_std) == pytest.approx((features - features.mean((0, 1))).std(), rel=1e-3)


@pytest.mark.parametrize(
    ("validation", "patience", "trained_on", "best"),
    [([3, 2, 2.5, 2.5, 1], 2, 4, 2), ([3, 2, 2.5, 1, 2, 2], 2, 6, 4), ([3, 4, 2], 1, 2, 1), ([3, 3, 3, 3], 3, 4, 1)],
)
def test_training_ends_after_so_many_epochs_without_a_better_loss(
    monkeypatch, capsys, validation, patience, trained_on, best
):
    saved, epochs, found = [], [], iter(validation)
    monkeypatch.setattr(
        training, "train_epoch", lambda state, train, epoch, *rest: epochs.append(epoch) or EpochRow(epoch + 1)
    )
    monkeypatch.setattr(training, "validate", lambda *args: float(next(found)))
    monkeypatch.setattr(epoch_samples, "_show_samples", lambda *args: None)
    monkeypatch.setattr(saving, "check_finite", lambda *args: None)
    monkeypatch.setattr(saving, "write_history", lambda *args: None)
    monkeypatch.setattr(saving, "save_checkpoint", lambda objects, folder, n: saved.append((folder.name, n)))
    config = read_settings(["--epochs", str(len(validation)), "--patience", str(patience)], "")[0]
    state = types.SimpleNamespace(progress=Progress(), captioner=lambda: None)
    training.train_epochs(state, types.SimpleNamespace(lengths=[5, 6]), None, None, None, config)
    assert epochs == list(range(trained_on))
    assert state.progress.best_epoch == max(n for name, n in saved if name == "best") == best
    assert ("stopping" in capsys.readouterr().out) == (trained_on < len(validation))
