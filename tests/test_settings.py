import dataclasses
import pathlib
import tempfile

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from captioning.settings import (
    DATA_SETTINGS,
    MODEL_SETTINGS,
    TRAINING_SETTINGS,
    adopt_settings,
    dataset_option,
    differing_settings,
    make_config,
    naming_commands,
    quote,
    read_settings,
)
from config import PRESETS, Config
from strategies import TEXT, check_one_line
from support.errors import FileError, UserError, mended_by
from support.files import read_json, write_json


def test_defaults_are_the_configs():
    assert read_settings([], "")[0] == make_config() == Config()


def test_command_line_beats_preset_beats_default():
    config, _ = read_settings(["--dataset", "demo", "--data_dir", "elsewhere", "--dropout", "0.25"], "")
    assert config.data_dir == "elsewhere"
    assert config.run_dir == PRESETS["demo"]["run_dir"] != Config().run_dir
    assert config.dropout == 0.25


def test_a_scripts_own_options_come_beside_the_settings():
    add_options = lambda parser: parser.add_argument("--shard")  # noqa: E731
    config, options = read_settings(["--shard", "1/2", "--units", "7"], "", add_options)
    assert (config.units, options.shard) == (7, "1/2")


@pytest.mark.parametrize("dataset", PRESETS)
def test_every_preset_is_valid(dataset):
    config = make_config({"dataset": dataset})
    assert config.dataset == dataset
    assert dataclasses.asdict(config).items() >= PRESETS[dataset].items()


def test_the_preset_is_that_of_the_last_layer_that_names_a_data_set():
    config = make_config({"dataset": "demo"}, {"dataset": "karpathy", "units": 7})
    assert (config.dataset, config.run_dir, config.units) == ("karpathy", PRESETS["karpathy"]["run_dir"], 7)


def test_each_setting_is_of_one_kind_at_the_most():
    groups = [*DATA_SETTINGS, *MODEL_SETTINGS, *TRAINING_SETTINGS]
    names = {field.name for field in dataclasses.fields(Config)}
    assert len(set(groups)) == len(groups) and set(groups) <= names
    assert PRESETS["karpathy"].keys() | PRESETS["demo"].keys() <= names


# --- Settings taken from prepared data or from a run --------------------------------------------------------------


SAVED = dataclasses.asdict(
    make_config({"dataset": "karpathy", "karpathy_json": "k.json", "images": "my photos", "vocab_size": 77, "units": 9})
)


def test_what_data_were_prepared_with_need_not_be_typed_again(capsys):
    config = adopt_settings({"data_dir": "d"}, SAVED, DATA_SETTINGS, "d")
    assert (config.dataset, config.karpathy_json, config.images) == ("karpathy", "k.json", "my photos")
    assert config.vocab_size == 77
    assert config.run_dir == PRESETS["karpathy"]["run_dir"]  # of the data set that was taken
    assert config.units == Config().units  # not among the names
    assert config.data_dir == "d"
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "taken from d: karpathy_json k.json, images 'my photos', vocab_size 77"


def test_what_is_as_config_py_has_it_is_not_said(capsys):
    adopt_settings({"dataset": "demo"}, dataclasses.asdict(make_config({"dataset": "demo"})), DATA_SETTINGS, "d")
    assert capsys.readouterr().out == ""


def test_the_command_line_wins(capsys):
    config = adopt_settings({"vocab_size": 50}, SAVED, DATA_SETTINGS, "d")
    assert config.vocab_size == 50
    assert "vocab_size" not in capsys.readouterr().out


def test_settings_of_older_versions_that_lack_a_name_take_its_default():
    saved = {name: value for name, value in SAVED.items() if name != "val_fraction"}
    assert adopt_settings({}, saved, DATA_SETTINGS, "d").val_fraction == Config().val_fraction


@pytest.mark.parametrize("saved", [{"units": "many"}, {"units": 0}, {"units": None}, {"units": [7]}])
def test_a_saved_value_that_cannot_be_one_is_one_line(saved):
    with pytest.raises(UserError, match="the settings in d are damaged .*--units takes int.* give --units"):
        adopt_settings({}, saved, MODEL_SETTINGS, "d")
    assert adopt_settings({"units": 8}, saved, MODEL_SETTINGS, "d").units == 8


def test_differing_settings_are_those_of_the_names_that_are_saved():
    config = make_config({"units": 8, "dropout": 0.25})
    saved = dataclasses.asdict(make_config({"dropout": 0.1}))
    del saved["embedding_dim"]
    assert differing_settings(config, saved, MODEL_SETTINGS) == [("units", Config().units, 8)]
    assert differing_settings(config, saved, TRAINING_SETTINGS) == [("dropout", 0.1, 0.25)]


@pytest.mark.parametrize(("dataset", "option"), [("coco", ""), ("demo", "--dataset demo")])
def test_commands_in_messages_name_the_data_set(dataset, option):
    assert dataset_option(dataset) == option


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (None, "None"), ("my photos", "'my photos'"), ("", "''")])
def test_values_in_messages_can_be_typed(value, text):
    assert quote(value) == text


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("data/train.json", "run python data_utils.py --dataset demo"),
        ("cache/a.npy", "run python data_utils.py --dataset demo"),
        ("data/run/config.json", "give another --run_dir, .* run python train_image_caption_model.py --dataset demo"),
        ("data/run", "give another --run_dir, .* run python train_image_caption_model.py --dataset demo"),
    ],
)
def test_the_command_that_makes_a_folder_anew_is_named(path, command):
    given = {"dataset": "demo", "data_dir": "data", "features_dir": "cache", "run_dir": "data/run"}
    with pytest.raises(UserError, match=f"^{path} is damaged: {command}$"), naming_commands(make_config(given)):
        raise FileError(path, "is damaged")


def test_a_file_outside_of_all_folders_and_a_remedy_that_is_known_stay(tmp_path):
    config = make_config({"data_dir": "data"})
    with pytest.raises(UserError, match="^database/a.json is damaged$"), naming_commands(config):
        raise FileError("database/a.json", "is damaged")
    with pytest.raises(UserError, match="^data/a.json is damaged: delete it$"), naming_commands(config):
        with mended_by("delete it"):
            raise FileError("data/a.json", "is damaged")


# --- Anything on the command line ---------------------------------------------------------------------------------


VALUES = (
    TEXT
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["none", "karpathy", "9" * 5000, "1e999", "1_0", "-", "--", "--help", "a\nb", "%s", "\udc80"])
)


@pytest.mark.slow
@example({"data_dir": "\udc80"})
@given(st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(Config)]), VALUES, max_size=3))
def test_any_settings_are_a_config_or_one_line(values):
    argv = [part for name, text in values.items() for part in (f"--{name}", text)]
    try:
        config, _ = read_settings(argv, "")
    except UserError as error:
        check_one_line(error)
        return
    except SystemExit:  # --sample --help asks for help
        assert any(text.startswith(("-h", "--help")) for text in values.values())
        return
    with tempfile.TemporaryDirectory() as folder:  # as every run keeps them
        path = pathlib.Path(folder, "config.json")
        write_json(path, dataclasses.asdict(config))
        assert make_config(read_json(path)) == config


@pytest.mark.slow
@example("--two\nlines")
@given(TEXT.map(lambda text: "--" + text) | TEXT)
def test_any_option_is_known_or_one_line(text):
    assume(text not in ("-h", "--help"))
    try:
        read_settings([text], "")
    except UserError as error:
        check_one_line(error)
