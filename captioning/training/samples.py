"""What a training has learned so far: the same few validation images, captioned after each epoch."""

import dataclasses
import pathlib

import numpy as np

from captioning.attention.page import PageCaption, PageImage, write_pages
from captioning.captioner import Captioner, caption_cached, greedy_settings
from captioning.features.cache import ImageToCaption, dataset_images
from captioning.inference.captions_file import CaptionRecord, file_state, make_record, restore_prediction
from captioning.training.saving import save_epoch, warning_only
from captioning.training.tensorboard import log_epoch
from support.distribution import is_chief
from support.errors import FileError, mended_by, printable
from support.files import read_json, write_json

_SAMPLES = 4  # images
_SHOWN_EPOCHS = 8  # columns of the page: the first epoch and the latest ones


@dataclasses.dataclass(frozen=True)
class Samples:
    """What is captioned after each epoch.

    Attributes:
      images: list of ImageToCaption, of the validation split.
      vocabulary: list of V words.
      writer: a tf.summary writer that the captions go to as well, or None.
    """

    images: list[ImageToCaption]
    vocabulary: list[str]
    writer: object = None


@dataclasses.dataclass(frozen=True)
class SampledEpoch:
    """The captions generated for the samples after an epoch: an entry of samples.json."""

    epoch: int
    captions: list[CaptionRecord]


def choose_samples(images, config):
    """The validation images that are captioned after each epoch; they depend on the seed alone."""
    count = min(_SAMPLES, len(images))
    chosen = np.random.default_rng(config.seed).choice(len(images), count, replace=False)
    return dataset_images([images[i] for i in chosen], config)


def save_and_show(state, row, samples, config):
    """Save the epoch, and caption the samples. If those fail, training goes on."""
    save_epoch(state, row, config)
    if is_chief():
        with warning_only():
            _show_samples(samples, state, state.progress.history[-1], config)


def _show_samples(samples, state, row, config):
    """Caption the samples greedily, print a line for each, and write samples.json and samples.html.

    samples.json holds all epochs, so that a run that is continued goes on with the page.

    Args:
      samples: Samples
      state: TrainingState
      row: dict, the epoch's row of the history.
    """
    folder, epoch, images = pathlib.Path(config.run_dir), row["epoch"], samples.images
    captioner = Captioner(state.encoder, state.decoder, samples.vocabulary, f"epoch {epoch}")
    predictions = list(caption_cached(captioner, images, greedy_settings(config), with_evidence=True))
    for prediction in predictions:
        print(printable(f"  {prediction.path.name}: {prediction.caption}"))
    log_epoch(samples.writer, row, float(state.optimizer.learning_rate.numpy()), predictions)
    epochs = [earlier for earlier in _read_samples(folder / "samples.json") if earlier.epoch < epoch]
    epochs.append(SampledEpoch(epoch, [make_record(each, file_state(each.path)) for each in predictions]))
    write_json(folder / "samples.json", [dataclasses.asdict(each) for each in epochs])
    shown = epochs if len(epochs) <= _SHOWN_EPOCHS else [epochs[0], *epochs[1 - _SHOWN_EPOCHS :]]
    write_pages(folder, "What the training learns", _sample_pages(images, shown), file_name="samples.html")


@mended_by("delete it, and the samples begin anew")
def _read_samples(path):
    """The SampledEpochs of a samples.json; none where the file is missing. UserError where it is damaged."""
    if not path.exists():
        return []
    rows = read_json(path, list)
    try:
        return [SampledEpoch(row["epoch"], [CaptionRecord(**fields) for fields in row["captions"]]) for row in rows]
    except (KeyError, TypeError):
        raise FileError(path, "is damaged (it does not hold the captions of epochs)") from None


def _sample_pages(images, epochs):
    """A PageImage for each sample, its captions of several SampledEpochs side by side."""
    for image in images:
        captions = [
            PageCaption(restore_prediction(record, image), f"epoch {each.epoch}")
            for each in epochs
            for record in each.captions
            if record.image == image.name
        ]
        if captions:
            yield PageImage(image.path.name, image.path, captions)
