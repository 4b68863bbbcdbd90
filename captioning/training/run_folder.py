"""A run folder: what a training leaves, enough to caption images without the data that it was trained on.

config.json, vocabulary.json     settings and words
network.json                     identity of the network that made the features
random_statistics.npz            batch-norm statistics, where that network has random weights
last/                            checkpoint to continue from
best/                            checkpoint of the lowest validation loss, or of the highest self-critical CIDEr
*/ckpt-N.json                    digest of the model.py of that checkpoint
history.csv, loss.png            losses and CIDEr by epoch
network_graph.pb, ....json       the network, ready to caption images with; made when it is first needed
"""

import dataclasses
import pathlib
import shutil

import numpy as np
import tensorflow as tf

from captioning.captioner import Captioner
from captioning.data.prepared_data import read_prepared_settings
from captioning.features.cache import features_folder, random_statistics
from captioning.features.cnn import CNNS
from captioning.features.frozen_graph import kept_network
from captioning.features.manifest import MADE_ELSEWHERE
from captioning.features.network import feature_network, network_identity
from captioning.settings import (
    DATA_SETTINGS,
    MODEL_SETTINGS,
    TRAINING_SETTINGS,
    adopt_settings,
    differing_settings,
    make_config,
    other_run,
    quote,
    read_saved_settings,
    train_command,
)
from captioning.training.checkpoints import captioner_checkpoint, checkpoint_digest, list_checkpoints, restore_newest
from captioning.vocabulary import read_vocabulary
from model import build_captioner
from support.errors import FileError, UserError
from support.files import read_json, replacing, write_json

_NETWORK, _STATISTICS = "network.json", "random_statistics.npz"


def _nothing_trained(config):
    return f"no trained model is in {config.run_dir}: run {train_command(config.dataset)} first, or give its --run_dir"


def begin_run(prepared, config):
    """Write what captioning needs beside the checkpoints; say which settings of a continued run have changed."""
    folder = pathlib.Path(config.run_dir)
    if (folder / "config.json").exists():
        saved = read_json(folder / "config.json", dict)
        for name, before, now in differing_settings(config, saved, TRAINING_SETTINGS):
            print(f"continuing with --{name} {quote(now)}; the run had {quote(before)} before")
    write_json(folder / "config.json", dataclasses.asdict(config), indent=1)
    write_json(folder / "vocabulary.json", prepared.vocabulary)
    write_json(folder / _NETWORK, prepared.network, indent=1)
    statistics = random_statistics(features_folder(config))
    if config.inception_weights == "random" and statistics.exists():
        with replacing(folder / _STATISTICS) as temporary:
            shutil.copyfile(statistics, temporary)


def check_new_run(folder, data_dir):
    """Raise FileError where a training that begins in `folder`, which has no checkpoint in `last`, would spoil it.

    The weights in `best` would soon be overwritten. Training cannot start from them either: how far that training came,
    and its best loss, is in `last` alone.
    """
    folder = pathlib.Path(folder)
    for path in list_checkpoints(folder / "best"):
        raise FileError(folder, f"holds best/{path.name} and no checkpoint in last/ to continue from")
    if (folder / "settings.json").exists() and folder.resolve() != pathlib.Path(data_dir).resolve():
        raise FileError(folder, "holds prepared data, and a run there would replace their words")


def check_run_fits(folder, config, prepared):
    """Raise UserError where the run in `folder` has other sizes, another vocabulary or another network."""
    check_model_settings(folder, config)
    known = read_vocabulary(pathlib.Path(folder, "vocabulary.json"))
    if known != prepared.vocabulary:
        theirs = f"{config.data_dir}'s ({len(prepared.vocabulary)} words)"
        raise FileError(folder, f"was trained with another vocabulary ({len(known)} words) than {theirs}")
    check_network(folder, config.data_dir, prepared)


def check_other_data(folder, data_dir, prepared):
    """For captioning, which needs only the run's vocabulary: check the network, and say if the data differ."""
    check_network(folder, data_dir, prepared)
    known = read_vocabulary(pathlib.Path(folder, "vocabulary.json"))
    saved = read_json(pathlib.Path(folder, "config.json"), dict)
    keeps_words = (saved.get("keep_vocabulary"), saved.get("data_dir")) == ("yes", data_dir)
    if known != prepared.vocabulary and not keeps_words:
        print(
            f"note: {folder} was not trained on {data_dir} (the vocabularies differ): "
            "its images may be among those trained on"
        )


def check_network(folder, data_dir, prepared):
    """Raise FileError where the run in `folder` was trained on features of another network."""
    network = _features_network(folder)
    if network != prepared.network:
        theirs = f"{data_dir}'s ({prepared.network})"
        raise FileError(folder, f"was trained on features of another network ({network}) than {theirs}")
    channels, theirs = _run_cnn(folder).channels, len(prepared.feature_mean)
    if channels != theirs:  # made elsewhere, by two programs
        raise FileError(folder, f"was trained on features of {channels} channels, and {data_dir}'s have {theirs}")


def check_model_settings(folder, config, remedy=None):
    """Raise UserError where the run in `folder` has other sizes than `config`; `remedy` is what mends it, if given."""
    path = pathlib.Path(folder, "config.json")
    saved = read_json(path, dict)
    for name in MODEL_SETTINGS:
        if name not in saved:
            raise FileError(path, f"is damaged (it does not say {name})")
    for name, before, now in differing_settings(config, saved, MODEL_SETTINGS):
        raise UserError(
            f"{folder} was trained with --{name} {before}, not {now}: "
            f"give --{name} {before}, or {remedy or other_run(config.dataset)}"
        )


def _features_network(folder):
    """The identity of the network whose features the run was trained on, a str; MADE_ELSEWHERE for another program."""
    return read_json(pathlib.Path(folder, _NETWORK), str)


def _run_cnn(folder):
    """The CNN that the run was trained with. The settings may name another, that of other data."""
    path = pathlib.Path(folder, "config.json")
    name = str(read_saved_settings(path)["cnn"])
    if name not in CNNS:
        raise FileError(path, f"is damaged (its CNN is {name!r})")
    return CNNS[name]


def run_network(config, keep=False):
    """The network that made the features which the run in `run_dir` was trained on. New images must go through it.

    Args:
      keep: bool, whether the network is kept ready in `run_dir`, which saves most of the time to make it. On a machine
        with a GPU it is made anew all the same.

    Returns:
      function of uint8 (B, side, side, 3) -> float32 (B, P, F)

    Raises:
      UserError: another program made those features, or the settings name another network than the run's.
    """
    folder, weights = pathlib.Path(config.run_dir), config.inception_weights
    known = _features_network(folder)
    if known != MADE_ELSEWHERE and weights not in ("imagenet", "random") and not pathlib.Path(weights).is_file():
        is_imagenet = known == network_identity(dataclasses.replace(config, inception_weights="imagenet"))
        remedy = "give --inception_weights imagenet" if is_imagenet else "name that weights file by --inception_weights"
        raise UserError(
            f"{weights} is not here, and {folder} needs the network whose features it was trained on ({known}): "
            f"{remedy}"
        )
    if keep and not tf.config.list_physical_devices("GPU"):
        return kept_network(folder, config, folder / _STATISTICS, expected_identity=known)
    return feature_network(config, folder / _STATISTICS, expected_identity=known)


def run_settings(given, run_dir):
    """The Config of script 3: data and model as the run has them, this call's settings from config.py.

    A `data_dir` on the command line brings its own data settings, so that a model can be asked about other images.

    Args:
      given: dict of setting to value, from the command line; these win.
      run_dir: path of the run folder.

    Raises:
      UserError: nothing was trained there, or the settings of the run are damaged.
    """
    path = pathlib.Path(run_dir, "config.json")
    config = make_config(given, {"run_dir": run_dir})
    if not path.exists():
        raise UserError(_nothing_trained(config))
    saved = read_saved_settings(path)
    if given.get("data_dir", saved.get("data_dir")) != saved.get("data_dir"):
        saved |= read_prepared_settings(given["data_dir"])
    names = (*DATA_SETTINGS, "data_dir", *MODEL_SETTINGS)
    return adopt_settings({**given, "run_dir": run_dir}, saved, names, run_dir)


def load_captioner(config):
    """Restore the best checkpoint of `run_dir`, or the last one where none of the best can be read.

    Raises:
      UserError: nothing was trained there, or with other sizes than `config` has, or no checkpoint can be read.
    """
    captioner = read_captioner(config.run_dir, config)
    if captioner is None:
        raise UserError(_nothing_trained(config))
    return captioner


def read_captioner(folder, config):
    """The Captioner of the run in `folder`, as `load_captioner` chooses it, or None where there is no checkpoint.

    Raises:
      UserError: it has other sizes than `config`, or cannot be read.
    """
    folder = pathlib.Path(folder)
    check_model_settings(folder, config)
    vocabulary = read_vocabulary(folder / "vocabulary.json")
    encoder, decoder = build_captioner(config, len(vocabulary), np.zeros(_run_cnn(folder).channels, np.float32))
    checkpoint = restore_newest(captioner_checkpoint(encoder, decoder), [folder / "best", folder / "last"])
    if checkpoint is None:
        return None
    name = f"{checkpoint.parent.name}/{checkpoint.name}"
    network = _features_network(folder)
    return Captioner(encoder, decoder, vocabulary, name, checkpoint_digest(checkpoint), network)
