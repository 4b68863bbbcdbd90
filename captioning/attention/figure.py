"""Figures of attention: PNG files, drawn without a display."""

import textwrap
import warnings
from unicodedata import east_asian_width

import numpy as np
from matplotlib.figure import Figure

from captioning.attention.maps import scale_light, upsample
from captioning.features.image_reader import open_image, upright_rgb
from support.files import replacing

_PANEL_WIDTH, _GAP, _LINE, _LETTER = 190, 6, 24, 8  # pixels of a figure: of a panel, between panels, of text
_DPI = 80


def plot_attention(caption, path, attention_map="weights"):
    """Draw the image, and for each word the image lit where its map is high.

    The light is scaled from the least to the most of all the caption's maps, so a uniform map gives uniform light.

    Args:
      caption: GeneratedCaption
      path: path of the PNG file.
      attention_map: "weights" or "evidence", which must then be known.

    Raises:
      ValueError: the image file is gone or damaged.
      UserError: the disk is full or the folder cannot be written.
    """
    image = _read_panel(caption.path)
    pixels = np.asarray(image, np.float32) / 255  # (height, width, 3)
    panels = [("", pixels)]
    name, maps = "attention weights", caption.attention_weights
    if attention_map == "evidence":
        name, maps = "evidence", caption.evidence
    for word, light in zip(caption.words, scale_light(maps), strict=True):
        smooth = upsample(light, image.size)  # (height, width)
        panels.append((word, pixels * (0.2 + 0.8 * smooth[..., np.newaxis])))
    # A line of its own, as one from right to left would take the rest with it.
    title = f"{caption.caption or '(no words)'}\n{name}"
    figure = _lay_out_panels(panels, image.size, title)
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # `letters_in_fonts` has said so
        figure.savefig(temporary, pil_kwargs={"compress_level": 1})  # the usual 6 takes a fifth of a second


def _read_panel(path):
    """An image file as RGB, as large as a panel: _PANEL_WIDTH wide and at most three times as high."""
    try:
        with open_image(path) as opened:
            image = upright_rgb(opened, _PANEL_WIDTH)
            scale = min(_PANEL_WIDTH / image.width, 3 * _PANEL_WIDTH / image.height)
            return image.resize([max(round(side * scale), 1) for side in image.size], reducing_gap=2.0)
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise ValueError(f"{path} cannot be drawn ({error})") from error


def _lay_out_panels(panels, image_size, title):
    """A figure of panels in rows, each with its word above, and the caption on top.

    It has no axes: their layout takes longer than all the rest. Matplotlib from 3.11 on joins Arabic's letters, sets
    marks in place and writes from right to left. Before, letters stand apart and from left to right.

    Args:
      panels: list of (word, pixels (height, width, 3) in 0..1).
      image_size: (width, height) of each panel's pixels.
      title: str of one or two lines, the caption first.

    Returns:
      matplotlib Figure
    """
    image_width, image_height = image_size
    rows = -(-len(panels) // (5 if image_width > 1.2 * image_height else 6))
    columns = -(-len(panels) // rows)
    width, height = _PANEL_WIDTH + _GAP, image_height + _LINE + _GAP
    wide = sum(east_asian_width(each) in "WF" for each in title) / len(title)  # share of letters twice as wide
    letter = _LETTER * (1 + wide)
    lines = [line for part in title.split("\n") for line in textwrap.wrap(part, int(columns * width / letter))]
    size = np.array([columns * width, rows * height + len(lines) * _LINE])
    figure = Figure(size / _DPI, _DPI)
    look = {"ha": "center", "fontsize": 12, "parse_math": False}  # a word may hold a $
    figure.text(0.5, 1 - _GAP / size[1], "\n".join(lines), va="top", **look)
    for number, (word, pixels) in enumerate(panels):
        corner = np.array([number % columns * width, (rows - 1 - number // columns) * height])  # from the lower left
        figure.figimage(pixels, *(corner + (width - image_width) // 2 * np.array([1, 0])))
        figure.text(*(corner + (width / 2, image_height + 6)) / size, word, **look)
    return figure
