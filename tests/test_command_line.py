import dataclasses
import pathlib
import subprocess
import sys

from command_line import UserError, make_config, parse_command_line, setting_comments, setting_types, take_apart
from config import PRESETS, Config

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_defaults_are_the_configs():
    config, _ = parse_command_line([], "")
    assert config == Config()


def test_every_setting_says_what_it_is():
    assert list(setting_comments()) == [field.name for field in dataclasses.fields(Config)]


def test_command_line_beats_preset_beats_default():
    config, _ = parse_command_line(["--dataset", "demo", "--data_dir", "elsewhere", "--dropout", "0.25"], "")
    assert config.data_dir == "elsewhere"
    assert config.run_dir == PRESETS["demo"]["run_dir"] != Config().run_dir
    assert config.dropout == 0.25


def test_values_take_the_fields_type():
    config, _ = parse_command_line(["--num_examples", "none", "--units", "7", "--clip_norm", "3"], "")
    assert config.num_examples is None
    assert config.units == 7
    assert config.clip_norm == 3.0


@pytest.mark.parametrize("dataset", PRESETS)
def test_every_preset_is_valid(dataset):
    assert make_config({"dataset": dataset}).dataset == dataset


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--unit", "3"], "did you mean --units"),
        (["--units", "many"], "--units takes int"),
        (["--units", "0"], "--units takes int 1..16384, not 0"),
        (["--units", "2.5"], "--units takes int"),
        (["--dropout", "nan"], "--dropout takes float"),
        (["--dropout", "1.5"], "0.0..0.95"),
        (["--dataset", "imagenet"], "{coco,demo"),
        (["--units"], "expected one argument"),
        (["stray"], "unknown option stray"),
    ],
)
def test_a_wrong_option_is_one_line(argv, words):
    with pytest.raises(UserError) as raised:
        parse_command_line(argv, "")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


WRONG_KIND = {int: ("7", 2.5, True, [7]), float: ("0.5", True, float("nan"), float("inf")), str: (7, ["a"], b"a")}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_no_field_takes_another_type_or_a_value_out_of_range(name):
    kind, bounds, choices, optional = take_apart(setting_types()[name])
    low, high = bounds or (None, None)
    wrong = [*WRONG_KIND[kind], *([] if optional else [None]), *(["x"] if choices else [])]
    wrong += ([] if low is None else [low - 1]) + ([] if high is None else [high + 1])
    for value in wrong:
        with pytest.raises(UserError, match=f"--{name} takes {kind.__name__ if not choices else '{'}") as raised:
            make_config({name: value})
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("script", ["data_utils.py", "train_image_caption_model.py", "inference_image_caption.py"])
def test_scripts_exit_2_with_one_line_and_list_every_setting(script):
    wrong = subprocess.run([sys.executable, script, "--units", "0"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines() == ["error: --units takes int 1..16384, not 0"]

    helped = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert helped.returncode == 0
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in helped.stdout
