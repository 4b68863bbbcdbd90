"""From the command line to checked settings.

The settings are the fields of a dataclass whose fields all have defaults. A field's annotation is its type:

- `int`, `float`, `str`;
- `Annotated[int, (1, None)]`, a number with its lowest and highest value, None for no limit;
- `Literal["a", "b"]`, one of these words;
- any of them with `| None`.

The comment behind a field is its text in `--help`.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import os
import re
import sys
import types
import typing

from support.errors import UserError


class _OneLineParser(argparse.ArgumentParser):
    """A parser that raises a UserError where argparse would print its usage and exit."""

    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


def parse_command_line(argv, description, settings_class, add_options=None, renamed=()):
    """Read `--<field> VALUE` for any field of the settings, and a script's own options.

    Args:
      argv: list of str, the command line without the script's name.
      description: str, the first lines of `--help`.
      settings_class: dataclass of the settings.
      add_options: function that adds the script's own options to the parser that it is given.
      renamed: dict of option to setting, such as {"captions": "captions_per_image"}: --captions then sets this one,
        and not the setting that has the option's name.

    Returns:
      (dict of setting name -> value, only those on the command line; argparse.Namespace of the script's own options)

    Raises:
      UserError: an unknown option, or a value of the wrong type or out of range.
    """
    parser = _make_parser(description, settings_class, add_options, dict(renamed))
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        known = re.findall(r"--[\w-]+", parser.format_help())
        parser.error(f"unknown option {unknown[0]}{_suggest(unknown[0], known)}")
    values = vars(options)
    names = [name for name in _setting_types(settings_class) if name in values]
    given = {name: _parse_value(settings_class, name, values.pop(name)) for name in names}
    return given, options  # the script's own are left


def _make_parser(description, settings_class, add_options, renamed):
    """A parser of the script's own options and of every setting; a setting that is not given gets no value."""
    parser = _OneLineParser(
        prog=os.path.basename(sys.argv[0]),
        usage="%(prog)s [--<option or setting> VALUE ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if add_options:
        add_options(parser)
    group = parser.add_argument_group(f"settings (defaults from {_source_file(settings_class)})")
    setting_types, comments = _setting_types(settings_class), _setting_comments(settings_class)
    for field in dataclasses.fields(settings_class):
        names = [option for option, name in renamed.items() if name == field.name]
        names += [field.name] if field.name not in renamed else []
        if not names:  # another setting has its name here
            continue
        # --sample alone is --sample yes.
        is_switch = set(setting_types[field.name].choices) == {"yes", "no"}
        group.add_argument(
            *(f"--{name}" for name in names),
            dest=field.name,
            metavar=_describe_type(setting_types[field.name]),
            **({"nargs": "?", "const": "yes"} if is_switch else {}),
            default=argparse.SUPPRESS,
            help=f"{comments.get(field.name, '')} (default: {field.default})".replace("%", "%%"),
        )
    return parser


def _suggest(name, known):
    """`, did you mean ...?` with the known name nearest to this one, or an empty text."""
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]}?" if near else ""


def _source_file(settings_class):
    return os.path.basename(inspect.getsourcefile(settings_class))


def _setting_comments(settings_class):
    """Dict of setting name -> the comment behind it."""
    return dict(re.findall(r"^ +(\w+): .*?  # (.*)$", inspect.getsource(settings_class), flags=re.MULTILINE))


@functools.cache
def _setting_types(settings_class):
    """Dict of setting name -> SettingType."""
    annotations = typing.get_type_hints(settings_class, include_extras=True)
    return {name: _read_annotation(annotation) for name, annotation in annotations.items()}


@dataclasses.dataclass(frozen=True)
class SettingType:
    """What a setting may be.

    Attributes:
      kind: int, float or str.
      low, high: lowest and highest number allowed, None for no limit.
      choices: tuple of the words allowed, empty for any.
      optional: bool, may be None.
    """

    kind: type
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False


def _read_annotation(annotation):
    """The SettingType of a field's annotation; TypeError for an annotation that the command line cannot express."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        inner, *others = (part for part in typing.get_args(annotation) if part is not types.NoneType)
        if others:
            raise TypeError(f"a setting cannot be one of several types: {annotation}")
        return dataclasses.replace(_read_annotation(inner), optional=True)
    if origin is typing.Literal:
        return SettingType(str, choices=typing.get_args(annotation))
    if origin is typing.Annotated:
        kind, (low, high) = typing.get_args(annotation)
        return SettingType(kind, low, high)
    if annotation not in (int, float, str):
        raise TypeError(f"a setting cannot be of type {annotation}")
    return SettingType(annotation)


def _describe_type(setting):
    """A SettingType in the words of `--help`, such as `int 1..64 or None`."""
    text = "{" + ",".join(setting.choices) + "}" if setting.choices else setting.kind.__name__
    if setting.low is not None or setting.high is not None:
        low, high = ("" if bound is None else bound for bound in (setting.low, setting.high))
        text += f" {low}..{high}"
    return text + (" or None" if setting.optional else "")


def _parse_value(settings_class, name, text):
    """The value that a text from the command line stands for; UserError where it is none of the setting's."""
    setting = _setting_types(settings_class)[name]
    if setting.optional and text.lower() == "none":
        return None
    try:
        return check_value(settings_class, name, setting.kind(text))
    except ValueError:
        raise UserError(f"--{name} takes {_describe_type(setting)}, not {text!r}") from None


def check_value(settings_class, name, value, remedy=""):
    """Check one value of a setting, and return it. `remedy` ends the message about a wrong one.

    Raises:
      UserError: the settings have no such name, or the value has the wrong type or is out of range.
    """
    setting_types = _setting_types(settings_class)
    if name not in setting_types:
        remedy = f"rename or remove it where it is set, which may be {_source_file(settings_class)}"
        raise UserError(f"{name!r} is not a setting{_suggest(str(name), setting_types)}: {remedy}")
    setting = setting_types[name]
    if not (_fits(setting, value) or (setting.optional and value is None)):
        raise UserError(f"--{name} takes {_describe_type(setting)}, not {value!r}{remedy}")
    return value


def _fits(setting, value):
    """Whether a value other than None fits a SettingType. True is no int, and an int is also a float."""
    if type(value) is not setting.kind and not (setting.kind is float and type(value) is int):
        return False
    if setting.kind is str:
        # No file name may hold these, and UTF-8 cannot write the second kind.
        return not re.search("[\0\ud800-\udfff]", value) and (not setting.choices or value in setting.choices)
    low = -sys.float_info.max if setting.low is None else setting.low
    high = sys.float_info.max if setting.high is None else setting.high
    return low <= value <= high  # false for nan and for infinity


def make_settings(settings_class, *layers):
    """One instance of the settings from the class's defaults and from dicts laid over them.

    Args:
      *layers: dicts of setting name -> value; a later one wins over an earlier one.

    Raises:
      UserError: a name that is no setting, or a value of the wrong type or out of range, defaults included.
    """
    values = {field.name: field.default for field in dataclasses.fields(settings_class)}
    for layer in layers:
        values |= layer
    # What is on the command line was checked when it was read.
    remedy = f": change it where it is set, which may be {_source_file(settings_class)}"
    return settings_class(**{name: check_value(settings_class, name, value, remedy) for name, value in values.items()})
