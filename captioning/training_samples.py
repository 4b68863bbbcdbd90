"""What a training has learned so far: the same few validation pictures, captioned after each epoch."""

import dataclasses
import pathlib

import numpy as np

from captioning.attention_page import PageCaption, PagePicture, write_pages
from captioning.caption_records import CaptionRecord, make_record, restore_prediction
from captioning.captioner import Captioner, Picture, cached_batches, caption_batch, dataset_pictures
from captioning.tensorboard_log import log_epoch
from support.files import read_json, write_json

SAMPLES = 4  # pictures
SHOWN_EPOCHS = 8  # columns of the page: the first epoch and the latest ones


@dataclasses.dataclass(frozen=True)
class Samples:
    """What is captioned after each epoch.

    Attributes:
      pictures: list of Pictures, of the validation split.
      vocabulary: list of V words.
      writer: a tf.summary writer that the captions go to as well, or None.
    """

    pictures: list[Picture]
    vocabulary: list[str]
    writer: object = None


def choose_samples(images, config):
    """The validation pictures that are captioned after each epoch; they depend on the seed alone."""
    count = min(SAMPLES, len(images))
    chosen = np.random.default_rng(config.seed).choice(len(images), count, replace=False)
    return dataset_pictures([images[i] for i in chosen], config)


def show_samples(samples, state, row, config):
    """Caption the samples greedily, print a line for each, and write samples.json and samples.html.

    samples.json holds all epochs, so that a run that is continued goes on with the page.

    Args:
      samples: Samples
      state: TrainingState
      row: dict, the epoch's row of the history.
    """
    folder, epoch, pictures = pathlib.Path(config.run_dir), row["epoch"], samples.pictures
    captioner = Captioner(state.encoder, state.decoder, samples.vocabulary, f"epoch {epoch}")
    greedy = dataclasses.replace(config, beam_width=1)
    batches = cached_batches(pictures, greedy)
    predictions = [caption for batch in batches for caption in caption_batch(captioner, *batch, greedy)]
    for prediction in predictions:
        print(f"  {prediction.path.name}: {prediction.caption}")
    epochs = [row for row in read_samples(folder / "samples.json") if row["epoch"] < epoch]
    epochs.append({"epoch": epoch, "captions": [vars(make_record(prediction)) for prediction in predictions]})
    write_json(folder / "samples.json", epochs)
    shown = epochs if len(epochs) <= SHOWN_EPOCHS else [epochs[0], *epochs[1 - SHOWN_EPOCHS :]]
    write_pages(folder, "What the training learns", sample_pages(pictures, shown), file_name="samples.html")
    log_epoch(samples.writer, row, float(state.optimizer.learning_rate.numpy()), predictions)


def read_samples(path):
    """The samples of earlier epochs; none where the file is missing. UserError where it is damaged."""
    return read_json(path, "delete it, and the samples begin anew", list) if path.exists() else []


def sample_pages(pictures, epochs):
    """A PagePicture for each sample, its captions of several epochs side by side."""
    for picture in pictures:
        captions = []
        for row in epochs:
            records = [CaptionRecord(**fields) for fields in row["captions"] if fields["image"] == picture.name]
            captions += [PageCaption(restore_prediction(r, picture), f"epoch {row['epoch']}") for r in records]
        if captions:
            yield PagePicture(picture.path.name, picture.path, captions)
