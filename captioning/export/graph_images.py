"""Image files inside a TensorFlow graph: from bytes to the pixels that a CNN takes.

It does what image_reader.py does with Pillow, for the kinds of files that TensorFlow decodes: JPEG, PNG, WebP, GIF and
BMP. An image that cannot be read does not fail the graph. It gets white pixels and a status that says so. So does one
whose colours a profile other than sRGB changes, a progressive JPEG file that lacks its end, and an animated WebP file.
"""

import functools

import tensorflow as tf

from captioning.features.image_reader import LEAST_ROWS, MOST_FILE_PIXELS, MOST_PIXELS

OK, _UNREADABLE, _TOO_LARGE, _OTHER_COLOURS = "ok", "unreadable", "too large", "not sRGB"  # the statuses
_JPEG_RATIOS = (1, 2, 4, 8)  # a JPEG file can be decoded at these fractions of its size
_SHORT = 3  # EXIF's number for a type: 16 bits


def read_images(images, side):
    """Read many image files.

    Args:
      images: string (B,), files as bytes.
      side: int, pixels of each side of the squares that they become.

    Returns:
      pixels: uint8 (B, side, side, 3), as image_files.load_image returns them, white where the status is not OK.
      statuses: string (B,), OK, _UNREADABLE, _TOO_LARGE or _OTHER_COLOURS.
    """
    read = lambda data: _read_image(data, side)  # noqa: E731
    return tf.map_fn(read, images, fn_output_signature=(tf.uint8, tf.string))  # (B, side, side, 3), (B,)


def _read_image(data, side):
    """Read one image file. string () -> uint8 (side, side, 3), string ()."""
    # A graph cannot catch the error of an operation, but a data set can leave out the element that fails.
    white = tf.fill((side, side, 3), tf.constant(255, tf.uint8))
    file = tf.data.Dataset.from_tensors(data)
    ways = [functools.partial(decode, side=side) for decode in (_decode_or_refuse, _decode_cut)]
    read, read_cut = (file.map(way).ignore_errors() for way in ways)
    otherwise = tf.data.Dataset.from_tensors((white, _UNREADABLE))
    pixels, status = read.concatenate(read_cut).concatenate(otherwise).take(1).get_single_element()
    return tf.ensure_shape(pixels, white.shape), status


def _decode_or_refuse(data, side):
    """What `_read_image` returns. A file that cannot be read raises the error of a TensorFlow operation."""
    white = tf.fill((side, side, 3), tf.constant(255, tf.uint8))
    size = _image_size(data)
    decoded = -(-size // _jpeg_ratio(size, side)) if _is_jpeg(data) else size
    if tf.reduce_prod(size) > MOST_FILE_PIXELS or tf.reduce_prod(decoded) > MOST_PIXELS:
        pixels, status = white, _TOO_LARGE
    elif _has_other_colours(data):
        pixels, status = white, _OTHER_COLOURS
    else:
        pixels, status = _decode_image(data, side), OK
    return pixels, status


def _decode_cut(data, side):
    """The same of a JPEG file that lacks its end, if it has the rows that image_reader.py wants, and a single scan."""
    sequential = tf.strings.length(_find_segment(data, b"\xff\xc0", b"")) > 0
    tf.debugging.Assert(_is_jpeg(data) & sequential & ~_has_other_colours(data), ["another kind of file"])
    image = _decode_jpeg(data, side, try_recover_truncated=True)  # (height, width, 3), grey where the file has no more
    there = tf.where(tf.reduce_any((image < 127) | (image > 128), (1, 2)))  # (rows, 1)
    height = tf.cast(tf.shape(image)[0], tf.float32)
    tf.debugging.Assert(tf.cast(tf.reduce_max(there) + 1, tf.float32) >= LEAST_ROWS * height, ["too few rows"])
    return _turn_upright(_round_pixels(_shrink(image, side)), _orientation(_find_exif(data))), OK


def _decode_image(data, side):
    """What image_files.load_image does, inside a graph. string () -> uint8 (side, side, 3)."""
    if _is_jpeg(data):
        resized = _shrink(_decode_jpeg(data, side), side)
    elif _is_png(data):
        resized = _decode_png(data, side)
    elif _is_webp(data):
        resized = _shrink_flat(_decode_webp(data), side)
    elif _is_bmp(data):
        resized = _shrink(_decode_bmp(data), side)
    else:
        resized = _shrink(tf.io.decode_image(data, 3, expand_animations=False), side)
    return _turn_upright(_round_pixels(resized), _orientation(_find_exif(data)))


# --- Kinds of files ---------------------------------------------------------------------------------------------


def _is_jpeg(data):
    return tf.strings.substr(data, 0, 2) == b"\xff\xd8"


def _is_png(data):
    return tf.strings.substr(data, 0, 4) == b"\x89PNG"


def _is_webp(data):
    return (tf.strings.substr(data, 0, 4) == b"RIFF") & (tf.strings.substr(data, 8, 4) == b"WEBP")


def _is_bmp(data):
    return tf.strings.substr(data, 0, 2) == b"BM"


def _is_gif(data):
    return tf.strings.substr(data, 0, 4) == b"GIF8"


def _image_size(data):
    """Width and height as the header tells them, before anything is decoded. string () -> int64 (2,)."""
    if _is_jpeg(data):
        size = tf.cast(tf.io.extract_jpeg_shape(data)[:2], tf.int64)
    elif _is_png(data):
        size = tf.stack([_read_number(data, position, 4, big_endian=True) for position in (16, 20)])
    elif _is_webp(data):
        size = _webp_size(data)
    elif _is_bmp(data):
        size = tf.stack([_read_number(data, position, 4) for position in (18, 22)])
        size = tf.where(size < 2**31, size, 2**32 - size)  # a height below 0 means that the rows go downwards
    elif _is_gif(data):
        size = tf.stack([_read_number(data, position, 2) for position in (6, 8)])
    else:
        size = tf.zeros(2, tf.int64)
    return size


def _webp_size(data):
    """Width and height of a WebP file of any of its three kinds. string () -> int64 (2,)."""
    kind = tf.strings.substr(data, 12, 4)
    if kind == b"VP8X":  # extended: 24 bits each
        size = tf.stack([_read_number(data, position, 3) for position in (24, 27)]) + 1
    elif kind == b"VP8L":  # without loss: 14 bits each
        bits = _read_number(data, 21, 4)
        size = tf.stack((bits % 2**14, bits // 2**14 % 2**14)) + 1
    else:
        size = tf.stack([_read_number(data, position, 2) % 2**14 for position in (26, 28)])
    return size


def _decode_jpeg(data, side, **how):
    """uint8 (height, width, 3). A file much larger than needed comes at 1/2, 1/4 or 1/8 of its size, as from Pillow."""
    decode = functools.partial(tf.io.decode_jpeg, data, 3, dct_method="INTEGER_ACCURATE", **how)  # as Pillow does
    number = tf.reduce_sum(tf.cast(_jpeg_ratio(_image_size(data), side) > _JPEG_RATIOS, tf.int32))
    return tf.switch_case(number, [functools.partial(decode, ratio=ratio) for ratio in _JPEG_RATIOS])


def _jpeg_ratio(size, side):
    """Which fraction of its size a JPEG file is decoded at: 1, 2, 4 or 8. int64 (2,), int -> int64 ()."""
    excess = tf.reduce_min(size) // side
    return tf.reduce_max(tf.where(excess >= _JPEG_RATIOS, tf.constant(_JPEG_RATIOS, tf.int64), 1))


def _decode_png(data, side):
    """A PNG file, small and on white. string () -> float (side, side, 3)."""
    bits, kind = _read_number(data, 24, 1), _read_number(data, 25, 1)
    if (bits == 16) & (kind == 0):
        resized = _shrink(tf.repeat(_decode_deep_png(data), 3, 2), side)
    elif (kind == 4) | (kind == 6) | (tf.strings.length(_find_chunk(data, b"tRNS")) > 0):
        resized = _shrink_flat(tf.io.decode_png(data, 4), side)
    else:
        resized = _shrink(tf.io.decode_png(data, 3), side)
    return resized


def _decode_deep_png(data):
    """A grey PNG file of 16 bits, in the range that image_reader.py finds. string () -> uint8 (height, width, 1)."""
    numbers = tf.cast(tf.io.decode_png(data, 1, tf.uint16), tf.float32)  # (height, width, 1)
    largest, sbit = tf.reduce_max(numbers), _find_chunk(data, b"sBIT")
    high = tf.where(largest <= 255, 255.0, tf.where(largest <= 4095, 4095.0, 65535.0))
    if tf.strings.length(sbit) > 0:
        bits = tf.cast(_read_number(sbit, 0, 1), tf.float32)
        declared = 2.0**bits - 1
        high = tf.where((8 < bits) & (bits < 16) & (largest <= declared), declared, high)
    return tf.cast(numbers * (255 / high) + 1e-4, tf.uint8)


def _decode_bmp(data):
    """A BMP file, uint8 (height, width, 3). TensorFlow itself takes the numbers of a palette's colours for grey."""
    if _read_number(data, 28, 2) == 8:
        start = tf.cast(14 + _read_number(data, 14, 4), tf.int32)
        colours = tf.minimum(tf.cast(_read_number(data, 10, 4), tf.int32) - start, 4 * 256) // 4
        table = tf.io.decode_raw(tf.strings.substr(data, start, 4 * colours), tf.uint8)
        table = tf.reshape(table, (-1, 4))[:, 2::-1]  # (colours, 3); stored as blue, green, red, unused
        rgb = tf.gather(table, tf.cast(tf.io.decode_bmp(data)[:, :, 0], tf.int32))
    else:
        rgb = tf.io.decode_bmp(data, 3)
    return rgb


def _decode_webp(data):
    """A WebP file, uint8 (height, width, 3 or 4). An animation fails."""
    is_extended = tf.strings.substr(data, 12, 4) == b"VP8X"
    is_animated = is_extended & (_read_number(data, 20, 1) // 2 % 2 == 1)
    # TensorFlow writes beyond its memory in an animation without transparency. So it must not even begin to decode one.
    data = tf.where(is_animated, b"", data)
    return tf.io.decode_image(data, 0, expand_animations=False)


def _shrink(image, side):
    """Resize as Pillow does. (height, width, channels) of any type -> float (side, side, channels)."""
    return tf.image.resize(image, (side, side), antialias=True)


def _shrink_flat(image, side):
    """Put an image on white, and resize it. uint8 (height, width, 3 or 4) -> float (side, side, 3).

    Floats are made of the small image only: a large one would take 16 bytes a pixel.
    """
    if tf.shape(image)[2] == 4:
        opacity = image[:, :, 3:]  # (height, width, 1)
        products = tf.cast(image[:, :, :3], tf.uint16) * tf.cast(opacity, tf.uint16)  # (height, width, 3), 255^2 fits
        resized = _shrink(products, side) / 255 + 255 - _shrink(opacity, side)
    else:
        resized = _shrink(image[:, :, :3], side)
    return resized


def _round_pixels(resized):
    """float (side, side, 3) -> uint8 (side, side, 3)"""
    return tf.cast(tf.round(tf.clip_by_value(resized, 0.0, 255.0)), tf.uint8)


def _has_other_colours(data):
    """Whether a file has a profile that does not say that it is sRGB. string () -> bool ()."""
    if _is_jpeg(data):
        profile = _find_segment(data, b"\xff\xe2", b"ICC_PROFILE\0")
    elif _is_png(data):
        chunk = _find_chunk(data, b"iCCP")
        profile = tf.strings.regex_replace(chunk, r"^[^\x00]*\x00\x00", "", replace_global=False)  # its name
        if tf.strings.length(profile) > 0:
            profile = tf.io.decode_compressed(profile, "ZLIB")
    elif _is_webp(data):
        profile = _find_chunk(data, b"ICCP", start=12, name_first=True)
    else:
        profile = tf.constant(b"")
    return (profile != b"") & ~tf.strings.regex_full_match(profile, r"\C*(sRGB|s\x00R\x00G\x00B)\C*")


# --- Orientation ------------------------------------------------------------------------------------------------


def _find_exif(data):
    """The EXIF data of a JPEG, PNG or WebP file, from the byte order on; empty where there are none."""
    if _is_jpeg(data):
        exif = _find_segment(data, b"\xff\xe1", b"Exif\0\0")
    elif _is_png(data):
        exif = _find_chunk(data, b"eXIf")
    elif _is_webp(data):
        exif = _find_chunk(data, b"EXIF", start=12, name_first=True)
    else:
        exif = tf.constant(b"")
    if tf.strings.substr(exif, 0, 6) == b"Exif\0\0":
        exif = tf.strings.substr(exif, 6, tf.strings.length(exif))
    return exif


def _find_segment(data, marker, beginning):
    """The first segment of a JPEG file that has this marker and beginning, or an empty string."""
    length, position, found = tf.cast(tf.strings.length(data), tf.int64), tf.constant(2, tf.int64), tf.constant(b"")
    while position + 4 <= length and found == b"":
        code = tf.strings.substr(data, position, 2)
        size = _read_number(data, position + 2, 2, big_endian=True)
        content = tf.strings.substr(data, position + 4, tf.maximum(size - 2, 0))
        if code == b"\xff\xda" or tf.strings.substr(code, 0, 1) != b"\xff":  # the pixels begin, or the file is damaged
            position = length
        elif code == b"\xff\xff":  # padding
            position += 1
        elif code == marker and tf.strings.substr(content, 0, len(beginning)) == beginning:
            found = content
        else:
            position += 2 + size
    return found


def _find_chunk(data, name, start=8, name_first=False):
    """The content of the first chunk of this name, or an empty string.

    A PNG file's chunks begin at byte 8: length, name, content, checksum. A WebP file's begin at byte 12: name, length,
    content, padded to an even length.
    """
    length, position, found = tf.cast(tf.strings.length(data), tf.int64), tf.constant(start, tf.int64), tf.constant(b"")
    while position + 8 <= length and found == b"":
        size = _read_number(data, position + (4 if name_first else 0), 4, big_endian=not name_first)
        if tf.strings.substr(data, position + (0 if name_first else 4), 4) == name:
            found = tf.strings.substr(data, position + 8, size)
        position += 8 + size + (size % 2 if name_first else 4)
    return found


def _orientation(exif):
    """How a camera was held, by EXIF's tag 0x0112. string () -> int32 (), 1 to 8; 1 is upright."""
    big_endian = tf.strings.substr(exif, 0, 2) == b"MM"
    exif = tf.strings.join((exif, bytes(8)))  # so that the header of short data can be read
    start = tf.minimum(_read_number(exif, 4, 4, big_endian), tf.cast(tf.strings.length(exif), tf.int64) - 2)
    entries = tf.strings.substr(exif, start + 2, 12 * _read_number(exif, start, 2, big_endian))
    entries = tf.strings.substr(entries, 0, tf.strings.length(entries) // 12 * 12)  # whole ones
    bytes_of_numbers = tf.reshape(tf.cast(tf.io.decode_raw(entries, tf.uint8), tf.int32), (-1, 6, 2))
    numbers = tf.reduce_sum(bytes_of_numbers * tf.where(big_endian, (256, 1), (1, 256)), axis=2)  # (entries, 6)
    tag, kind, _, _, value, _ = tf.unstack(numbers, axis=1)  # (entries,) each
    value = tf.reduce_max(tf.where((tag == 0x0112) & (kind == _SHORT), value, 1))
    return tf.where((1 <= value) & (value <= 8), value, 1)


def _turn_upright(pixels, turned):
    """Undo an EXIF orientation. uint8 (side, side, 3), int32 () -> uint8 (side, side, 3)."""
    one_of = lambda *cases: tf.reduce_any(turned == cases)  # noqa: E731
    pixels = tf.where(turned >= 5, tf.transpose(pixels, (1, 0, 2)), pixels)
    pixels = tf.where(one_of(2, 3, 6, 7), pixels[:, ::-1], pixels)
    return tf.where(one_of(3, 4, 7, 8), pixels[::-1], pixels)


def _read_number(data, position, size, big_endian=False):
    """A whole number of `size` bytes at a position of a string. -> int64 (). Fails where the string is too short."""
    digits = tf.cast(tf.io.decode_raw(tf.strings.substr(data, position, size), tf.uint8), tf.int64)
    digits = tf.where(big_endian, digits[::-1], digits)  # (size,), the lowest first
    return tf.reduce_sum(digits * 256 ** tf.range(size, dtype=tf.int64))
