"""A generated caption, with what figures and scores need of how it came about."""

import dataclasses
import pathlib

import numpy as np

from captioning.words import join_words


@dataclasses.dataclass(frozen=True, eq=False)  # arrays cannot be compared as one value
class GeneratedCaption:
    """A caption that the model generated, and how it came to it.

    Attributes:
      path: pathlib.Path of the image file.
      name: str, the image as the user knows it: a path or an address.
      words: list of str, without <end>.
      log_probs: (len(words),) natural logarithms of the words' probabilities, or one more with that of <end>.
        Probabilities are of the words that the model can say, so not of <unk>. Those of a caption that was drawn are
        the model's too, at temperature 1 and without a nucleus.
      attention_weights: (len(words), P).
      image_id: int or str, or None for an image that is not of the data set.
      references: list of str, what people wrote about the image.
      evidence: (len(words), P), see captioning/attention/evidence.py, or None where it was not asked for.
      feature_norms: (P,), norm of the image's feature at each location, or None.
      others: list of GeneratedCaptions, further captions of the same image: the next best ones, or the next drawn.
    """

    path: pathlib.Path
    name: str
    words: list[str]
    log_probs: np.ndarray
    attention_weights: np.ndarray
    image_id: int | str | None = None
    references: list[str] = ()
    evidence: np.ndarray | None = None
    feature_norms: np.ndarray | None = None
    others: list["GeneratedCaption"] = ()

    @property
    def caption(self):
        return join_words(self.words)

    @property
    def log_probability(self):
        """Natural logarithm of the whole caption's probability."""
        return float(np.sum(self.log_probs))
