"""Which captions are used, and which images are kept for validation."""

import dataclasses
import math

import numpy as np
from sklearn.model_selection import train_test_split

from support.errors import UserError


def draw_examples(images, num_examples, seed):
    """Choose captions at random, and keep the images that they belong to.

    Args:
      images: list of CaptionedImage.
      num_examples: int, how many captions to keep, or None for all.
      seed: int. The same seed draws the same captions.

    Returns:
      list of CaptionedImage with at least one caption each, in the same order. References are not drawn: all remain.
    """
    total = sum(len(image.captions) for image in images)
    if num_examples is None or num_examples >= total:
        return images
    drawn = np.zeros(total, bool)
    drawn[np.random.default_rng(seed).choice(total, num_examples, replace=False)] = True
    drawn = iter(drawn)
    kept = [
        dataclasses.replace(image, captions=[caption for caption in image.captions if next(drawn)]) for image in images
    ]
    return [image for image in kept if image.captions]


def split_by_image(images, val_fraction, seed):
    """Split images at random into training and validation. All captions of an image are on the same side.

    Args:
      images: list of CaptionedImage.
      val_fraction: float, validation's share of the images.
      seed: int. The same seed splits in the same way.

    Returns:
      (list of training images, list of validation images).

    Raises:
      UserError: no image would be left for training.
    """
    if math.ceil(val_fraction * len(images)) >= len(images):
        raise UserError(
            f"{len(images)} images cannot be split into training and validation with --val_fraction {val_fraction}: "
            "raise --num_examples or lower --val_fraction"
        )
    return train_test_split(images, test_size=val_fraction, random_state=seed)
