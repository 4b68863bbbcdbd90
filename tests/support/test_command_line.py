import dataclasses
import pathlib
import subprocess
import sys
from typing import Annotated, Literal, Optional

import pytest

from config import PRESETS, Config
from support.command_line import (
    SettingType,
    _describe_type,
    _read_annotation,
    _setting_comments,
    _setting_types,
    check_value,
    make_settings,
    parse_command_line,
)
from support.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Few:
    count: Annotated[int, (None, 9)] = 3  # 50 % of them
    share: Annotated[float, (0.0, None)] | None = None
    colour: Literal["red", "blue"] = "red"  # of all
    loud: Literal["yes", "no"] = "no"  # as it is


def add_colours(parser):
    parser.add_argument("--image", nargs="+", default=[])
    parser.add_argument("--colourless", action="store_true")


def test_only_what_is_typed_is_given():
    assert parse_command_line([], "", Config)[0] == {}
    given, options = parse_command_line(["--count", "3", "--image", "a", "b"], "", Few, add_colours)
    assert given == {"count": 3}
    assert vars(options) == {"image": ["a", "b"], "colourless": False}


def test_a_setting_of_yes_and_no_may_stand_alone():
    for argv, value in ((["--loud"], "yes"), (["--loud", "no"], "no"), (["--loud", "--count", "3"], "yes")):
        assert parse_command_line(argv, "", Few)[0]["loud"] == value
    with pytest.raises(UserError, match="--loud takes {yes,no}, not 'very'"):
        parse_command_line(["--loud", "very"], "", Few)


def test_a_script_may_give_a_settings_name_to_another_setting(capsys):
    """Both can still be had from config.py."""
    renamed = {"share": "count"}
    for argv in (["--share", "5"], ["--count", "5"]):
        assert parse_command_line(argv, "", Few, renamed=renamed)[0] == {"count": 5}
    assert parse_command_line(["--share", "5"], "", Few)[0] == {"share": 5.0}
    with pytest.raises(SystemExit):
        parse_command_line(["--help"], "", Few, renamed=renamed)
    assert "--share int ..9, --count int ..9 50 % of them" in " ".join(capsys.readouterr().out.split())


def test_values_take_the_fields_type():
    given, _ = parse_command_line(["--num_examples", "none", "--units", "7", "--clip_norm", "3"], "", Config)
    assert given == {"num_examples": None, "units": 7, "clip_norm": 3.0}
    assert type(given["clip_norm"]) is float


def test_defaults_are_the_classes():
    assert make_settings(Config) == Config()


def test_a_later_layer_beats_an_earlier_one_beats_the_default():
    given, _ = parse_command_line(["--data_dir", "elsewhere", "--dropout", "0.25"], "", Config)
    config = make_settings(Config, PRESETS["demo"], given)
    assert config.data_dir == "elsewhere"
    assert config.run_dir == PRESETS["demo"]["run_dir"] != Config().run_dir
    assert config.dropout == 0.25
    assert PRESETS["demo"]["data_dir"] != "elsewhere"


@pytest.mark.parametrize("dataset", PRESETS)
def test_every_preset_is_valid(dataset):
    assert make_settings(Config, PRESETS[dataset], {"dataset": dataset}).dataset == dataset


def test_every_setting_says_what_it_is():
    assert list(_setting_comments(Config)) == [field.name for field in dataclasses.fields(Config)]


def test_help_shows_each_setting_with_type_comment_and_default(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command_line(["--help"], "What it does.", Few, add_colours)
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "What it does." in shown and "--image" in shown
    assert "settings (defaults from test_command_line.py): " in shown
    assert "--count int ..9 50 % of them (default: 3)" in shown
    assert "--share float 0.0.. or None (default: None)" in shown
    assert "--colour {red,blue} of all (default: red)" in shown


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--unit", "3"], "unknown option --unit, did you mean --units? (see python "),
        (["--units", "many"], "--units takes int"),
        (["--units", "0"], "--units takes int 1..16384, not 0"),
        (["--units", "2.5"], "--units takes int"),
        (["--units", "none"], "--units takes int"),
        (["--dropout", "nan"], "--dropout takes float"),
        (["--clip_norm", "inf"], "--clip_norm takes float"),
        (["--dropout", "1.5"], "0.0..0.95"),
        (["--dataset", "imagenet"], "{coco,demo"),
        (["--units"], "expected one argument"),
        (["stray"], "unknown option stray"),
        (["--imag", "a.jpg"], "did you mean --image?"),
    ],
)
def test_a_wrong_option_is_one_line(argv, words):
    with pytest.raises(UserError) as raised:
        parse_command_line(argv, "", Config, add_colours)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("names", [["unit"], ["data_dir", "units "], [""]])
def test_a_name_that_is_no_setting_is_one_line(names):
    with pytest.raises(UserError, match=f"{names[-1]!r} is not a setting.*config.py") as raised:
        make_settings(Config, {}, dict.fromkeys(names, "x"))
    assert "did you mean units?" in str(raised.value) or names == [""]


@pytest.mark.parametrize(("name", "value"), [("batch_size", "64"), ("epochs", 0), ("cnn", "ResNet")])
def test_a_value_that_cannot_be_and_is_not_from_the_command_line_is_sought_in_config_py(name, value):
    with pytest.raises(UserError, match=f"^--{name} takes .*, not {value!r}: change it .*, which may be config.py$"):
        make_settings(Config, {name: value})
    with pytest.raises(UserError, match="not 0$"):
        parse_command_line(["--epochs", "0"], "", Config)


WRONG_KIND = {
    int: ("7", 2.5, True, [7]),
    float: ("0.5", True, float("nan"), float("inf"), -float("inf"), 10**400),
    str: (7, ["a"], b"a", "a\0b", "\udc80"),
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_no_field_takes_another_type_or_a_value_out_of_range(name):
    setting = _setting_types(Config)[name]
    wrong = [*WRONG_KIND[setting.kind], *([] if setting.optional else [None]), *(["x"] if setting.choices else [])]
    wrong += ([] if setting.low is None else [setting.low - 1]) + ([] if setting.high is None else [setting.high + 1])
    for value in wrong:
        start = "{" if setting.choices else setting.kind.__name__
        with pytest.raises(UserError, match=f"--{name} takes {start}") as raised:
            make_settings(Config, {name: value})
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("annotation", "setting", "text"),
    [
        (str, SettingType(str), "str"),
        (int | None, SettingType(int, optional=True), "int or None"),
        (Optional[float], SettingType(float, optional=True), "float or None"),  # noqa: UP045
        (Annotated[int, (0, 5)] | None, SettingType(int, 0, 5, optional=True), "int 0..5 or None"),
        (Literal["a", "b"] | None, SettingType(str, choices=("a", "b"), optional=True), "{a,b} or None"),
        (Annotated[float, (None, 0.0)], SettingType(float, None, 0.0), "float ..0.0"),
    ],
)
def test_annotations_are_read_and_described(annotation, setting, text):
    assert _read_annotation(annotation) == setting
    assert _describe_type(setting) == text


@pytest.mark.parametrize("annotation", [bool, list[int], int | str, int | str | None])
def test_a_type_that_the_command_line_cannot_express_is_the_programmers_error(annotation):
    with pytest.raises(TypeError):
        _read_annotation(annotation)


def test_bounds_and_optional_values_are_taken():
    assert check_value(Few, "count", 9) == 9
    assert check_value(Few, "share", 0) == 0
    assert check_value(Few, "share", None) is None
    assert parse_command_line(["--share", "NONE"], "", Few)[0] == {"share": None}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["data_utils.py", "train_image_caption_model.py", "inference_image_caption.py"])
def test_scripts_exit_2_with_one_line_and_list_every_setting(script):
    wrong = subprocess.run([sys.executable, script, "--units", "0"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines() == ["error: --units takes int 1..16384, not 0"]

    helped = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert helped.returncode == 0
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in helped.stdout
