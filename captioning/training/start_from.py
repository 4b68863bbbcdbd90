"""Go on from a trained captioner on other data: what `--start_from RUN` takes over, and when.

All weights are RUN's, and with them the mean and deviation that normalise the features. What belongs to a word goes
where the other vocabulary has that word. A new word begins at the mean of RUN's words. The optimizer starts fresh.
Once the run that begins so has a checkpoint of its own, RUN is not read again.
"""

import dataclasses
import pathlib

import numpy as np

from captioning.data.prepared_data import encode_images
from captioning.decoder.edited_model import following_model
from captioning.settings import DATA_SETTINGS, MODEL_SETTINGS, adopt_settings, is_same_setting, other_run, quote
from captioning.training.checkpoints import list_checkpoints, save_checkpoint
from captioning.training.run_folder import check_model_settings, check_network, read_captioner
from captioning.training.saving import save_last
from captioning.vocabulary import SPECIAL_WORDS, UNK, read_vocabulary
from support.errors import UserError, mended_by
from support.files import read_json

_REMEDY = "give another --start_from"
_NO_START = {"start_from": "", "keep_vocabulary": "no"}


# --- Settings -----------------------------------------------------------------------------------------------------


def adopt_start(given, config):
    """The settings of a run that may begin from another: the network's sizes are those of RUN.

    A run that has begun so brings them itself, as RUN may be gone.

    Args:
      given: dict of setting to value, from the command line.
      config: Config, without what a run brings.

    Returns:
      Config

    Raises:
      UserError: `run_dir` is RUN or holds a run that began otherwise, RUN holds no model, or one of other sizes than
        the command line says.
    """
    start = config.start_from
    if start and pathlib.Path(config.run_dir).resolve().is_relative_to(pathlib.Path(start).resolve()):
        raise UserError(f"--run_dir {quote(config.run_dir)} would write into --start_from: give another --run_dir")
    given = {name: getattr(config, name) for name in DATA_SETTINGS} | given
    if _has_begun(config):
        return _adopt_begun(given, config)
    if not start:
        if config.keep_vocabulary == "yes":
            raise UserError("--keep_vocabulary yes is for going on from a run: name that run by --start_from")
        return config
    path = pathlib.Path(start, "config.json")
    if not path.exists():
        raise UserError(f"no trained model is in {start}: {_REMEDY}")
    with mended_by(_REMEDY):
        config = adopt_settings(given, read_json(path, dict), MODEL_SETTINGS, start)
        check_model_settings(start, config, _REMEDY)
    return config


def _has_begun(config):
    """Whether `run_dir` holds a checkpoint to continue from."""
    return bool(list_checkpoints(pathlib.Path(config.run_dir, "last")))


def _adopt_begun(given, config):
    """The settings of a run that has begun: whether it began from another, and then the sizes too, are its own."""
    folder = config.run_dir
    saved = _NO_START | read_json(pathlib.Path(folder, "config.json"), dict)
    sizes = MODEL_SETTINGS if saved["start_from"] else ()
    config = adopt_settings(given, saved, (*_NO_START, *sizes), folder)
    for name in _NO_START:
        before, now = str(saved[name]), getattr(config, name)
        if not is_same_setting(name, before, now):
            raise UserError(
                f"{folder} was begun with --{name} {quote(before)}, not {quote(now)}: "
                f"give --{name} {quote(before)}, or {other_run(config.dataset)}"
            )
    return config


# --- Words and weights --------------------------------------------------------------------------------------------


def read_start(prepared, config):
    """The trained captioner that a run begins from.

    Args:
      prepared: Prepared, the data to train on.

    Returns:
      Captioner, or None where the run begins from none, or has begun.

    Raises:
      UserError: RUN holds no checkpoint that can be read, or was trained on features of another network.
    """
    if not config.start_from or _has_begun(config):
        return None
    with mended_by(_REMEDY):
        check_network(config.start_from, config.data_dir, prepared)
        start = read_captioner(config.start_from, config)
    if start is None:
        raise UserError(f"no trained model is in {config.start_from}: {_REMEDY}")
    return start


def choose_words(prepared, start, config):
    """The data with the vocabulary to train with: their own or, with `keep_vocabulary`, that of the run begun from.

    Args:
      prepared: Prepared
      start: Captioner, or None where the run has begun and holds that vocabulary itself.

    Returns:
      Prepared
    """
    if config.keep_vocabulary == "no":
        return prepared
    path = pathlib.Path(config.run_dir, "vocabulary.json")
    vocabulary = start.vocabulary if start else read_vocabulary(path)
    splits = {name: encode_images(getattr(prepared, name), vocabulary) for name in ("train", "validation", "test")}
    words = [word for image in splits["train"] for caption in image.encoded_captions for word in caption[1:-1]]
    print(f"of the words of the training captions {words.count(UNK) / len(words):.1%} are not in the kept vocabulary")
    return dataclasses.replace(prepared, vocabulary=vocabulary, **splits)


@following_model("--start_from", "or begin without it")
def take_weights(state, start, vocabulary, config):
    """Give a training all weights of a trained captioner, and say what was taken.

    Args:
      state: TrainingState of the same sizes, D, E and U.
      start: Captioner
      vocabulary: list of V str, the words of `state`.
    """
    places = {word: i for i, word in enumerate(start.vocabulary)}
    rows = np.array([places.get(word, -1) for word in vocabulary])  # (V,)
    decoder = state.decoder
    first_axis = decoder.embedding.embeddings, decoder.output_layer.bias, decoder.detector.kernel, decoder.detector.bias
    axes = {id(weight): 0 for weight in first_axis} | {id(decoder.output_layer.kernel): 1}  # of the words
    theirs = start.encoder.weights + start.decoder.weights
    for weight, value in zip(state.encoder.weights + decoder.weights, theirs, strict=True):
        axis = axes.get(id(weight))
        weight.assign(value if axis is None else _choose_rows(np.asarray(value), rows, axis))
    kept, special = np.count_nonzero(rows >= 0), len(SPECIAL_WORDS)
    print(
        f"begun from {config.start_from}, {start.checkpoint}: {kept - special:,} words kept, "
        f"{len(vocabulary) - kept:,} new, {len(places) - kept:,} lost"
    )


def _choose_rows(value, rows, axis):
    """A weight with a row for each word along `axis`, in the order of another vocabulary of V words.

    rows: int (V,), the old row of each word; -1 for a new word, which gets the mean of all words but the special ones.
    """
    value = np.moveaxis(value, axis, 0)
    mean = value[len(SPECIAL_WORDS) :].mean(axis=0, keepdims=True)
    return np.moveaxis(np.concatenate([value, mean])[rows], 0, axis)


# --- Where it begins ----------------------------------------------------------------------------------------------


def measure_start(state, measure_loss, config):
    """Make the weights that a run begins from its best ones, which the epochs have to beat. Does so once.

    Args:
      state: TrainingState
      measure_loss: function that returns the validation loss, in nats per word.
    """
    progress = state.progress
    if not config.start_from or progress.epoch or progress.captions_done or np.isfinite(progress.best_loss):
        return
    folder = pathlib.Path(config.run_dir)
    if not progress.saves:  # killed between `best` and `last`, the run could not be continued
        save_checkpoint(state, folder / "last", 0)
    progress.best_loss = measure_loss()
    print(f"validation loss before the first step: {progress.best_loss:.3f} nats per word; best/ckpt-0 has its weights")
    save_checkpoint(state.captioner(), folder / "best", 0)
    save_last(state, config.run_dir)
