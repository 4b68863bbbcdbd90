"""Image files of any kind, read as the pixels that a CNN takes."""

import warnings

import numpy as np
import pillow_heif
from PIL import Image

from captioning.features.image_reader import MOST_FILE_PIXELS, open_image, upright_rgb
from support.errors import printable
from support.files import raise_if_lost


def set_up_pillow():
    """Let Pillow read the HEIC files of phones, and refuse no file that `upright_rgb` takes. For the scripts."""
    pillow_heif.register_heif_opener()
    # Not None: a GIF file of 50 bytes could let Pillow fill the memory as it is opened.
    Image.MAX_IMAGE_PIXELS = MOST_FILE_PIXELS
    warnings.filterwarnings("ignore", "Corrupt EXIF data")  # such images are used all the same
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow itself refuses twice as many pixels only


def load_image(path, side, cut=None):
    """Read any image file that Pillow can read, and squeeze it to a square.

    Args:
      side: int, pixels of each side of the square.
      cut: list that `path` is added to where it is a JPEG file that lacks its end, and is used all the same; or None.

    Returns:
      uint8 (side, side, 3), RGB, upright, with transparent parts white.

    Raises:
      ValueError: the file is missing or damaged, or has too many pixels.
      UserError: its drive has gone.
    """
    try:
        with open_image(path) as opened:
            image = upright_rgb(opened, side, (side, side))
            if cut is not None and "cut" in image.info:
                cut.append(path)
            return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
    except Exception as error:  # on damaged files Pillow's decoders raise errors of many classes
        if isinstance(error, OSError):
            raise_if_lost(error, path)
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(printable(f"{path} cannot be read as an image ({reason})")) from error
