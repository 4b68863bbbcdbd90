"""Check that all workers of a training on several hosts have the same settings and data."""

import hashlib
import json

from captioning.settings import MODEL_SETTINGS, TRAINING_SETTINGS
from captioning.training.checkpoints import model_digest
from support.distribution import check_same_everywhere


def check_same_training(prepared, config, start=None):
    """Raise UserError where the workers of a training have other settings or data. Paths may be others on each.

    Args:
      prepared: Prepared, what this worker is to train on.
      start: Captioner that the run begins from, or None.
    """
    if config.strategy != "multiworker":
        return
    names = ("seed", "max_words", "keep_vocabulary", *MODEL_SETTINGS, *TRAINING_SETTINGS)
    settings = {f"--{name}": getattr(config, name) for name in names}
    check_same_everywhere(settings, "give every worker the same value")
    check_same_everywhere({"model.py": f"that of digest {model_digest()}"}, "copy it from one worker to the others")
    check_same_everywhere(
        {"the checkpoint of --start_from": start.identity if start else "none to be read"},
        "give every worker the same --start_from, or a copy of it, and one --run_dir that all of them share",
    )
    data = {
        "the vocabulary": _describe_list(prepared.vocabulary, "words"),
        "the training split": _describe_images(prepared.train),
        "the validation split": _describe_images(prepared.validation),
        "the features' network": prepared.network,
        "the features' statistics": _describe_list([*prepared.feature_mean.tolist(), prepared.feature_std], "numbers"),
    }
    check_same_everywhere(data, f"copy {config.data_dir} from one worker to the others")


def _describe_images(images):
    """A digest of all that a training takes from a list of CaptionedImage. Their folder and address are not of it."""
    taken = [(image.image_id, image.file_name, image.encoded_captions, image.references) for image in images]
    return _describe_list(taken, "images")


def _describe_list(values, kind):
    return f"{len(values)} {kind} of digest {hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]}"
