"""What a training has learned so far: the same few validation pictures, captioned after each epoch."""

import dataclasses
import pathlib

import numpy as np

from captioning.attention.page import PageCaption, PagePicture, describe_light, write_pages
from captioning.captioner import Captioner, caption_batch
from captioning.features.cache import Picture, cached_batches, dataset_pictures
from captioning.inference.captions_file import CaptionRecord, file_state, make_record, restore_prediction
from captioning.training.tensorboard import log_epoch
from support.errors import UserError, printable
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


@dataclasses.dataclass(frozen=True)
class SampledEpoch:
    """What the model said of the samples after an epoch: an entry of samples.json."""

    epoch: int
    captions: list[CaptionRecord]


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
    with_evidence = config.attention_map == "evidence"
    predictions = [caption for batch in batches for caption in caption_batch(captioner, *batch, greedy, with_evidence)]
    for prediction in predictions:
        print(printable(f"  {prediction.path.name}: {prediction.caption}"))
    log_epoch(samples.writer, row, float(state.optimizer.learning_rate.numpy()), predictions)
    epochs = [earlier for earlier in read_samples(folder / "samples.json") if earlier.epoch < epoch]
    epochs.append(SampledEpoch(epoch, [make_record(each, file_state(each.path)) for each in predictions]))
    write_json(folder / "samples.json", [dataclasses.asdict(each) for each in epochs])
    shown = epochs if len(epochs) <= SHOWN_EPOCHS else [epochs[0], *epochs[1 - SHOWN_EPOCHS :]]
    intro = describe_light(predictions[0])
    write_pages(
        folder, "What the training learns", sample_pages(pictures, shown), file_name="samples.html", intro=intro
    )


def read_samples(path):
    """The SampledEpochs of a samples.json; none where the file is missing. UserError where it is damaged."""
    if not path.exists():
        return []
    remedy = "delete it, and the samples begin anew"
    rows = read_json(path, remedy, list)
    try:
        return [SampledEpoch(row["epoch"], [CaptionRecord(**fields) for fields in row["captions"]]) for row in rows]
    except (KeyError, TypeError):
        raise UserError(f"{path} is damaged (it does not hold the captions of epochs): {remedy}") from None


def sample_pages(pictures, epochs):
    """A PagePicture for each sample, its captions of several SampledEpochs side by side."""
    for picture in pictures:
        captions = [
            PageCaption(restore_prediction(record, picture), f"epoch {each.epoch}")
            for each in epochs
            for record in each.captions
            if record.image == picture.name
        ]
        if captions:
            yield PagePicture(picture.path.name, picture.path, captions)
