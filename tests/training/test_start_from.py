import dataclasses
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf

import data_utils
import train_image_caption_model as training
from captioning.features.cache import load_data
from captioning.settings import make_config
from captioning.training import start_from
from captioning.training.run_folder import check_other_data, load_captioner
from captioning.training.workers import check_same_training
from captioning.vocabulary import SPECIAL_WORDS
from conftest import options, rows, weights, write_features
from support import distribution
from support.errors import UserError
from tiny_captioner import SIZES, VOCABULARY, tiny_captioner

IMAGES = 12
NEW = {"horse", "sleeps"}


def write_table(root, count=IMAGES):
    """Other captions of a table's images, in some of the words of the tiny COCO, and their features."""
    (root / "images").mkdir(parents=True)
    lines = ["image,caption"]
    for number in range(1, count + 1):
        name = f"COCO_train2014_{number:012d}"
        (root / "images" / f"{name}.jpg").write_bytes(b"never read, as its features are there")
        colour = ("red", "green", "blue", "white")[number % 4]
        lines += [f"{name}.jpg,{text}" for text in (f"a {colour} horse sleeps", f"{colour} horse")]
    (root / "captions.csv").write_text("\n".join(lines))
    write_features(root / "data" / "features", count)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The root of a small data set of other captions, prepared; tests only read it."""
    root = tmp_path_factory.mktemp("others")
    write_table(root)
    places = {"captions": root / "captions.csv", "images": root / "images", "data_dir": root / "data"}
    given = [part for name, path in places.items() for part in (f"--{name}", str(path))]
    data_utils.main(["--dataset", "table", *given, "--num_examples", "none", "--inception_weights", "random"])
    return root


def command(others, run, start, *more, sizes=()):
    """Options that go on from `start`. The sizes are RUN's."""
    given = {"data_dir": others / "data", "run_dir": run, "start_from": start, "batch_size": 16, "epochs": 1}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))] + [*sizes, *more]


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def words_of(folder):
    return json.loads((folder / "vocabulary.json").read_text())


# --- Weights ------------------------------------------------------------------------------------------------------


def begun_state(vocabulary):
    """(the Captioner begun from, the TrainingState after `take_weights`)."""
    config = make_config({**SIZES, "start_from": "runs/old"})
    start = tiny_captioner(config)
    features = np.zeros(2048, np.float32)
    image = dataclasses.make_dataclass("Image", ["encoded_captions"])([[2, 4, 3]])
    prepared = dataclasses.make_dataclass("Data", ["train", "vocabulary", "feature_mean", "feature_std"])(
        [image], vocabulary, features, 1.0
    )
    state = training.build_state(prepared, "float32", config)
    start_from.take_weights(state, start, vocabulary, config)
    return start, state


def test_words_keep_what_is_theirs_and_new_ones_begin_at_the_mean(capsys):
    vocabulary = [*SPECIAL_WORDS, "new", "word3", "tüür", "newer", "word0"]
    start, state = begun_state(vocabulary)
    for get, axis in (
        (lambda decoder: decoder.embedding.embeddings, 0),
        (lambda decoder: decoder.output_layer.kernel, 1),
        (lambda decoder: decoder.output_layer.bias, 0),
        (lambda decoder: decoder.detector.kernel, 0),
        (lambda decoder: decoder.detector.bias, 0),
    ):
        old, now = (np.moveaxis(np.array(get(decoder)), axis, 0) for decoder in (start.decoder, state.decoder))
        assert len(now) == len(vocabulary)
        for word, row in zip(vocabulary, now, strict=True):
            expected = old[VOCABULARY.index(word)] if word in VOCABULARY else old[4:].mean(0)
            np.testing.assert_allclose(row, expected, rtol=1e-5, err_msg=word)
    assert capsys.readouterr().out == "begun from runs/old, best/ckpt-1: 3 words kept, 2 new, 14 lost\n"


def test_all_other_weights_and_the_features_statistics_are_taken(capsys):
    start, state = begun_state(VOCABULARY)
    for name in ("encoder", "decoder"):
        for mine, theirs in zip(getattr(state, name).weights, getattr(start, name).weights, strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=mine.path)
    assert float(state.encoder.feature_std) == float(start.encoder.feature_std) != 1
    assert int(state.optimizer.iterations) == 0
    assert "17 words kept, 0 new, 0 lost" in capsys.readouterr().out


def test_several_devices_take_the_weights_too():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        start, state = begun_state([*SPECIAL_WORDS, "word3"])
    kernel = np.array(tf.convert_to_tensor(state.decoder.output_layer.kernel.value))
    np.testing.assert_array_equal(kernel[:, 4], tf.convert_to_tensor(start.decoder.output_layer.kernel.value)[:, 7])


# --- Through the scripts ------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_another_and_resumes_without_it(trained, others, tmp_path, capsys, monkeypatch):
    """RUN is never written to, and may be gone once the run has begun; the same command then says nothing else."""
    before = content(trained / "run")
    old = tmp_path / "old"
    shutil.copytree(trained / "run", old)
    argv = command(others, tmp_path / "run", old)
    training.main(argv)
    printed = capsys.readouterr().out
    kept = set(words_of(old)) & set(words_of(tmp_path / "run")) - {*SPECIAL_WORDS}
    assert set(words_of(tmp_path / "run")) == {*SPECIAL_WORDS, *kept, *NEW}
    lost = len(words_of(old)) - 4 - len(kept)
    assert f"begun from {old}, best/ckpt-2: {len(kept)} words kept, 2 new, {lost} lost" in printed
    assert f"taken from {old}: encoder_dim 8, embedding_dim 12, units 16" in printed
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["start_from"], saved["units"], saved["dataset"]) == (str(old), 16, "table")
    assert content(old) == before

    shutil.rmtree(old)
    done = weights(tmp_path)
    training.main(argv)  # nothing is left to do
    for name, value in weights(tmp_path).items():
        np.testing.assert_array_equal(value, done[name])
    capsys.readouterr()
    training.main([*argv[:-2], "--epochs", "2"])
    printed = capsys.readouterr().out
    assert f"continuing {tmp_path / 'run'} after epoch 1" in printed and "begun from" not in printed
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]
    without = ["--data_dir", str(others / "data"), "--run_dir", str(tmp_path / "run"), "--epochs", "2"]
    training.main(without)  # --start_from need not be said again
    assert json.loads((tmp_path / "run" / "config.json").read_text())["start_from"] == str(old)
    monkeypatch.chdir(tmp_path)
    training.main([*without, "--start_from", "old"])  # which is the same folder
    for other in ("", "elsewhere"):
        with pytest.raises(UserError, match="was begun with --start_from .*old, not .*: give --start_from .*old, or"):
            training.main([*without, "--start_from", other])
    with pytest.raises(UserError, match="was begun with --keep_vocabulary no, not yes: give --keep_vocabulary no, or"):
        training.main([*without, "--keep_vocabulary", "yes"])


def test_the_weights_it_begins_with_stay_the_best_until_an_epoch_is_better(trained, tmp_path, capsys):
    """On RUN's own data with a rate that spoils everything."""
    run = tmp_path / "run"
    argv = [*options(trained), "--run_dir", str(run), "--start_from", str(trained / "run"), "--learning_rate", "3"]
    training.main([*argv, "--epochs", "9", "--patience", "1"])
    printed = capsys.readouterr().out
    validation = rows(trained)[-1]["validation_loss"]
    assert f"validation loss before the first step: {float(validation):.3f} nats per word" in printed
    assert "no better validation loss for 1 epochs" in printed
    assert f"trained 1 epochs; the best is what they began with, {float(validation):.3f} nats" in printed
    for name, value in weights(tmp_path, "best").items():
        np.testing.assert_array_equal(value, weights(trained, "best")[name])


class PowerCut(BaseException):
    pass


def test_a_run_that_is_killed_as_it_begins_begins_in_the_end(trained, others, tmp_path, monkeypatch):
    """Before the start is measured, and then between `best` and `last`."""
    argv = command(others, tmp_path / "run", trained / "run")

    def cut_power(*args):
        raise PowerCut

    for place in ((training, "validate"), (start_from, "save_last")):
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            patch.setattr(*place, cut_power)
            training.main(argv)
        assert [path.name for path in (tmp_path / "run" / "last").glob("*.index")] == ["ckpt-0.index"]
    assert (tmp_path / "run" / "best" / "ckpt-0.index").exists()
    training.main(argv)
    training.main(command(others, tmp_path / "whole", trained / "run"))
    expected = weights(tmp_path, run="whole")
    for name, value in weights(tmp_path).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=name)


def test_with_keep_vocabulary_the_old_words_say_the_other_captions(trained, others, tmp_path, capsys):
    argv = command(others, tmp_path / "run", trained / "run", "--keep_vocabulary", "yes")
    training.main(argv)
    printed = capsys.readouterr().out
    old = words_of(trained / "run")
    assert f"{len(old) - 4} words kept, 0 new, 0 lost" in printed
    assert "of the words of the training captions 50.0% are not in the kept vocabulary" in printed  # 1 of 2, 2 of 4
    assert words_of(tmp_path / "run") == old
    training.main([*argv, "--epochs", "2"])
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]
    capsys.readouterr()
    for root, is_other in ((others, False), (trained, True)):
        config = make_config({"data_dir": str(root / "data")})
        data = dataclasses.replace(prepared_of(root), vocabulary=[*SPECIAL_WORDS, "other"])
        check_other_data(tmp_path / "run", config.data_dir, data)
        assert ("was not trained on" in capsys.readouterr().out) == is_other


def test_a_last_checkpoint_is_taken_where_no_best_one_can_be_read(trained, others, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "old")
    for path in (tmp_path / "old" / "best").glob("*.index"):
        path.write_bytes(b"damaged")
    config = make_config({"start_from": str(tmp_path / "old"), "run_dir": str(tmp_path / "run"), **sizes_of(trained)})
    start = start_from.read_start(prepared_of(others), config)
    assert start.checkpoint == "last/ckpt-2"
    assert start.identity == load_captioner(dataclasses.replace(config, run_dir=str(tmp_path / "old"))).identity
    assert "last/ckpt-2 is taken instead" in capsys.readouterr().out


def sizes_of(root):
    saved = json.loads((root / "run" / "config.json").read_text())
    return {name: saved[name] for name in ("encoder_dim", "embedding_dim", "units")}


def prepared_of(root):
    saved = json.loads((root / "data" / "settings.json").read_text())
    config = make_config({name: saved[name] for name in saved.keys() - {"splits", "network"}})
    return load_data(dataclasses.replace(config, data_dir=str(root / "data")))


# --- What is refused ----------------------------------------------------------------------------------------------


def refused(argv, message):
    with pytest.raises(UserError, match=message) as raised:
        training.main(argv)
    assert "\n" not in str(raised.value)


def test_the_run_that_is_gone_on_from_is_never_written_to(trained, others, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "old")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    before = content(tmp_path / "old")
    for run in (tmp_path / "old", tmp_path / "link", tmp_path / "old" / "new"):
        refused(command(others, run, tmp_path / "old"), "would write into --start_from: give another --run_dir")
    assert content(tmp_path / "old") == before


def test_other_sizes_are_refused(trained, others, tmp_path):
    argv = command(others, tmp_path / "run", trained / "run", "--units", "20")
    refused(argv, "run was trained with --units 16, not 20: give --units 16, or give another --start_from")
    assert not (tmp_path / "run").exists()


def test_features_of_another_network_are_refused(trained, others, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "old")
    (tmp_path / "old" / "network.json").write_text('"InceptionV3 of other weights"')
    argv = command(others, tmp_path / "run", tmp_path / "old")
    refused(argv, r"old was trained on features of another network .*others.*: give another --start_from$")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("lacking", ["run", "checkpoints", "whole checkpoints", "whole settings", "words"])
def test_a_run_that_cannot_be_gone_on_from_is_one_line(trained, others, tmp_path, lacking):
    old = tmp_path / "old"
    message = "no trained model is in .*old"
    if lacking != "run":
        shutil.copytree(trained / "run", old)
    if lacking == "checkpoints":
        shutil.rmtree(old / "best")
        shutil.rmtree(old / "last")
    if lacking == "whole checkpoints":
        message = "best/ckpt-2 cannot be read .*"
        for path in old.rglob("ckpt*.index"):
            path.write_bytes(b"damaged")
    if lacking == "whole settings":
        message = "config.json cannot be read .*"
        (old / "config.json").write_text("{")
    if lacking == "words":
        message = "vocabulary.json is missing"
        (old / "vocabulary.json").unlink()
    refused(command(others, tmp_path / "run", old), f"{message}: give another --start_from$")


def test_words_can_be_kept_of_a_run_only(others, tmp_path):
    argv = ["--data_dir", str(others / "data"), "--run_dir", str(tmp_path / "run"), "--keep_vocabulary", "yes"]
    refused(argv, "--keep_vocabulary yes is for going on from a run: name that run by --start_from")


def test_a_run_that_began_from_none_does_not_begin_from_one_later(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({name: saved[name] for name in saved if name != "start_from"}))  # of older code
    argv = [*options(trained), "--run_dir", str(tmp_path / "run"), "--start_from", str(trained / "run")]
    refused(argv, "was begun with --start_from '', not .*: give --start_from '', or give another --run_dir")


def test_workers_that_begin_from_other_weights_are_refused(others, monkeypatch):
    """The second of two workers has another run, or a copy of the same."""
    cluster = {"cluster": {"worker": ["h:1", "h:2"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    config = make_config({"strategy": "multiworker", "start_from": "old"})
    start = dataclasses.replace(tiny_captioner(make_config(SIZES)), identity="a0a0")
    monkeypatch.setattr(distribution, "_gather_texts", lambda text: [text, text])
    check_same_training(prepared_of(others), config, start)
    monkeypatch.setattr(distribution, "_gather_texts", lambda text: [text, text.replace("a0a0", "b1b1")])
    with pytest.raises(
        UserError, match=r"--start_from is not .*\(a0a0 on .*, b1b1 on .*\): give every worker the same"
    ):
        check_same_training(prepared_of(others), config, start)
