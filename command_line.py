"""From config.py and the command line to one checked Config; from a user's error to one line and exit status 2."""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import math
import os
import re
import signal
import sys
import types
import typing

from config import PRESETS, Config


@contextlib.contextmanager
def silenced_stderr():
    """Send what C++ writes to standard error nowhere: TensorFlow's notices would bury the scripts' own lines."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def end_process(kind, error, trace):
    """In place of Python's own last words: one line and exit status 130 for Ctrl-C, at imports too.

    No thread is waited for and no lock is taken, as an interrupt may have left one locked: files are replaced whole.
    """
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print("interrupted: what was finished is kept; run the same command again to go on", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


sys.excepthook = end_process
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # once imported, it listens to this
with silenced_stderr():
    import tensorflow  # noqa: F401


class UserError(Exception):
    """What the user can mend: the message says in one line what is wrong and which command mends it."""

    def __str__(self):
        return " ".join(super().__str__().splitlines())  # whatever file name or other error it quotes


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


def parse_command_line(argv, description, add_options=None):
    """Read `--dataset NAME`, `--<field> VALUE` for any field of Config, and a script's own options.

    Args:
      argv: list of str, the command line without the script's name.
      description: str, the first lines of `--help`.
      add_options: function that adds the script's own options to the parser given to it.

    Returns:
      (Config, argparse.Namespace of the script's own options)

    Raises:
      UserError: unknown option, or a value of the wrong type or range, on the command line or in config.py.
    """
    parser = OneLineParser(
        prog=os.path.basename(sys.argv[0]),
        usage="%(prog)s [--<option or setting> VALUE ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if add_options:
        add_options(parser)
    settings = parser.add_argument_group("settings (defaults from config.py)")
    comments = setting_comments()
    for field in dataclasses.fields(Config):
        settings.add_argument(
            f"--{field.name}",
            metavar=describe_type(setting_types()[field.name]),
            default=argparse.SUPPRESS,
            help=f"{comments.get(field.name, '')} (default: {field.default})".replace("%", "%%"),
        )
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0], known, n=1)
        parser.error(f"unknown option {unknown[0]}" + (f", did you mean {near[0]}?" if near else ""))

    given = {name: value for name, value in vars(options).items() if name in setting_types()}
    own = argparse.Namespace(**{name: value for name, value in vars(options).items() if name not in given})
    return make_config({name: parse_value(name, text) for name, text in given.items()}), own


def make_config(given):
    """Config of the defaults, then the data set's preset, then `given`, a dict of field names to values.

    Raises:
      UserError: a name that is no field, or a value of the wrong type or range.
    """
    dataset = check_value("dataset", given.get("dataset", Config.dataset))
    values = {**PRESETS[dataset], **given}
    for name in values:
        if name not in setting_types():
            raise UserError(f"{name} is not a setting: correct the preset {dataset!r} in config.py")
    config = Config(**values)
    for name, value in dataclasses.asdict(config).items():
        check_value(name, value)
    return config


def setting_types():
    return typing.get_type_hints(Config, include_extras=True)


def setting_comments():
    return dict(re.findall(r"^ +(\w+): .*?  # (.*)$", inspect.getsource(Config), flags=re.MULTILINE))


def take_apart(annotation):
    """(type, range or None, choices or None, may be None) of a field's annotation."""
    optional = isinstance(annotation, (types.UnionType, typing._UnionGenericAlias))
    if optional:
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is typing.Literal:
        return str, None, typing.get_args(annotation), optional
    if typing.get_origin(annotation) is typing.Annotated:
        kind, bounds = typing.get_args(annotation)
        return kind, bounds, None, optional
    return annotation, None, None, optional


def describe_type(annotation):
    kind, bounds, choices, optional = take_apart(annotation)
    text = "{" + ",".join(choices) + "}" if choices else kind.__name__
    if bounds:
        low, high = bounds
        text += f" {low}..{'' if high is None else high}"
    return text + (" or None" if optional else "")


def parse_value(name, text):
    """The value that `text` stands for in the field `name`; UserError where it stands for none."""
    kind, _, _, optional = take_apart(setting_types()[name])
    if optional and text.lower() == "none":
        return None
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--{name} takes {describe_type(setting_types()[name])}, not {text!r}") from None


def check_value(name, value):
    """`value`, or UserError where the field `name` cannot hold it."""
    annotation = setting_types()[name]
    kind, bounds, choices, optional = take_apart(annotation)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if fits and kind is float:
        fits = math.isfinite(value)
    if fits and kind is str:
        fits = not re.search("[\0\ud800-\udfff]", value)  # no file can have these in its name, or in UTF-8 text
    if fits and bounds:
        low, high = bounds
        fits = (low is None or value >= low) and (high is None or value <= high)
    if fits and choices:
        fits = value in choices
    if not (fits or (optional and value is None)):
        raise UserError(f"--{name} takes {describe_type(annotation)}, not {value!r}")
    return value


@contextlib.contextmanager
def interrupts_held_back():
    """Inside the block Ctrl-C and SIGTERM wait for a call of the function given, which then raises KeyboardInterrupt.

    A second one ends the process at once.
    """
    asked = []

    def note(number, frame):
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping after this batch; once more to stop without saving\n")  # print may be at work itself

    def stop_if_asked():
        if asked:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_if_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_script(main):
    """Call `main(argv)` and exit as the shell expects: 2 with one line for a UserError; SIGTERM is as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a letter that the terminal has not is no reason to stop
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
