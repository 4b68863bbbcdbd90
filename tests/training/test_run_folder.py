import dataclasses
import hashlib
import json
import types

import numpy as np
import pytest
import tensorflow as tf

from captioning.features.manifest import MADE_ELSEWHERE
from captioning.features.network import network_identity
from captioning.settings import make_config, naming_commands
from captioning.training.run_folder import begin_run, check_new_run, check_run_fits, run_network, run_settings
from captioning.vocabulary import SPECIAL_WORDS
from config import Config
from support.errors import UserError

RANDOM = network_identity(make_config({"inception_weights": "random", "seed": 7}))


def prepared(network=RANDOM, words=("a", "dog"), channels=2048):
    """Of Prepared, what a run folder keeps, and what it is compared with."""
    mean = np.zeros(channels, np.float32)
    return types.SimpleNamespace(vocabulary=[*SPECIAL_WORDS, *words], network=network, feature_mean=mean)


@pytest.fixture
def config(tmp_path):
    places = {"run_dir": str(tmp_path / "run"), "features_dir": str(tmp_path / "features")}
    return make_config({**places, "dataset": "demo", "inception_weights": "random", "seed": 7, "units": 9})


# --- Writing ----------------------------------------------------------------------------------------------------


def test_a_run_holds_its_settings_words_network_and_statistics(config, tmp_path):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "random_statistics.npz").write_bytes(b"statistics")
    begin_run(prepared(), config)
    run = tmp_path / "run"
    assert json.loads((run / "config.json").read_text()) == dataclasses.asdict(config)
    assert json.loads((run / "vocabulary.json").read_text()) == [*SPECIAL_WORDS, "a", "dog"]
    assert json.loads((run / "network.json").read_text()) == RANDOM
    assert (run / "random_statistics.npz").read_bytes() == b"statistics"
    assert not list(run.glob(".tmp*"))


def test_a_run_that_is_continued_says_which_settings_differ(config, capsys):
    begin_run(prepared(), config)
    assert capsys.readouterr().out == ""
    begin_run(prepared(), dataclasses.replace(config, batch_size=16, epochs=3, beam_width=5))
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"continuing with --epochs 3; the run had {config.epochs} before"
    assert second == f"continuing with --batch_size 16; the run had {config.batch_size} before"


# --- Whether a run fits -----------------------------------------------------------------------------------------


def test_data_of_the_same_words_and_network_fit(config):
    begin_run(prepared(), config)
    check_run_fits(config.run_dir, config, prepared())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (prepared(words=("dog", "a")), "another vocabulary"),
        (prepared(words=("a",)), r"another vocabulary \(6 words\) than .* \(5 words\)"),
        (prepared(network=MADE_ELSEWHERE), f"{RANDOM}.*{MADE_ELSEWHERE}"),
        (prepared(network=RANDOM.replace("7", "8")), "seed 7.*seed 8"),
    ],
)
def test_data_of_other_words_or_another_network_are_refused(config, data, message):
    begin_run(prepared(), config)
    with (
        pytest.raises(UserError, match=f"{message}.*move that folder away.*--dataset demo") as raised,
        naming_commands(config),
    ):
        check_run_fits(config.run_dir, config, data)
    assert "delete" not in str(raised.value)


def test_features_made_elsewhere_of_other_sizes_are_refused(config):
    """Nothing but their sizes tells that two programs made them."""
    begin_run(prepared(MADE_ELSEWHERE), config)
    check_run_fits(config.run_dir, config, prepared(MADE_ELSEWHERE))
    message = "features of 2048 channels, and .* have 960: .*move that folder away"
    with pytest.raises(UserError, match=message), naming_commands(config):
        check_run_fits(config.run_dir, config, prepared(MADE_ELSEWHERE, channels=960))


def test_a_cnn_that_nobody_knows_is_a_damaged_file(config, tmp_path):
    begin_run(prepared(), config)
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"InceptionV3"', '"InceptionV9"'))
    with pytest.raises(UserError, match="config.json is damaged .its CNN is 'InceptionV9'.: "), naming_commands(config):
        check_run_fits(config.run_dir, config, prepared())


def test_other_sizes_are_refused_and_named(config):
    begin_run(prepared(), config)
    with pytest.raises(UserError, match="--units 9, not 20: give --units 9"):
        check_run_fits(config.run_dir, dataclasses.replace(config, units=20), prepared())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vocabulary.json", ""),
        ("vocabulary.json", "{}"),
        ("vocabulary.json", '["<pad>"]'),
        ("config.json", "["),
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("network.json", ""),
        ("network.json", "[7]"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line_that_loses_nothing(config, tmp_path, name, text):
    begin_run(prepared(), config)
    (tmp_path / "run" / name).write_text(text)
    with (
        pytest.raises(UserError, match=f"{name} .*: give another --run_dir, or move that folder away") as raised,
        naming_commands(config),
    ):
        check_run_fits(config.run_dir, config, prepared())
    assert "\n" not in str(raised.value) and "delete" not in str(raised.value)


def test_a_run_begins_where_there_is_nothing_or_no_weights(config, tmp_path):
    check_new_run(config.run_dir, config.data_dir)
    begin_run(prepared(), config)  # and was then killed
    (tmp_path / "run" / "best").mkdir()
    (tmp_path / "run" / "best" / "ckpt-1.data-00000-of-00001").write_bytes(b"half")
    check_new_run(config.run_dir, config.data_dir)


def test_a_run_does_not_begin_among_another_runs_best_weights(config, tmp_path):
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "ckpt-5.index").write_bytes(b"weights")
    message = "holds best/ckpt-5 and no checkpoint in last/.*move that folder away"
    with pytest.raises(UserError, match=message) as raised, naming_commands(config):
        check_new_run(config.run_dir, config.data_dir)
    assert "\n" not in str(raised.value) and "delete" not in str(raised.value)


def test_a_run_does_not_begin_among_other_prepared_data(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="holds prepared data.*give another --run_dir"), naming_commands(config):
        check_new_run(config.run_dir, config.data_dir)
    check_new_run(config.run_dir, f"{tmp_path}/run/../run")  # its own


# --- The settings of a run --------------------------------------------------------------------------------------


def test_data_and_model_are_the_runs_and_all_else_is_config_pys(config):
    began = dataclasses.replace(config, vocab_size=77, encoder_dim=5, beam_width=4, decode_batch=3, data_dir="moved")
    begin_run(prepared(), began)
    settings = run_settings({"figures": 1}, config.run_dir)
    assert (settings.dataset, settings.vocab_size, settings.data_dir) == ("demo", 77, "moved")
    assert (settings.units, settings.encoder_dim, settings.seed) == (9, 5, 7)
    assert settings.inception_weights == "random"
    assert settings.beam_width == Config().beam_width
    assert settings.decode_batch == Config().decode_batch
    assert settings.repeat_block == 0  # of the demo's preset
    assert (settings.figures, settings.run_dir) == (1, config.run_dir)


def test_the_command_line_wins(config):
    begin_run(prepared(), config)
    settings = run_settings({"units": 20, "beam_width": 3}, config.run_dir)
    assert (settings.units, settings.beam_width) == (20, 3)
    with pytest.raises(UserError, match="nowhere/settings.json is missing"):
        run_settings({"data_dir": "nowhere"}, config.run_dir)  # other data bring their own settings


def test_before_training_the_command_is_named(tmp_path):
    given = {"dataset": "demo"}
    with pytest.raises(UserError, match="run python train_image_caption_model.py --dataset demo first"):
        run_settings(given, str(tmp_path / "nothing"))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"units": "many"}', '{"dataset": 1}'])
def test_damaged_settings_of_a_run_are_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=str(tmp_path)) as raised:
        run_settings({}, str(tmp_path))
    assert "\n" not in str(raised.value)


# --- The network of a run ---------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"weights")
    return tmp_path / "weights.h5", hashlib.sha256(b"weights").hexdigest()[:16]


def begin_with(config, network):
    begin_run(prepared(network), config)


def test_features_made_elsewhere_leave_new_images_without_a_network(config):
    begin_with(config, MADE_ELSEWHERE)
    with pytest.raises(UserError, match="made by another program.*python data_utils.py"):
        run_network(config)


def test_weights_of_another_hash_are_one_line_that_names_both(config, weights, tmp_path):
    path, digest = weights
    config = dataclasses.replace(config, inception_weights=str(path))
    begin_with(config, network_identity(config))
    other = tmp_path / "other.h5"
    other.write_bytes(b"others")
    other_digest = hashlib.sha256(b"others").hexdigest()[:16]
    with pytest.raises(UserError, match=f"{digest}.*{other_digest}.*--inception_weights"):
        run_network(dataclasses.replace(config, inception_weights=str(other)))


def test_weights_that_did_not_come_along_are_named_with_their_hash(config, weights):
    path, digest = weights
    config = dataclasses.replace(config, inception_weights=str(path))
    begin_with(config, network_identity(config))
    path.unlink()
    with pytest.raises(UserError, match=f"weights.h5 is not here.*{digest}.*--inception_weights"):
        run_network(config)


def test_a_file_of_imagenets_weights_that_did_not_come_along_is_imagenet(config, tmp_path):
    begin_with(config, f"{config.cnn}, weights imagenet")
    with pytest.raises(UserError, match=r"notop.h5 is not here.*: give --inception_weights imagenet$"):
        run_network(dataclasses.replace(config, inception_weights=str(tmp_path / "notop.h5")))


@pytest.mark.parametrize("change", [{"seed": 8}, {"inception_weights": "imagenet"}])
def test_another_network_on_the_command_line_is_one_line_that_names_both(config, change):
    begin_with(config, RANDOM)
    other = dataclasses.replace(config, **change)
    with pytest.raises(UserError, match=f"{RANDOM}.*{network_identity(other)}"):
        run_network(other)


@pytest.mark.parametrize("text", [None, "", "{}", "[1]"])
def test_a_damaged_identity_is_one_line(config, tmp_path, text):
    begin_with(config, RANDOM)
    path = tmp_path / "run" / "network.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(UserError, match="network.json"):
        run_network(config)


def test_the_network_takes_the_statistics_of_the_run_and_no_others(config, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "captioning.training.run_folder.feature_network", lambda *args, **named: asked.append((args, named))
    )
    begin_with(config, RANDOM)
    run_network(config)
    ((args, named),) = asked
    assert args == (config, tmp_path / "run" / "random_statistics.npz")
    assert named == {"expected_identity": RANDOM}


@pytest.mark.parametrize("gpus", [[], ["a GPU"]])
@pytest.mark.parametrize("keep", [False, True])
def test_the_network_is_kept_where_that_is_wanted_and_there_is_no_gpu(config, tmp_path, monkeypatch, gpus, keep):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr("captioning.training.run_folder.feature_network", lambda *args, **named: "made anew")
    monkeypatch.setattr("captioning.training.run_folder.kept_network", lambda *args, **named: (args, named))
    begin_with(config, RANDOM)
    statistics = tmp_path / "run" / "random_statistics.npz"
    kept = (tmp_path / "run", config, statistics), {"expected_identity": RANDOM}
    assert run_network(config, keep=keep) == (kept if keep and not gpus else "made anew")


@pytest.mark.slow
def test_random_weights_without_their_statistics_are_one_line(config, tmp_path):
    begin_with(config, RANDOM)
    with pytest.raises(UserError, match="random_statistics.npz is missing"):
        run_network(config)
    statistics = tmp_path / "run" / "random_statistics.npz"
    np.savez(statistics, np.zeros(3), identity="another network")
    begin_with(config, network_identity(config, statistics))
    with pytest.raises(UserError, match="random_statistics.npz is missing or damaged"):
        run_network(config)
