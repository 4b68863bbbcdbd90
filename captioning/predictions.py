"""What the model says about an image."""

import dataclasses
import pathlib

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)  # arrays cannot be compared as one value
class PredictedCaption:
    """A caption that the model predicted, and how it came to it.

    Attributes:
      path: pathlib.Path of the image file.
      name: str, the image as the user knows it: a path or an address.
      words: list of str, without <end>.
      log_probs: (len(words),) natural logarithms of the words' probabilities, or one more with that of <end>.
      attention_weights: (len(words), P).
      image_id: int, or None for an image that is not of the data set.
      references: list of str, what people wrote about the image.
    """

    path: pathlib.Path
    name: str
    words: list[str]
    log_probs: np.ndarray
    attention_weights: np.ndarray
    image_id: int | None = None
    references: list[str] = ()

    @property
    def caption(self):
        return " ".join(self.words)

    @property
    def log_probability(self):
        """Natural logarithm of the whole caption's probability."""
        return float(np.sum(self.log_probs))
