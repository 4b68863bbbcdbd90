"""An image file as viewers show it: its first image, upright, in sRGB, on white.

It stands alone, on numpy and Pillow: exported bundles hold a copy.
"""

import functools
import io
import math
import numbers
import os
import pathlib
import re
import stat

import numpy as np
from PIL import ExifTags, Image, ImageCms

# Of an image as it is decoded. A larger one may be a bomb: a small file that fills the memory.
MOST_PIXELS = 100_000_000
# Of any file. A JPEG file is decoded at a fraction of its size, but may need 6 bytes for each of its pixels.
MOST_FILE_PIXELS = 250_000_000
LEAST_ROWS = 0.895  # share of the rows that a JPEG file which lacks its end must have: nine tenths, rounded

# The first bytes of files that Pillow does not read, or of which it would read a thumbnail alone.
_UNREAD = {
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"(II\*\0|MM\0\*)....CR": "a camera's raw file (CR2)",
    rb"....ftypcrx": "a camera's raw file (CR3)",
    rb"FUJIFILMCCD-RAW": "a camera's raw file (RAF)",
    rb"IIR[OS]|MMOR": "a camera's raw file (ORF)",
    rb"IIU\0": "a camera's raw file (RW2)",
}
_RAW_ENDINGS = {".3fr", ".arw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".nef", ".nrw", ".pef", ".srw"}
_TURNS = {  # of EXIF's orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = tuple(_TURNS.values())[3:]  # what makes the width the height


def open_image(path):
    """Pillow's image of a file, opened only.

    Raises:
      OSError: it is no regular file (reading a named pipe would wait for ever), or of a format that is not read.
      Another of Pillow's many errors: it is damaged.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is no regular file")
    with open(path, "rb") as file:
        head = file.read(16)
    for beginning, name in _UNREAD.items():
        if re.match(beginning, head, re.DOTALL):
            raise OSError(f"{name} is not read: save it as JPEG, PNG or TIFF")
    image = Image.open(path)
    ending = pathlib.PurePath(path).suffix.lower()
    if image.format == "TIFF" and (ending in _RAW_ENDINGS or ExifTags.Base.DNGVersion in image.tag_v2):
        name = "DNG" if ExifTags.Base.DNGVersion in image.tag_v2 else ending[1:].upper()
        image.close()
        raise OSError(f"a camera's raw file ({name}) is not read: save it as JPEG, PNG or TIFF")
    return image


def upright_rgb(image, smallest, shrunk=None):
    """Decode an opened image as upright sRGB.

    A JPEG file that lacks its end is used where at least LEAST_ROWS of its rows are there. The others are grey.

    Args:
      image: Pillow image, just opened.
      smallest: int, pixels. Each side keeps at least this many where the file has them. A JPEG file that is much larger
        is decoded at a fraction of its size, which saves time.
      shrunk: (width, height) in pixels that the caller is to resize the image to, or None. Where colours must be
        converted, the image comes in this size, which saves time too.

    Returns:
      Pillow image of mode RGB. Its `info` has "cut" where the file lacks its end.

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
    sbit = _significant_bits(image)
    if image.format in ("JPEG", "MPO"):
        _supply_end(image)
    image.load()
    cut = "cut" in image.info
    if cut:
        _check_rows(image)
    turn = _find_turn(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image, sbit)
    if turn is not None:
        image = image.transpose(turn)
    image = _to_srgb(image, shrunk)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if cut:
        image.info["cut"] = True
    return image


def upright_size(image):
    """(width, height) in pixels of an opened image when it is upright."""
    return image.size[::-1] if _find_turn(image) in _SIDEWAYS else image.size


def _find_turn(image):
    """Pillow's Transpose that turns an image upright. None where it is, or where its EXIF data are broken."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises SyntaxError, struct.error and others; a viewer shows the image all the same
        return None


# --- JPEG files that lack their end -----------------------------------------------------------------------------


def _supply_end(image):
    """Let a JPEG file that lacks its end be decoded, with grey for what is missing, and note that in `image.info`.

    A file of several scans stays as it is where a whole scan is missing.
    """
    file, info = image.fp, image.info

    def load_read(size):
        data = file.read(size)
        if data or "cut" in info or not _has_every_scan(file):
            return data
        info["cut"] = True
        return b"\xff\xd9"  # the marker of the end

    image.load_read = load_read


def _has_every_scan(file):
    """Whether the scans that begin in a JPEG file bring each coefficient to its last bit, in whole or in part."""
    file.seek(0)
    data, place, missing = file.read(), 2, set()
    marker = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])(..)", re.DOTALL)  # no marker is 0 or a restart, d0 to d7
    while found := marker.search(data, place):
        size = int.from_bytes(found[2], "big")
        place = found.start(2) + size
        body = data[found.end() : place]
        if found[1] in b"\xc0\xc1\xc2":  # the frame
            missing = {(component, number) for component in body[6::3] for number in range(64)}
        elif found[1] == b"\xda" and len(body) == size - 2 == 4 + 2 * body[0]:  # a scan
            first, last, bits = body[-3:]
            if bits % 16 == 0:
                missing -= {(component, number) for component in body[1:-3:2] for number in range(first, last + 1)}
    return not missing


def _check_rows(image):
    """OSError where too few rows of a decoded JPEG file are there. libjpeg makes the others grey."""
    rows = np.asarray(image).reshape(image.height, -1)  # (height, width * channels)
    there = np.flatnonzero(((rows < 127) | (rows > 128)).any(1))
    count = there[-1] + 1 if len(there) else 0
    if count < LEAST_ROWS * image.height:
        raise OSError(f"the file ends too early: {100 * count // image.height} % of its rows are there")


# --- Numbers of more than 8 bits --------------------------------------------------------------------------------


def _to_8_bits(image, sbit):
    """Scale a grey image of 16-bit, 32-bit or floating-point numbers to 8 bits, Pillow's mode L.

    The range is the one that the file declares: a TIFF file by SMinSampleValue and SMaxSampleValue, MinSampleValue and
    MaxSampleValue, or BitsPerSample between 8 and 16; a PNG file by sBIT, where that holds the largest value. Else it
    goes by the largest value: whole numbers have the fewest of 8, 12 and 16 bits that hold it. Floats reach to 1, 255
    or 65535 where the largest is near. In all other cases the largest value is white. 0 is black; where there are
    numbers far below it, floats from -1 to 1 keep this range, and else the smallest value is black.

    Args:
      image: Pillow image of a mode I or F, decoded.
      sbit: int, the bits of a PNG file's numbers that count, or None.
    """
    values = np.asarray(image)  # (height, width)
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if _find_number(tags, "BitsPerSample") == 32 and _find_number(tags, "SampleFormat", 1) == 1:
        values = values.view(np.uint32)  # Pillow takes them for signed
    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    smallest, largest = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    low, high = _declared_range(tags, sbit, largest) or _guess_range(smallest, largest, values.dtype.kind == "f")
    scaled = values.astype(np.float32)  # (height, width)
    np.nan_to_num(scaled, copy=False, nan=low, posinf=high, neginf=low)
    scaled -= low
    scaled *= 255 / max(high - low, 1e-30)
    scaled += 1e-4  # so that a whole number stays one, whatever float32 makes of it
    pixels = scaled.clip(0, 255).astype(np.uint8)
    if _find_number(tags, "PhotometricInterpretation") == 0:  # white is 0; Pillow sees to it for 8 bits alone
        pixels = 255 - pixels
    result = Image.fromarray(pixels)
    result.info = {name: value for name, value in image.info.items() if name == "icc_profile"}
    return result


def _find_number(tags, name, default=None):
    """The first number of a TIFF tag, or `default` where it has none that is finite."""
    value = tags.get(ExifTags.Base[name])
    first = value[0] if isinstance(value, tuple) and value else value
    return float(first) if isinstance(first, numbers.Real) and math.isfinite(first) else default


def _declared_range(tags, sbit, largest):
    """(lowest, highest) number that a file declares, or None. Arguments as in `_to_8_bits`."""
    bits = _find_number(tags, "BitsPerSample", 0)
    low = _find_number(tags, "SMinSampleValue", _find_number(tags, "MinSampleValue", 0))
    high = _find_number(tags, "SMaxSampleValue", _find_number(tags, "MaxSampleValue"))
    if high is None and 8 < bits < 16:
        high = 2**bits - 1
    if sbit and largest < 2**sbit:  # most files with sBIT fill 16 bits all the same, as PNG wants it
        high = 2**sbit - 1
    return (low, high) if high is not None and low < high else None


def _guess_range(smallest, largest, is_float):
    """(lowest, highest) number of an image that declares none. floats, bool -> (float, float)"""
    if is_float:  # resizing may have gone beyond a range by a fourth, and what fills less than a sixteenth is dark
        fitting = (high for least, high in ((0, 1), (16, 255), (4096, 65535)) if least <= largest <= 1.25 * high)
    else:
        fitting = (high for high in (255, 4095, 65535) if largest <= high)
    high = next(fitting, largest)
    if smallest >= min(-high / 4, 0):
        return 0.0, high
    return (-1.0, 1.0) if is_float and high == 1 and smallest >= -1.25 else (smallest, largest)


def _significant_bits(image):
    """What the chunk sBIT of a PNG file of 16 bits says of the first channel: int, or None."""
    if image.format != "PNG" or not image.mode.startswith("I"):
        return None
    with open(image.filename, "rb") as file:
        head = file.read(4096)  # sBIT comes before a palette and the pixels
    found = re.search(rb"\0\0\0\x01sBIT(.)", head.partition(b"IDAT")[0], re.DOTALL)
    return found[1][0] if found and 8 < found[1][0] < 16 else None


# --- Colours ----------------------------------------------------------------------------------------------------


def _to_srgb(image, shrunk=None):
    """An image in sRGB by its embedded profile. Pillow image of any mode of 8 bits -> of mode RGB or RGBA.

    Argument `shrunk` is as in `upright_rgb`.
    """
    kind = "RGBA" if image.has_transparency_data else "RGB"
    profile, is_grey = image.info.get("icc_profile"), image.mode in ("1", "L", "LA")
    form, transform = _find_transform(profile, image.mode == "CMYK", is_grey) if profile else (None, None)
    if transform is None:
        return image if image.mode == kind else image.convert(kind)  # convert copies even an image that is so already
    if kind == "RGBA":
        image = image.convert("RGBA")
    plain = image.convert("RGB") if image.mode == "RGBA" else image
    plain = plain if plain.mode == form else plain.convert(form)
    if shrunk and kind == "RGB":
        plain = plain.resize(shrunk, Image.Resampling.BILINEAR)
    result = ImageCms.applyTransform(plain, transform)
    if kind == "RGBA":
        result.putalpha(image.getchannel("A"))
    return result


@functools.lru_cache(maxsize=16)
def _find_transform(profile, is_cmyk, is_grey):
    """How to turn the colours of an image into sRGB's.

    Args:
      profile: bytes, the embedded ICC profile.
      is_cmyk, is_grey: bool, of the image.

    Returns:
      (Pillow mode to convert the image to, ImageCmsTransform from that to RGB), or (None, None): the profile is sRGB's,
      broken, or of another kind than the image.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        form = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(opened.profile.xcolor_space)
        if form is None or is_cmyk != (form == "CMYK") or (form == "L" and not is_grey):
            return None, None
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), form, "RGB")
        if form == "RGB" and ("sRGB" in (opened.profile.profile_description or "") or _changes_little(transform)):
            return None, None
    except (ImportError, OSError, ValueError, TypeError, ImageCms.PyCMSError):  # the first where Pillow lacks LittleCMS
        return None, None
    return form, transform


def _changes_little(transform):
    """Whether a transform from RGB to RGB moves colours by 2 of 255 at most, as that of a camera's own sRGB does."""
    steps = np.arange(0, 256, 51, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)  # (1, colours, 3)
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))  # (1, colours, 3)
    return np.abs(moved.astype(int) - colours).max() <= 2
