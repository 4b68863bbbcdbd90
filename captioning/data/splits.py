"""Which captions are used, and which images are kept for validation."""

import dataclasses
import math

import numpy as np
from sklearn.model_selection import train_test_split

from captioning.data.captioned_images import check_validation
from support.errors import UserError


def _draw_examples(images, num_examples, seed):
    """Choose captions at random, and keep the images that they belong to. The same seed draws the same captions.

    Args:
      num_examples: int, how many captions to keep, or None for all.

    Returns:
      list of CaptionedImage with at least one caption each, in the same order. References are not drawn: all remain.
    """
    total = sum(len(image.captions) for image in images)
    if num_examples is None or num_examples >= total:
        return images
    drawn = np.zeros(total, bool)
    drawn[np.random.default_rng(seed).choice(total, num_examples, replace=False)] = True
    drawn = iter(drawn)
    captions = [[caption for caption in image.captions if next(drawn)] for image in images]
    kept = [dataclasses.replace(image, captions=some) for image, some in zip(images, captions, strict=True)]
    return [image for image in kept if image.captions]


def _split_by_image(images, val_fraction, seed):
    """Split images at random into training and validation. All captions of an image are on the same side.

    Args:
      val_fraction: float, validation's share of the images.
      seed: int. The same seed splits in the same way.

    Returns:
      (list of training images, list of validation images)

    Raises:
      UserError: no image would be left for training or for validation.
    """
    if val_fraction == 0:
        raise UserError(
            "--val_fraction 0 leaves no image to validate on: raise it, or name captions by --validation_captions"
        )
    if len(images) < 2:
        raise UserError(
            f"{len(images)} images cannot be split into training and validation: give captions of more images, or, "
            "if only a few are drawn, raise --num_examples"
        )
    if math.ceil(val_fraction * len(images)) >= len(images):
        raise UserError(
            f"{len(images)} images cannot be split into training and validation with --val_fraction {val_fraction}: "
            "raise --num_examples or lower --val_fraction"
        )
    return train_test_split(images, test_size=val_fraction, random_state=seed)


def complete_splits(splits, config):
    """Draw the captions to train on, and make the validation split where no file has one.

    Args:
      splits: dict of "train" and maybe "validation" and "test" to lists of CaptionedImage.
      config: Config; its num_examples, val_fraction, seed and max_words.

    Returns:
      dict of "train", "validation" and, where there is one, "test" to lists of CaptionedImage

    Raises:
      UserError: a split would be left without images, or validation without captions.
    """
    train, validation = _draw_examples(splits["train"], config.num_examples, config.seed), splits.get("validation")
    if validation is None and config.val_fraction == 0 and "test" in splits:
        print("--val_fraction 0 without validation captions: the best epoch is chosen on the test images")
        validation = splits["test"]
    elif validation is None:
        train, validation = _split_by_image(train, config.val_fraction, config.seed)
    check_validation(validation, config.max_words)
    names = {image.name for image in train}
    for split, images in (("validation", validation), ("test", splits.get("test", []))):
        if common := sum(image.name in names for image in images):
            print(f"note: {common} of {len(images)} images of {split} are trained on too, so its scores are too good")
    return {"train": train, "validation": validation} | {name: splits[name] for name in ("test",) if name in splits}
