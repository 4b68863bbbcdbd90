"""Attention weights as smooth maps over an image."""

import numpy as np
from PIL import Image


def upsample(weights, size, border="edge"):
    """Turn attention weights into a map of the image's size.

    Args:
      weights: (P,), the weights of a square grid of locations, row by row.
      size: (width, height) of the image in pixels.
      border: what surrounds the grid, a mode of `np.pad`. "edge" repeats the outermost weights, so that a peak among
        them is drawn towards the image's border. "constant" is zeros, and such a peak stays in its location's middle.

    Returns:
      float32 (height, width), its largest value 1, none below 0.
    """
    weights = np.asarray(weights, np.float32)
    side = round(weights.size**0.5)
    grid = np.pad(weights.reshape(side, side), 2, border)  # (side + 4, side + 4)
    inside = (2, 2, 2 + side, 2 + side)
    resized = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC, box=inside)
    smooth = np.asarray(resized).clip(0)  # (height, width)
    return smooth / max(smooth.max(), 1e-12)
