"""Attention over the grid of locations as smooth light over an image."""

import numpy as np
from PIL import Image


def scale_light(maps):
    """Scale the maps of a caption together, from the least of all words and locations to the most.

    Where a map is uniform, so is its light. One word's peak may be ten times another's, so the light is the root of the
    scaled value: a place with a quarter of the most is half lit.

    Args:
      maps: (words, P).

    Returns:
      float64 (words, P) in 0..1; 0.5 where all values are equal.
    """
    maps = np.asarray(maps, np.float64)
    if maps.size == 0:
        return maps
    span = np.ptp(maps)
    return np.full_like(maps, 0.5) if span < 1e-12 else ((maps - maps.min()) / span) ** 0.5


def peak_over_mean(weights):
    """The peak of a map over its mean. (P,) -> float; 1.0 for a uniform map."""
    return float(np.max(weights) / max(np.mean(weights), 1e-12))


def upsample(weights, size, border="edge"):
    """Spread values on a square grid of locations smoothly over an image.

    Args:
      weights: (P,), row by row, not negative.
      size: (width, height) of the image in pixels.
      border: what surrounds the grid, a mode of `np.pad`. "edge" repeats the outermost values: a peak among them then
        moves to the image's border. With "constant", which is zeros, the peak stays near the middle of its location.

    Returns:
      float32 (height, width), in the range of the weights
    """
    weights = np.asarray(weights, np.float32)
    side = round(weights.size**0.5)
    grid = np.pad(weights.reshape(side, side), 2, border)  # (side + 4, side + 4)
    inside = (2, 2, 2 + side, 2 + side)
    resized = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC, box=inside)
    return np.asarray(resized).clip(0, weights.max())  # (height, width); bicubic curves swing a little over and under
