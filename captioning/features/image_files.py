"""Image files of any kind, read as the pixels that InceptionV3 takes."""

import os
import stat
import warnings

import numpy as np
import pillow_heif
from PIL import Image, ImageOps

from captioning.features.cnn import IMAGE_SIZE
from support.errors import printable

MOST_PIXELS = (
    100_000_000  # of an image as it is decoded; a larger one may be a bomb, a small file that fills the memory
)
MOST_FILE_PIXELS = (
    250_000_000  # of any file; a JPEG file is decoded at a fraction of its size, but may need 6 bytes each
)


def set_up_pillow():
    """Let Pillow read the HEIC files of phones, and refuse no file that `upright_rgb` takes. For the scripts."""
    pillow_heif.register_heif_opener()
    # Not None: a GIF file of 50 bytes could let Pillow fill the memory as it is opened.
    Image.MAX_IMAGE_PIXELS = MOST_FILE_PIXELS
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow itself refuses twice as many pixels only


def load_image(path):
    """Read any image file that Pillow can read, and squeeze it to a square.

    Args:
      path: path of the file.

    Returns:
      uint8 (299, 299, 3), RGB, upright, with transparent parts white.

    Raises:
      ValueError: the file is missing or damaged, or has too many pixels.
    """
    try:
        with open_image(path) as image:
            return np.asarray(upright_rgb(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))
    except Exception as error:  # on damaged files Pillow's decoders raise errors of many classes
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(printable(f"{path} cannot be read as an image ({reason})")) from error


def open_image(path):
    """Pillow's image of a file, opened only. OSError for what is no file: reading a named pipe would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is no regular file")
    return Image.open(path)


def upright_rgb(image, smallest=IMAGE_SIZE):
    """Decode an opened image as upright RGB.

    Args:
      image: Pillow image, just opened.
      smallest: int, pixels. Each side keeps at least this many where the file has them. A JPEG file that is much larger
        is decoded at a fraction of its size, which saves time.

    Returns:
      Pillow image of mode RGB.

    Raises:
      OSError, or another of Pillow's many errors: the file is damaged, or it is PostScript.
    """
    if image.format == "EPS":
        raise OSError("PostScript is a program, and programs in images are not run")  # Pillow would call Ghostscript
    if image.width * image.height > MOST_FILE_PIXELS:
        raise OSError(f"{image.width} x {image.height} pixels are more than {MOST_FILE_PIXELS}")
    image.draft("RGB", (smallest, smallest))  # a JPEG file is now decoded at 1/2, 1/4 or 1/8 of its size
    if image.width * image.height > MOST_PIXELS:
        raise OSError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS}")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits a pixel: convert("RGB") would cut all values above 255
        image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert copies even an image that is RGB already
