"""From config.py, its presets, the command line, prepared data and trained runs to the one Config of a script.

A setting is taken from the first of these that has it: the command line; what the data were prepared with, or the run
was trained with; the data set's preset; config.py.
"""

import contextlib
import dataclasses
import os
import pathlib
import shlex

from config import PRESETS, Config
from support.command_line import check_value, make_settings, parse_command_line
from support.errors import FileError, UserError
from support.files import read_json

# What the prepared files depend on. The later scripts take these from the folder of prepared data.
DATA_SETTINGS = tuple(
    "dataset coco_dir coco_split karpathy_json images captions validation_captions test_captions image_column "
    "caption_column demo_images num_examples val_fraction vocab_size max_words seed cnn inception_weights features_dir "
    "feature_dtype".split()
)
# What the shapes of the weights depend on, besides the vocabulary. Script 3 takes these from the run.
MODEL_SETTINGS = ("encoder_dim", "embedding_dim", "units")
# What training depends on, besides the data and the model.
TRAINING_SETTINGS = tuple(
    "epochs batch_size learning_rate clip_norm dropout feature_dropout doubly_stochastic precision schedule patience "
    "self_critical_epochs self_critical_rate samples_per_image reference_weight images_per_step".split()
)
_PATHS = tuple(  # settings in which ~ is the home folder; shells see to it only where a blank is before it
    "data_dir coco_dir karpathy_json images captions validation_captions test_captions features_dir inception_weights "
    "run_dir start_from".split()
)


def read_settings(argv, description, add_options=None):
    """The settings of script 1: command line over preset over config.py. Arguments are those of `parse_command_line`.

    Returns:
      (Config, argparse.Namespace of the script's own options)

    Raises:
      UserError: an unknown option, or a value of the wrong type or range, on the command line or in config.py.
    """
    given, options = parse_command_line(argv, description, Config, add_options)
    return make_config(given), options


def make_config(*layers):
    """A Config of config.py's defaults, the preset of the data set that the layers name, and then the layers.

    A path that begins with ~ begins in the home folder.

    Args:
      *layers: dicts of setting to value; a later one wins.

    Raises:
      UserError: a name that is no setting, or a value of the wrong type or range.
    """
    dataset = make_settings(Config, *layers).dataset
    config = make_settings(Config, PRESETS[dataset], *layers)
    if not (config.contact.isascii() and config.contact.isprintable()):
        raise UserError(f"--contact takes an e-mail or web address in ASCII, not {config.contact!r}")
    return dataclasses.replace(config, **{name: os.path.expanduser(getattr(config, name)) for name in _PATHS})


def read_saved_settings(path):
    """The dict of a settings.json or config.json, or FileError. Where it is from before --cnn, it was InceptionV3."""
    return {"cnn": "InceptionV3"} | read_json(path, dict)


def adopt_settings(given, saved, names, source):
    """A Config that takes some settings from prepared data or a trained run, and says so where config.py differs.

    Args:
      given: dict of setting to value, from the command line; these win.
      saved: dict of setting to value, from a settings.json or config.json.
      names: the settings to take from `saved`.
      source: str, the folder they come from, for the message.

    Raises:
      UserError: a saved value is no such setting's.
    """
    taken = {name: saved[name] for name in names if name in saved and name not in given}
    for name, value in taken.items():
        try:
            check_value(Config, name, value)
        except UserError as error:  # somebody has changed the file
            raise UserError(
                f"the settings in {source} are damaged ({error}): give --{name} on the command line"
            ) from None
    config = make_config(taken, given)
    # Presets are no surprise. What a user wrote into config.py, and is not followed, must be said.
    expected = make_config({"dataset": config.dataset}, given)
    differing = [name for name in taken if getattr(config, name) != getattr(expected, name)]
    if differing:
        print(f"taken from {source}: " + ", ".join(f"{name} {quote(getattr(config, name))}" for name in differing))
    return config


def differing_settings(config, saved, names):
    """The settings among `names` that a saved dict has with another value. Returns [(name, saved value, value)]."""
    values = dataclasses.asdict(config)
    return [(name, saved[name], values[name]) for name in names if name in saved and saved[name] != values[name]]


def is_same_setting(name, one, other):
    """Whether two values of a setting say the same. A path has several spellings, such as `coco` and `./coco/`."""
    if name in _PATHS and one and other:
        return os.path.realpath(str(one)) == os.path.realpath(str(other))
    return one == other


def dataset_option(dataset):
    """The option that chooses the data set, for messages that name a command; empty for COCO."""
    return "" if dataset == "coco" else f"--dataset {dataset}"


def prepare_command(dataset):
    """What makes the prepared data anew, for messages: `run python data_utils.py` and the data set's option."""
    return f"run python data_utils.py {dataset_option(dataset)}".rstrip()


def train_command(dataset):
    return f"python train_image_caption_model.py {dataset_option(dataset)}".rstrip()


def other_run(dataset):
    """What the user can do about a run folder that does not fit or is damaged. Nothing in it is lost that way."""
    return f"give another --run_dir, or move that folder away, and run {train_command(dataset)}"


@contextlib.contextmanager
def naming_commands(config):
    """End the message of a FileError in the block with the command that makes the folder of that file anew."""
    prepare = prepare_command(config.dataset)
    commands = {
        pathlib.Path(config.data_dir): prepare,
        pathlib.Path(config.features_dir or config.data_dir): prepare,
        pathlib.Path(config.run_dir): other_run(config.dataset),
    }
    try:
        yield
    except FileError as error:
        around = [folder for folder in commands if error.path.is_relative_to(folder)]
        if not around:
            raise
        folder = max(around, key=lambda folder: len(folder.parts))  # one of them may lie in another
        raise UserError(f"{error}: {commands[folder]}") from None


def quote(value):
    """A setting's value as the shell takes it."""
    return shlex.quote(str(value))
