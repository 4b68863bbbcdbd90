"""What script 1 leaves for the others: splits with encoded captions, the vocabulary and the features' statistics.

settings.json                                 what the data were prepared with; it vouches for the other files
train.json, validation.json, test.json        the images of each split; not all data have a test split
vocabulary.json                               the words
feature_statistics.npz                        mean and standard deviation of the features
skipped.json                                  the images that were left out, and why
"""

import dataclasses
import pathlib

import numpy as np

from captioning.data.captioned_images import CaptionedImage, check_validation, clean_folder, clean_id, find_name_problem
from captioning.settings import DATA_SETTINGS, is_same_setting, prepare_command, quote, read_saved_settings
from captioning.vocabulary import build_vocabulary, encode_captions, read_vocabulary
from captioning.words import character_scripts
from support.errors import FileError, UserError
from support.files import read_json, remove_leftovers, replacing, write_json


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """Data that are ready to train on and to caption.

    Attributes:
      train, validation, test: lists of CaptionedImage with encoded captions. `test` may be empty.
      vocabulary: list of V str.
      feature_mean: float32 (F,), each channel's mean over training images and locations.
      feature_std: float, standard deviation of the features from these means.
      network: str, identity of the network that made the features, or MADE_ELSEWHERE.
    """

    train: list[CaptionedImage]
    validation: list[CaptionedImage]
    test: list[CaptionedImage]
    vocabulary: list[str]
    feature_mean: np.ndarray
    feature_std: float
    network: str

    def images(self):
        """The images of all splits, list of CaptionedImage."""
        return self.train + self.validation + self.test


# --- Writing ----------------------------------------------------------------------------------------------------


def retract_prepared(data_dir):
    """Withdraw what was prepared before, because what it depends on is about to change."""
    pathlib.Path(data_dir, "settings.json").unlink(missing_ok=True)


def leave_out(splits, skipped, max_words):
    """The splits without the images that cannot be used.

    Args:
      splits: dict of "train", "validation" and, where there is one, "test" to lists of CaptionedImage.
      skipped: dict of an image's name to reason, for images to leave out.

    Raises:
      UserError: a split has no image left, or none to validate on.
    """
    splits = {name: [image for image in images if image.name not in skipped] for name, images in splits.items()}
    for name, images in splits.items():
        if not images:
            such = next(iter(skipped.values()), "")
            raise UserError(
                f"no readable {name} images are left ({len(skipped)} skipped, such as: {such}): see that --images, or "
                "--coco_dir and --coco_split, name the folder with the images"
            )
    check_validation(splits["validation"], max_words)
    return splits


def save_prepared(splits, skipped, feature_mean, feature_std, network, config, cut=0):
    """Encode the captions and write the files of the prepared data, settings.json last.

    Args:
      splits: as `leave_out` returns them.
      skipped: dict of an image's name to reason, for images that were left out.
      feature_mean, feature_std, network: as in Prepared.
      cut: int, images read in this run whose files lack their end.

    Raises:
      UserError: a file cannot be written.
    """
    folder = pathlib.Path(config.data_dir)
    remove_leftovers(folder)
    vocabulary = build_vocabulary([text for image in splits["train"] for text in image.captions], config.vocab_size)
    write_json(folder / "vocabulary.json", vocabulary)
    for name, images in splits.items():
        write_json(folder / f"{name}.json", [vars(image) for image in encode_images(images, vocabulary)])
        print(f"{name}: {len(images)} images, {sum(len(image.captions) for image in images)} captions")
    write_json(folder / "skipped.json", skipped, indent=1)
    with replacing(folder / "feature_statistics.npz") as temporary:
        np.savez(temporary, mean=feature_mean, std=feature_std)
    settings = {name: getattr(config, name) for name in DATA_SETTINGS}
    write_json(folder / "settings.json", settings | {"splits": list(splits), "network": network}, indent=1)
    if scripts := character_scripts(vocabulary):
        print(f"{' and '.join(scripts)}: characters are the words, and --max_words and --vocab_size count them")
    left_out = f"{len(skipped)} images skipped (see {folder / 'skipped.json'})"
    print(f"vocabulary: {len(vocabulary)} words; {left_out}{describe_cut(cut)}")


def describe_cut(count):
    """What the closing line says of files that lack their end: int -> str, empty for 0."""
    return f"; {count} JPEG files lack their end and are used all the same" if count else ""


def encode_images(images, vocabulary):
    """Set the encoded captions of images. list of CaptionedImage, list of V str -> list of CaptionedImage."""
    encoded = iter(encode_captions([text for image in images for text in image.captions], vocabulary))
    return [dataclasses.replace(image, encoded_captions=[next(encoded) for _ in image.captions]) for image in images]


# --- Reading ----------------------------------------------------------------------------------------------------


def read_prepared_settings(data_dir):
    """The settings that the data in a folder were prepared with, or FileError. path -> dict of setting to value.

    The values may be of wrong types where somebody has changed the file.
    """
    saved = _read_settings_file(data_dir)
    return {name: saved[name] for name in DATA_SETTINGS}


def _read_settings_file(data_dir):
    """The content of settings.json: dict of DATA_SETTINGS, "splits" and "network" to values, or FileError."""
    path = pathlib.Path(data_dir, "settings.json")
    saved = read_saved_settings(path)
    for name in (*DATA_SETTINGS, "splits", "network"):
        if name not in saved:
            raise FileError(path, f"is damaged (it does not say {name})")
    return saved


def load_prepared(config):
    """The Prepared that script 1 left, checked. `load_data` in features/cache.py checks the features too.

    Raises:
      FileError: nothing is prepared, or a file is missing or damaged.
      UserError: it was prepared with other settings.
    """
    folder = pathlib.Path(config.data_dir)
    saved = _read_settings_file(folder)
    for name in DATA_SETTINGS:
        before, now = saved[name], getattr(config, name)
        if not is_same_setting(name, before, now):
            raise UserError(
                f"{folder} was prepared with --{name} {quote(before)}, not {quote(now)}: "
                f"give --{name} {quote(before)}, or {prepare_command(config.dataset)} with the new value"
            )
    vocabulary = read_vocabulary(folder / "vocabulary.json")
    names = ("train", "validation", *(["test"] if "test" in str(saved["splits"]) else []))
    splits = {name: _read_images(folder / f"{name}.json", len(vocabulary)) for name in names}
    splits.setdefault("test", [])
    mean, std = _read_feature_statistics(folder / "feature_statistics.npz")
    return Prepared(**splits, vocabulary=vocabulary, feature_mean=mean, feature_std=std, network=saved["network"])


def _read_images(path, vocab_size):
    """The images of a split's JSON file, one or more, or FileError. path, int V -> list of CaptionedImage."""
    records = read_json(path, list)
    images = [CaptionedImage(**record) for record in records if _is_prepared_image(record, vocab_size)]
    if not images or len(images) < len(records):
        raise FileError(path, f"is damaged ({len(images)} of {len(records)} images are whole)")
    return images


def _is_prepared_image(record, vocab_size):
    """Whether a JSON value of any kind is an image with encoded captions as `save_prepared` writes it."""
    fields = {field.name for field in dataclasses.fields(CaptionedImage)}
    if not isinstance(record, dict) or record.keys() != fields:
        return False
    captions, references, encoded = (record[name] for name in ("captions", "references", "encoded_captions"))
    return (
        clean_id(record["image_id"]) is not None
        and not find_name_problem(record["file_name"])
        and all(clean_folder(record[name]) is not None for name in ("folder", "coco_split"))
        and not (record["feature_stem"] and find_name_problem(f"{record['feature_stem']}.npy"))
        and isinstance(record["url"], str | None)
        and all(isinstance(values, list) for values in (captions, references, encoded))
        and all(isinstance(text, str) for text in captions + references)
        and len(captions) == len(encoded)
        and all(isinstance(token_ids, list) and len(token_ids) > 2 for token_ids in encoded)
        and all(type(i) is int and 0 <= i < vocab_size for token_ids in encoded for i in token_ids)
    )


def _read_feature_statistics(path):
    """Read the features' statistics. Returns (float32 (F,) mean, float standard deviation), or raises FileError."""
    try:
        with np.load(path, allow_pickle=False) as statistics:
            mean, std = statistics["mean"], float(statistics["std"])
    except Exception as error:  # a zip file and its arrays raise errors of many classes
        raise FileError(path, f"is missing or damaged ({type(error).__name__})") from error
    if mean.ndim != 1 or mean.dtype != np.float32 or not np.isfinite(mean).all() or not 0 < std < np.inf:
        raise FileError(path, "is damaged (these are not the statistics of features)")
    return mean, std
