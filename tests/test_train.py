import csv
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import data_utils
import inference_image_caption as inference
import train_image_caption_model as training
from command_line import UserError, make_config, parse_command_line
from conftest import IMAGES, full_disk, options

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image


def train(root, *more):
    training.main([*options(root), *more])


def weights(root, kind="last"):
    reader = tf.train.load_checkpoint(training.checkpoints(root / "run" / kind)[0])
    names = [
        name for name in reader.get_variable_to_shape_map() if name.startswith(("encoder", "decoder", "optimizer"))
    ]
    return {name: reader.get_tensor(name) for name in names}


def rows(root):
    return list(csv.DictReader((root / "run" / "history.csv").open()))


def test_training_leaves_checkpoints_history_and_a_loss_curve(trained):
    assert [row["epoch"] for row in rows(trained)] == ["1", "2"]
    losses = [float(row["train_loss"]) for row in rows(trained)]
    assert losses[1] < losses[0] < np.log(21)  # 21 words: it starts better than guessing
    for kind in ("last", "best"):
        assert weights(trained, kind)
    vocabulary = json.loads((trained / "data" / "vocabulary.json").read_text())
    assert json.loads((trained / "run" / "vocabulary.json").read_text()) == vocabulary
    assert json.loads((trained / "run" / "config.json").read_text())["units"] == 16
    with Image.open(trained / "run" / "loss.png") as figure:
        assert figure.width > 300
        assert len(figure.convert("RGB").getcolors(10**6)) > 10


def test_training_starts_at_the_frequencies_of_words(trained, tmp_path):
    config, _ = parse_command_line([*options(trained), "--run_dir", str(tmp_path)], "")
    prepared = data_utils.load_prepared(config)
    captions = training.collect_captions(prepared.train, config)
    counts = np.zeros(len(prepared.vocabulary))
    for image in prepared.train:
        for words in image["ids"]:
            for word in words[1:]:
                counts[word] += 1
    shares = counts / counts.sum() / 2 + 0.5 / len(counts)
    run = training.open_run(prepared, config)
    np.testing.assert_allclose(tf.nn.softmax(run.decoder.make_logits.bias), shares, rtol=1e-4)
    run.decoder.make_logits.kernel.assign(0 * run.decoder.make_logits.kernel)
    entropy = -np.sum(counts * np.log(shares)) / np.sum(counts)
    assert training.validate(run, captions, config) == pytest.approx(entropy, abs=1e-4)


def test_stopping_and_continuing_gives_the_weights_of_one_run(trained, tmp_path):
    """Two epochs, then two more, against four in one go; dropout is on and must go on where it stopped."""
    stopped = tmp_path / "stopped"
    constant = ["--schedule", "constant"]  # the other falls to 0 at the last of --epochs
    shutil.copytree(trained / "data", stopped / "data")
    shutil.copytree(trained / "coco", stopped / "coco")
    shutil.copytree(trained / "data", tmp_path / "whole" / "data")
    shutil.copytree(trained / "coco", tmp_path / "whole" / "coco")
    for root in (stopped, tmp_path / "whole"):
        data_utils.main(options(root))  # the folder's name is one of the prepared settings
    train(stopped, "--epochs", "2", *constant)
    for root in (stopped, tmp_path / "whole"):
        train(root, "--epochs", "4", *constant)
    whole, continued = weights(tmp_path / "whole"), weights(stopped)
    assert whole.keys() == continued.keys()
    for name in whole:
        np.testing.assert_allclose(continued[name], whole[name], atol=1e-5, err_msg=name)
    assert [row["epoch"] for row in rows(stopped)] == ["1", "2", "3", "4"]
    for mine, theirs in zip(rows(stopped), rows(tmp_path / "whole"), strict=True):
        assert float(mine["validation_loss"]) == pytest.approx(float(theirs["validation_loss"]), abs=1e-4)

    before = weights(stopped)
    train(stopped, "--epochs", "4", *constant)  # all done: nothing changes
    for name, value in weights(stopped).items():
        np.testing.assert_array_equal(value, before[name])


def test_the_learning_rate_falls_to_0_at_the_last_step_or_stays():
    images = [{"ids": [[]] * 5}] * 13  # 65 captions, 2 batches an epoch
    falling = training.learning_rate(images, make_config({"epochs": 3, "learning_rate": 0.5, "schedule": "cosine"}))
    rates = [float(falling(step)) for step in range(7)]
    assert rates[0] == 0.5 and rates[3] == pytest.approx(0.25) and rates[6] == pytest.approx(0.0, abs=1e-6)
    assert rates == sorted(rates, reverse=True)
    steady = training.learning_rate(images, make_config({"learning_rate": 0.5, "schedule": "constant"}))
    assert {float(steady(step)) for step in (0, 3, 100)} == {0.5}


def test_a_run_goes_on_with_another_schedule(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    train(trained, "--run_dir", str(tmp_path / "run"), "--epochs", "3", "--schedule", "constant")
    assert "after epoch 2" in capsys.readouterr().out
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_a_row_of_an_epoch_that_was_not_saved_is_dropped(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    with (tmp_path / "run" / "history.csv").open("a") as file:
        file.write("3,9.9,9.9,9.9\n")
    train(trained, "--run_dir", str(tmp_path / "run"), "--epochs", "3")
    history = rows(tmp_path)
    assert [row["epoch"] for row in history] == ["1", "2", "3"]
    assert float(history[2]["train_loss"]) < 9


def test_the_best_checkpoint_is_kept_and_patience_ends_the_run(coco, capsys):
    data_utils.main(options(coco))
    train(coco, "--epochs", "40", "--learning_rate", "0.1", "--patience", "2")  # far too large: it soon gets worse
    losses = [float(row["validation_loss"]) for row in rows(coco)]
    best = int(np.argmin(losses)) + 1
    assert len(losses) == best + 2 < 40
    assert "stopping" in capsys.readouterr().out
    assert training.checkpoints(coco / "run" / "best")[0].name == f"ckpt-{best}"
    assert training.checkpoints(coco / "run" / "last")[0].name == f"ckpt-{best + 2}"


def test_another_vocabulary_or_size_is_refused_and_both_are_named(trained, tmp_path):
    with pytest.raises(UserError, match="--units 16, not 20"):
        train(trained, "--units", "20", "--epochs", "3")
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    (run / "vocabulary.json").write_text(json.dumps(["<pad>", "<unk>", "<start>", "<end>", "word"]))
    with pytest.raises(UserError, match=r"another vocabulary \(5 words\) than .* \(21 words\)"):
        train(trained, "--run_dir", str(run), "--epochs", "3")


def test_training_before_preparing_names_the_command(tmp_path):
    with pytest.raises(UserError, match="run python data_utils.py"):
        train(tmp_path)


@pytest.mark.parametrize("batch_size", [64, 7, 1])
def test_every_caption_once_an_epoch_in_batches_of_two_lengths(batch_size):
    lengths = np.random.default_rng(0).integers(3, 40, 1000)
    order = training.plan_batches(lengths, batch_size, np.random.default_rng((42, 0)))
    assert sorted(order) == list(range(1000))
    batches = lengths[order[: 1000 // batch_size * batch_size]].reshape(-1, batch_size)
    longer, shorter = np.split(batches, [(batch_size + 1) // 2], axis=1)
    for rows in (longer, shorter)[:batch_size]:
        assert np.mean(np.ptp(rows, axis=1)) < 3 < np.ptp(lengths) / 8
        assert rows[:, 0].tolist() != sorted(rows[:, 0])  # in random order
    if batch_size > 1:
        assert longer.min() >= shorter.max()
        assert abs(np.corrcoef(longer[:, 0], shorter[:, 0])[0, 1]) < 0.5  # any with any
    assert (order == training.plan_batches(lengths, batch_size, np.random.default_rng((42, 0)))).all()
    assert (order != training.plan_batches(lengths, batch_size, np.random.default_rng((42, 1)))).any()


def test_fewer_captions_than_a_batch_are_one():
    assert sorted(training.plan_batches(np.array([5, 4, 6]), 64, np.random.default_rng(0))) == [0, 1, 2]


def test_batches_hold_each_captions_own_features_and_words(trained):
    config, _ = parse_command_line(options(trained), "")
    images = data_utils.load_prepared(config).train
    captions = training.collect_captions(images, config)
    order = training.plan_batches(captions.lengths, 16, np.random.default_rng(0))
    expected = [(data_utils.feature_path(image, config), words) for image in images for words in image["ids"]]
    batches = training.caption_batches(captions, order, config)
    assert batches.options().autotune.enabled is False
    seen = 0
    for features, words in batches:
        assert features.shape == (16, 64, 2048)
        assert words.shape == (16, max(np.count_nonzero(words, axis=1)))  # padded to the longest of the batch
        for row in range(min(16, len(expected) - seen)):
            path, ids = expected[order[seen]]
            np.testing.assert_array_equal(features[row], np.load(path).astype(np.float32))
            assert [i for i in words[row].numpy() if i] == ids
            seen += 1
        assert not np.any(words[row + 1 :])
    assert row < 15  # the last batch was filled up
    assert seen == len(expected) > (IMAGES - 6) * 5


def test_the_step_is_traced_once(trained, tmp_path, monkeypatch):
    traces = []
    real = training.caption_loss
    monkeypatch.setattr(training, "caption_loss", lambda *args: traces.append(1) or real(*args))
    train(trained, "--run_dir", str(tmp_path / "run"), "--epochs", "3", "--batch_size", "7")
    assert len(traces) == 2  # the training step and the validation step, whatever the shapes


def test_two_captions_are_enough_and_each_epoch_trains(coco):
    argv = [*options(coco), "--num_examples", "2"]
    data_utils.main(argv)
    training.main([*argv, "--epochs", "3"])
    (iterations,) = (value for name, value in weights(coco).items() if "iterations" in name)
    assert iterations == 3  # one caption is trained on, so that all epochs have the same order


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "run", tmp_path / "run")
    before = weights(tmp_path)
    real = training.caption_loss
    monkeypatch.setattr(training, "caption_loss", lambda *args: real(*args) * np.nan)
    with pytest.raises(UserError, match="batch 1 of epoch 3: lower --learning_rate"):
        train(trained, "--run_dir", str(tmp_path / "run"), "--epochs", "3")
    for name, value in weights(tmp_path).items():
        np.testing.assert_array_equal(value, before[name])


# --- Damage


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "other bytes": lambda path: path.write_bytes(path.read_bytes()[:50] + bytes(50) + path.read_bytes()[100:]),
    "a folder": lambda path: path.unlink() or path.mkdir(),
}


@pytest.mark.parametrize(
    ("ending", "damage"),
    [(ending, name) for ending in (".index", ".data-00000-of-00001") for name in DAMAGES]
    + [(".data-00000-of-00001", "missing")],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(trained, tmp_path, capsys, ending, damage):
    shutil.copytree(trained / "run", tmp_path / "run")
    config, _ = parse_command_line([*options(trained), "--run_dir", str(tmp_path / "run")], "")
    spoil = {**DAMAGES, "missing": pathlib.Path.unlink}[damage]
    for kind in ("last", "best"):
        spoil(tmp_path / "run" / kind / f"ckpt-2{ending}")

    run = training.open_run(data_utils.load_prepared(config), config)
    assert int(run.epoch) == 1
    inference.load_captioner(config)
    printed = capsys.readouterr().out
    for kind in ("last", "best"):
        assert f"{kind}/ckpt-2 cannot be read" in printed
    assert printed.count("ckpt-1 is taken instead\n") == 2

    for kind in ("last", "best"):
        spoil(tmp_path / "run" / kind / f"ckpt-1{ending}")
    for load in (lambda: train(trained, "--run_dir", config.run_dir), lambda: inference.load_captioner(config)):
        with pytest.raises(UserError, match="ckpt-2 cannot be read .*: delete .*run and run python train_") as raised:
            load()
        assert "\n" not in str(raised.value)


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one_to_the_same_end(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run" / "last" / "ckpt-2.index").write_bytes(b"damaged")
    (tmp_path / "run" / "last" / "ckpt-3_temp").mkdir()  # of a save that was killed
    (tmp_path / "run" / "last" / "ckpt-3.data-00000-of-00001").write_bytes(b"half")
    train(trained, "--run_dir", str(tmp_path / "run"), "--epochs", "2")
    for name, value in weights(trained).items():
        np.testing.assert_allclose(weights(tmp_path)[name], value, atol=1e-6, err_msg=name)
    for kind in ("last", "best"):
        names = {path.name.partition(".")[0] for path in (tmp_path / "run" / kind).iterdir()}
        assert names == {"ckpt-1", "ckpt-2"}


def test_a_run_that_has_lost_its_checkpoints_begins_anew_and_says_so(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "last")
    train(trained, "--run_dir", str(tmp_path / "run"), "--epochs", "1")
    assert "last: training begins anew" in capsys.readouterr().out
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"]


def test_captioning_needs_the_words_that_were_trained_on(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    for text in ("", "{}", '["<pad>"]'):
        (tmp_path / "run" / "vocabulary.json").write_text(text)
        with pytest.raises(UserError, match="vocabulary.json .*: delete .*run and run python train_"):
            inference.main([*options(trained), "--run_dir", str(tmp_path / "run")])
    for name, text in (("vocabulary.json", "{}"), ("config.json", "["), ("config.json", "[]"), ("config.json", "{}")):
        shutil.copytree(trained / "run", tmp_path / "run", dirs_exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
        with pytest.raises(UserError, match="give another --run_dir, or delete that folder"):
            train(trained, "--run_dir", str(tmp_path / "run"), "--epochs", "3")


HEADER = "epoch,train_loss,captions_per_second,validation_loss\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEADER,
        HEADER + "1,2.0,x,3.0\n",
        HEADER + "1,2.0\n",
        HEADER + "1,2,3,4,5\n",
        "epoch\n1\n",
        "\0\0",
        "\xff\xfe",
    ],
)
def test_a_damaged_history_begins_anew_and_says_so(trained, tmp_path, capsys, text):
    config, _ = parse_command_line([*options(trained), "--run_dir", str(tmp_path)], "")
    (tmp_path / "history.csv").write_text(text, encoding="latin-1")
    run = tf.train.Checkpoint(epoch=tf.Variable(2))
    assert training.read_history(run, config) == []
    assert "history.csv cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "name"), [(60, "config.json"), (5_000, "loss.png"), (60_000, "best/ckpt-2"), (130_000, "last/ckpt-2")]
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_to_the_same_end(trained, tmp_path, size, name):
    shutil.copytree(trained / "run", tmp_path / "run")
    for kind in ("last", "best"):
        for file in (tmp_path / "run" / kind).glob("ckpt-2.*"):
            file.unlink()
    with full_disk(size), pytest.raises(UserError) as raised:
        train(trained, "--run_dir", str(tmp_path / "run"), "--epochs", "2")
    reason = os.strerror(errno.EFBIG)
    assert f"cannot write {tmp_path / 'run' / name}: {reason} (" in str(raised.value)
    assert str(raised.value).endswith(" MB free there; make room and run the same command again)")
    for kind in ("last", "best"):
        assert training.checkpoints(tmp_path / "run" / kind)[-1].name == "ckpt-1"
    assert not [path for path in (tmp_path / "run").rglob("*") if "tmp" in path.name or "temp" in path.name]
    train(trained, "--run_dir", str(tmp_path / "run"), "--epochs", "2")
    for name, value in weights(trained).items():
        np.testing.assert_allclose(weights(tmp_path)[name], value, atol=1e-6, err_msg=name)


# --- Stopping


def interrupt_at(monkeypatch, batch, number=signal.SIGINT):
    """Have this process interrupted as it reads its batch of that number, training and validation counted together."""
    real, read = training.caption_batches, []

    def batches(*args):
        for item in real(*args):
            read.append(1)
            if len(read) == batch:
                os.kill(os.getpid(), number)
            yield item

    monkeypatch.setattr(training, "caption_batches", batches)


def test_an_interrupted_epoch_goes_on_at_its_next_batch_and_ends_as_if_nothing_had_been(trained, tmp_path, monkeypatch):
    """Of 6 training and 2 validation batches an epoch: stopped in training, in validation, and before any batch."""
    more = ["--run_dir", str(tmp_path / "run"), "--epochs", "2"]
    saved = []
    for batch, number in ((4, signal.SIGINT), (5, signal.SIGTERM), (1, signal.SIGINT)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(patch, batch, number)
            train(trained, *more)
        last = tf.train.load_checkpoint(training.checkpoints(tmp_path / "run" / "last")[0])
        saved.append(last.get_tensor("captions_done/.ATTRIBUTES/VARIABLE_VALUE"))
    assert saved == [48, 95, 95]
    train(trained, *more)
    for name, value in weights(trained).items():
        np.testing.assert_allclose(weights(tmp_path)[name], value, atol=1e-6, err_msg=name)
    for mine, theirs in zip(rows(tmp_path), rows(trained), strict=True):
        for name in ("epoch", "train_loss", "validation_loss"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), abs=1e-5)


def test_an_interrupted_epoch_of_other_batches_starts_over(trained, tmp_path, monkeypatch):
    more = ["--run_dir", str(tmp_path / "run"), "--epochs", "1"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 4)
        train(trained, *more)
    trained_on = []
    real = training.train_step.get_concrete_function

    def counted(run, *args):
        step = real(run, *args)
        return lambda run, features, words, config: trained_on.append(len(words)) or step(run, features, words, config)

    monkeypatch.setattr(training.train_step, "get_concrete_function", counted)
    train(trained, *more, "--batch_size", "1000")  # more than there are
    assert sum(trained_on) == 95


def test_an_interrupted_process_saves_and_exits_with_130(trained, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "train_image_caption_model.py", *options(trained), "--run_dir", str(run)]
    command += ["--epochs", "100000", "--patience", "100000"]
    root = pathlib.Path(training.__file__).parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while "epoch 2/" not in process.stderr.readline(50):
                pass
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.endswith("interrupted: what was finished is kept; run the same command again to go on\n")
    assert "captions: saved" in out
    assert training.checkpoints(run / "last")
