"""Several replicas must be one: on logical CPU devices, and as worker processes on this machine."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import data_utils
import train_image_caption_model as training
from captioning.data.captioned_images import CaptionedImage
from captioning.data.prepared_data import Prepared
from captioning.settings import make_config
from captioning.training import workers
from captioning.training.checkpoints import list_checkpoints
from captioning.training.workers import check_same_training
from captioning.vocabulary import END, START
from conftest import options, rows, weights, write_coco, write_features
from support import distribution
from support.distribution import (
    _open_strategy,
    check_same_everywhere,
    is_chief,
    replica_rows,
    replicas,
    run_replicas,
    share_batches,
    sum_processes,
    sum_replicas,
    value_of_chief,
)
from support.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent.parent

# 95 captions in batches of 15: neither 2 nor 4 replicas get as many rows each, and the last batch has 5 captions.
SETTINGS = ["--batch_size", "15", "--precision", "float32", "--feature_dropout", "0.2"]
SAME = 1e-4  # of weights: a hundredth of one of Adam's steps, which are 0.01; rounding comes to a thousandth

# In a process of its own, as TensorFlow cuts its CPU into devices at the start only.
ON_DEVICES = """
import sys
from train_image_caption_model import train_captioner
from support.distribution import replicas
from captioning.settings import read_settings
import tensorflow as tf
count = int(sys.argv[1])
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
config, _ = read_settings(sys.argv[2:], "")
with replicas(config.strategy, [f"CPU:{number}" for number in range(count)]):
    assert tf.distribute.get_strategy().num_replicas_in_sync == count
    train_captioner(config)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The root of a tiny data set and of a run of two epochs on it by one process on one device."""
    root = tmp_path_factory.mktemp("alone")
    argv = prepare(root)
    training.main([*argv, "--epochs", "2"])
    return root


def prepare(root):
    write_coco(root / "coco")
    write_features(root / "data" / "features")
    data_utils.main(options(root))
    return [*options(root), *SETTINGS]


def start(*command, **variables):
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ".", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_ports(count):
    """Ports that nobody listens to, below those that systems give to connections: none is taken before it is used."""
    ports, port = [], 20_000 + os.getpid() % 10_000
    while len(ports) < count:
        port += 1
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
    return ports


def start_workers(*argvs):
    """One process for each list of options."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(len(argvs))]}
    processes = []
    for index, argv in enumerate(argvs):
        task = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        command = ["train_image_caption_model.py", *argv, "--strategy", "multiworker"]
        processes.append(start(*command, TF_CONFIG=json.dumps(task)))
    return processes


def finish(processes, status=0):
    """(standard output, standard error) of each process, which must end with `status`."""
    try:
        results = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, shown in zip(processes, results, strict=True):
        assert process.returncode == status, "".join(shown)
    return results


def check_same(root, other):
    expected = weights(root)
    assert expected.keys() == weights(other).keys()
    for name, value in weights(other).items():
        np.testing.assert_allclose(value, expected[name], atol=SAME, err_msg=name)
    for mine, theirs in zip(rows(other), rows(root), strict=True):
        for loss in ("train_loss", "validation_loss"):
            assert float(mine[loss]) == pytest.approx(float(theirs[loss]), abs=1e-5)


@pytest.mark.slow
def test_2_and_4_devices_take_the_steps_of_one(alone, tmp_path):
    """Dropout is on: the masks too are those of the whole batch."""
    places = {count: [*options(alone), *SETTINGS, "--run_dir", str(tmp_path / count / "run")] for count in ("2", "4")}
    finish([start("-c", ON_DEVICES, count, *argv, "--epochs", "2") for count, argv in places.items()])
    for count in places:
        check_same(alone, tmp_path / count)


@pytest.mark.slow
def test_2_and_4_devices_take_the_self_critical_steps_of_one(alone, tmp_path):
    """19 images in batches of 6: the same captions are drawn, and rewarded, whatever replica says them."""
    phase = ["--epochs", "2", "--self_critical_epochs", "2", "--images_per_step", "6", "--dropout", "0"]
    phase += ["--self_critical_rate", "0.01"]
    processes = []
    for count in ("1", "2", "4"):
        shutil.copytree(alone / "run", tmp_path / count / "run")
        argv = [*options(alone), *SETTINGS, "--run_dir", str(tmp_path / count / "run"), *phase]
        processes.append(start("-c", ON_DEVICES, count, *argv))
    finish(processes)
    expected = weights(tmp_path / "1")
    for count in ("2", "4"):
        for name, value in weights(tmp_path / count).items():
            np.testing.assert_allclose(value, expected[name], atol=SAME, err_msg=name)
        for mine, theirs in zip(rows(tmp_path / count)[2:], rows(tmp_path / "1")[2:], strict=True):
            for name in ("sampled_cider", "validation_cider", "validation_loss"):
                assert float(mine[name]) == pytest.approx(float(theirs[name]), abs=1e-5)


@pytest.mark.slow
def test_two_workers_raise_the_cider_of_samples_together(alone, tmp_path):
    phase = ["--epochs", "2", "--self_critical_epochs", "1", "--images_per_step", "6", "--dropout", "0"]
    ends = {}
    for name in ("one", "two"):
        shutil.copytree(alone / "run", tmp_path / name / "run")
        argv = [*options(alone), *SETTINGS, "--run_dir", str(tmp_path / name / "run"), *phase]
        if name == "two":
            finish(start_workers(argv, argv))
        else:
            training.main([*argv])
        ends[name] = weights(tmp_path / name)
    mine, theirs = (rows(tmp_path / name)[2]["sampled_cider"] for name in ends)
    assert float(mine) == pytest.approx(float(theirs), abs=1e-5) and float(mine) > 0
    for name, value in ends["two"].items():
        np.testing.assert_allclose(value, ends["one"][name], atol=SAME, err_msg=name)


@pytest.mark.slow
def test_two_workers_continue_the_run_of_one_and_one_theirs(alone, tmp_path):
    """An epoch more by 2 workers, then one by a single process, against both by one; the first worker alone prints."""
    argv = [*options(alone), *SETTINGS]
    shutil.copytree(alone / "run", tmp_path / "run")
    shutil.copytree(alone / "run", tmp_path / "longer" / "run")
    longer = [*argv, "--run_dir", str(tmp_path / "run"), "--epochs", "3"]
    (printed, _), second = finish(start_workers(longer, longer))
    assert "after epoch 2" in printed
    assert [line[:12] for line in second[0].splitlines()] == ["computing on", "waiting for "] and not second[1]
    training.main([*argv, "--run_dir", str(tmp_path / "longer" / "run"), "--epochs", "3"])
    check_same(tmp_path / "longer", tmp_path)

    for root in (tmp_path, tmp_path / "longer"):
        training.main([*argv, "--run_dir", str(root / "run"), "--epochs", "4"])
    check_same(tmp_path / "longer", tmp_path)
    files = [sorted(path.name for path in (root / "run").iterdir()) for root in (tmp_path, tmp_path / "longer")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_killed_worker_ends_the_other_with_one_line(alone, tmp_path):
    argv = [
        *options(alone),
        *SETTINGS,
        "--run_dir",
        str(tmp_path / "run"),
        "--epochs",
        "100000",
        "--patience",
        "100000",
    ]
    chief, worker = start_workers(argv, argv)
    try:
        while "epoch 2" not in chief.stderr.readline(200):
            assert chief.poll() is None
        worker.kill()
        _, shown = chief.communicate(timeout=600)
    finally:
        for process in (chief, worker):
            process.kill()
            process.communicate()
    assert chief.returncode == 2
    assert "error: another worker stopped or cannot be reached: run the same command" in shown.splitlines()[-1]
    assert "Traceback" not in shown
    assert list_checkpoints(tmp_path / "run" / "last")


@pytest.mark.slow
def test_workers_whose_run_folders_differ_are_refused(alone, tmp_path):
    argvs = [[*options(alone), *SETTINGS, "--run_dir", str(folder)] for folder in (alone / "run", tmp_path / "run")]
    for _, shown in finish(start_workers(*argvs), status=2):
        assert "set --run_dir to one folder that all of them share" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["--batch_size", "the vocabulary"])
def test_workers_with_other_settings_or_words_are_refused_before_the_first_step(alone, tmp_path, what):
    argv = [*options(alone), *SETTINGS, "--run_dir", str(tmp_path / "run")]
    other = [*argv, "--batch_size", "16", "--checkpoint_minutes", "7"]  # the latter may differ
    if what == "the vocabulary":
        shutil.copytree(alone / "data", tmp_path / "data")
        words = json.loads((tmp_path / "data" / "vocabulary.json").read_text())
        (tmp_path / "data" / "vocabulary.json").write_text(json.dumps([*words[:-1], "another"]))
        other = [*argv, "--data_dir", str(tmp_path / "data")]
    for _, shown in finish(start_workers(argv, other), status=2):
        assert f"error: {what} is not the same on every worker (" in shown
        assert " on worker 0 (127.0.0.1:" in shown and " on worker 1 (127.0.0.1:" in shown
        assert "Traceback" not in shown
    assert not list((tmp_path / "run").glob("*"))


DATA = Prepared(
    train=[CaptionedImage(1, "1.jpg", references=["a dog"], encoded_captions=[[START, 4, END]])],
    validation=[CaptionedImage(2, "2.jpg", references=["a cat"], encoded_captions=[[START, 5, END]])],
    test=[],
    vocabulary=["<pad>", "<unk>", "<start>", "<end>", "dog", "cat"],
    feature_mean=np.zeros(2048, np.float32),
    feature_std=1.0,
    network="a network",
)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            {},
            {"learning_rate": 0.01},
            r"--learning_rate is not the same .*\(0.001 on chief 0 \(h:1\), 0.01 on worker 1 ",
        ),
        ({}, {"seed": 7}, "--seed is not .*: give every worker the same value"),
        ({}, {"max_words": 9}, "--max_words is not"),
        ({}, {"units": 9}, "--units is not"),
        (
            {"vocabulary": [*DATA.vocabulary[:-1], "car"]},
            {},
            "the vocabulary is not .*: copy data/coco from one worker",
        ),
        ({"train": DATA.validation}, {}, "the training split is not"),
        ({"validation": DATA.train}, {}, "the validation split is not"),
        ({"train": [dataclasses.replace(DATA.train[0], references=["dogs"])]}, {}, "the training split is not"),
        ({"network": "another"}, {}, r"\(a network on chief 0 .*, another on worker 1 \(h:3\)\)"),
        ({"feature_mean": np.ones(2048, np.float32)}, {}, "the features' statistics is not"),
        ({"feature_std": 2.0}, {}, "the features' statistics is not"),
        (
            {"train": [dataclasses.replace(DATA.train[0], folder="there")]},
            {"data_dir": "there", "run_dir": "there"},
            "",
        ),
        (
            {},
            {"features_dir": "f", "coco_dir": "c", "checkpoint_minutes": 7.0, "decode_batch": 5, "tensorboard": "yes"},
            "",
        ),
    ],
)
def test_what_must_be_the_same_on_every_worker_and_what_need_not_be(changes, settings, message, monkeypatch):
    """The third of three workers is another than the chief and the first."""
    cluster = {"chief": ["h:1"], "worker": ["h:2", "h:3"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": "chief", "index": 0}}))
    sent = []
    monkeypatch.setattr(distribution, "_gather_texts", lambda text: sent.append(text) or [text])
    config = make_config({"strategy": "multiworker"})
    check_same_training(dataclasses.replace(DATA, **changes), dataclasses.replace(config, **settings))
    monkeypatch.setattr(distribution, "_gather_texts", lambda text: [text, text, sent.pop(0)])
    if message:
        with pytest.raises(UserError, match=message):
            check_same_training(DATA, config)
    else:
        check_same_training(DATA, config)
        assert not sent


def test_workers_with_another_model_file_are_refused(monkeypatch):
    """Each would add the gradients of its own model to the others'."""
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": ["h:1", "h:2"]}}))
    theirs = lambda text: text.replace(workers.model_digest(), "another")  # noqa: E731
    monkeypatch.setattr(distribution, "_gather_texts", lambda text: [text, theirs(text)])
    with pytest.raises(UserError, match=r"model\.py is not the same .*another on worker 1 .*: copy it from one worker"):
        check_same_training(DATA, make_config({"strategy": "multiworker"}))


@pytest.mark.parametrize("text", [None, "", "two hosts", "[]", '{"cluster": {"worker": ["127.0.0.1:1"]}}'])
def test_a_tf_config_that_does_not_say_which_worker_this_is_is_refused(text, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError, match="TF_CONFIG.*set it on every worker"):
        _open_strategy("multiworker")


@pytest.mark.parametrize("job, index", [("worker", 1), ("worker", -1), ("ps", 0), ("chief", 0)])
def test_a_worker_that_tf_config_does_not_list_is_refused(job, index, monkeypatch):
    cluster = {"worker": ["127.0.0.1:1"], "ps": ["127.0.0.1:2"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": job, "index": index}}))
    with pytest.raises(UserError, match="does not list the workers"):
        _open_strategy("multiworker")


def test_mirrored_without_several_gpus_is_refused():
    with pytest.raises(UserError, match="TensorFlow finds 1 here: run the same command with --strategy auto"):
        _open_strategy("mirrored", ["CPU:0"])


class Cluster:
    """What share_batches asks of a strategy."""

    num_replicas_in_sync = 4


@pytest.mark.parametrize("own", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2, 3]]])
@pytest.mark.parametrize("captions, batch_size", [(95, 15), (64, 16), (5, 3), (3, 64)])
def test_every_caption_is_one_processs_once_an_epoch(own, captions, batch_size, monkeypatch):
    order = np.random.default_rng(0).permutation(captions)
    monkeypatch.setattr(tf.distribute, "get_strategy", Cluster)
    processes = []
    for numbers in own:
        monkeypatch.setattr(distribution, "local_replica_ids", lambda numbers=numbers: numbers)
        processes.append(share_batches(order, batch_size))
    for number, shares in enumerate(zip(*processes, strict=True)):
        batch = order[number * batch_size : (number + 1) * batch_size]
        dealt = np.concatenate([part.reshape(len(own[0]), -1) for part in shares])  # (4, b)
        for replica, share in enumerate(dealt):
            assert share[share >= 0].tolist() == batch[replica::4].tolist()  # which the dropout masks go by
        assert dealt.shape == (4, -(-min(batch_size, captions) // 4))
    assert len(processes[0]) == -(-captions // batch_size)


def train_in(root, run, precision, epochs):
    training.main([*options(root), "--run_dir", str(run), "--precision", precision, "--epochs", str(epochs)])


@pytest.mark.slow
def test_mixed_float16_learns_and_its_runs_continue_in_any_precision(alone, tmp_path):
    losses = {}
    for precision in ("float32", "mixed_float16"):
        train_in(alone, tmp_path / precision / "run", precision, 2)
        losses[precision] = [float(row["train_loss"]) for row in rows(tmp_path / precision)]
    np.testing.assert_allclose(losses["mixed_float16"], losses["float32"], rtol=2e-3)
    run = tmp_path / "mixed_float16" / "run"
    for epochs, precision in ((3, "float32"), (4, "mixed_float16"), (5, "mixed_float16")):
        train_in(alone, run, precision, epochs)
    assert [row["epoch"] for row in rows(run.parent)] == ["1", "2", "3", "4", "5"]


@pytest.mark.slow
def test_gradients_that_overflow_skip_the_step_and_halve_the_scale(tmp_path):
    settings = {"units": 16, "embedding_dim": 12, "encoder_dim": 8, "precision": "mixed_float16"}
    config = make_config(settings | {"run_dir": str(tmp_path)})
    image = CaptionedImage(1, "1.jpg", encoded_captions=[[START, END]])
    words = [str(number) for number in range(21)]
    state = training.open_run(Prepared([image], [], [], words, np.zeros(2048, np.float32), 1.0, "a network"), config)
    features = np.random.default_rng(0).random((2, 64, 2048), np.float32)  # alike everywhere, attention learns nothing
    features = tf.cast(features, config.feature_dtype)
    captions = tf.constant([[START, 7, END]] * 2)  # the detector learns from it at the first step, see EVERY
    before = [weight.numpy() for weight in state.trainable_variables]
    state.loss_scale.dynamic_scale.assign(2.0**40)
    assert np.isfinite(training.train_step(state, features, captions, config))
    for weight, value in zip(state.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert float(state.loss_scale.dynamic_scale) == 2.0**39
    assert int(state.optimizer.iterations) == 0

    state.loss_scale.dynamic_scale.assign(2.0**10)
    training.train_step(state, features, captions, config)
    assert int(state.optimizer.iterations) == 1
    assert all(
        np.abs(weight - value).max() > 0 for weight, value in zip(state.trainable_variables, before, strict=True)
    )


# --- One replica --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "two hosts", {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}])
def test_a_stray_tf_config_changes_nothing(text, monkeypatch, capsys):
    """Schedulers of clusters set it for every job. Without --strategy multiworker this process computes alone."""
    if isinstance(text, dict):
        text = json.dumps({"cluster": text, "task": {"type": "worker", "index": 1}})
    monkeypatch.setenv("TF_CONFIG", text)
    config = make_config()
    with replicas(config.strategy):
        assert tf.distribute.get_strategy().num_replicas_in_sync == 1
        assert is_chief()
        check_same_everywhere({"a number": 3.0}, "give another")
        print("the chief prints")
    assert capsys.readouterr().out == "the chief prints\n"


def test_outside_of_a_strategy_there_is_one_replica_that_has_all_rows():
    batch = tf.reshape(tf.range(6), (3, 2))

    def replica(batch):
        assert replica_rows(batch) is batch
        return sum_replicas(tf.reduce_sum(batch))

    assert run_replicas(replica, batch) == 15
    assert share_batches(np.arange(5), 2).tolist() == [[0, 1], [2, 3], [4, -1]]


def test_a_single_process_sums_and_gives_what_it_has():
    assert distribution._gather_texts('{"é": 1}') == ['{"é": 1}']
    assert sum_processes(2.5) == 2.5
    assert value_of_chief(lambda: 0.1) == 0.1


def test_errors_that_are_not_a_lost_workers_stay_what_they_are():
    with pytest.raises(tf.errors.InternalError), replicas("auto"):
        raise tf.errors.InternalError(None, None, "a fault of the program")
