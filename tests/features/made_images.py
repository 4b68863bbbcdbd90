"""One table of image files as people have them, and the image that a viewer shows of each.

What Pillow cannot write is written byte by byte.
"""

import dataclasses
import functools
import io
import struct
import zlib

import numpy as np
import pillow_heif
from PIL import Image, ImageCms

SIZE = (320, 306)  # pixels, width and height; other than the network's, so that it is resized


@dataclasses.dataclass(frozen=True)
class Made:
    """A file, and what must come of it.

    Attributes:
      data: bytes
      shown: uint8 (height, width) or (height, width, 3), the image that a viewer shows; None where it is refused.
      atol: float, how far the mean of the pixels' differences may be off.
      refusal: str, a regular expression that the line of a refused file matches.
      cut: bool, whether the file lacks its end.
      ending: str, of the file name.
    """

    data: bytes
    shown: np.ndarray | None = None
    atol: float = 0.6
    refusal: str = ""
    cut: bool = False
    ending: str = ".jpg"


@functools.cache
def photograph():
    """A smooth image with some grain, dark at the top, uint8 (height, width, 3)."""
    rng = np.random.default_rng(5)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    smooth = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC)).astype(int)
    lit = smooth * np.linspace(0.3, 1, SIZE[1])[:, np.newaxis, np.newaxis]
    lit += rng.integers(-6, 7, lit.shape)
    lit[:2, :2], lit[-2:, -2:] = 0, 255
    return lit.clip(0, 255).astype(np.uint8)


def grey_photograph():
    return np.asarray(Image.fromarray(photograph()).convert("L"))


def write(pixels, form, **how):
    """Pixels, or a Pillow image, as the bytes of a file."""
    data = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(data, form, **how)
    return data.getvalue()


def png(header, rows, *chunks):
    """A PNG file by hand. header: (bits, colour type); rows: big-endian array (height, ...); chunks: (name, data)."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    start = struct.pack(">IIBBBBB", rows.shape[1], len(rows), *header, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [(b"IHDR", start), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(pixels, bits, kind=1, order="<", photometric=1, more=(), size=SIZE, samples=1):
    """A TIFF file by hand. pixels: bytes; kind: SampleFormat; more: (tag, struct's letter, value) of further tags."""
    types = {"H": 3, "I": 4, "i": 9, "f": 11}
    tags = [(256, "I", size[0]), (257, "I", size[1]), (258, "H", bits), (259, "H", 1), (262, "H", photometric)]
    tags += [(273, "I", 8), (277, "H", samples), (278, "I", size[1]), (279, "I", len(pixels)), (339, "H", kind), *more]
    pixels += bytes(len(pixels) % 2)
    entries = b"".join(
        struct.pack(order + "HHI", tag, types[letter], 1) + struct.pack(order + letter, value).ljust(4, b"\0")
        for tag, letter, value in sorted(tags)
    )
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(pixels))
    return start + pixels + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def pack_12_bits(values):
    """Numbers of 12 bits, two in three bytes. (height, width) -> bytes"""
    first, second = values.reshape(-1, 2).astype(np.uint32).T
    both = first << 12 | second
    return np.stack((both >> 16, both >> 8 & 255, both & 255), 1).astype(np.uint8).tobytes()


# --- Profiles ---------------------------------------------------------------------------------------------------

# The colours of the primaries, as XYZ under D50: columns red, green, blue.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])


def profile(space, name, tags):
    """An ICC profile. space: such as b"RGB "; tags: dict of signature to data."""
    description = b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name.encode() + bytes(79)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", *np.round(np.array([0.9642, 1.0, 0.8249]) * 65536).astype(int))
    tags = {b"desc": description, b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": white} | tags
    table, data, place = b"", b"", 132 + 12 * len(tags)
    for signature, content in tags.items():
        content += bytes(-len(content) % 4)
        table += signature + struct.pack(">II", place + len(data), len(content))
        data += content
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    connection = b"Lab " if space == b"CMYK" else b"XYZ "
    head = bytes(8) + struct.pack(">I", 0x02200000) + kind + space + connection + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061)
    whole = head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data
    return struct.pack(">I", len(whole)) + whole[4:]


def curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IHH", 1, round(gamma * 256), 0)


def rgb_profile(primaries, gamma, name):
    tags = {}
    for letter, column in zip((b"r", b"g", b"b"), primaries.T, strict=True):
        tags[letter + b"XYZ"] = b"XYZ " + bytes(4) + struct.pack(">3i", *np.round(column * 65536).astype(int))
        tags[letter + b"TRC"] = curve(gamma)
    return profile(b"RGB ", name, tags)


def in_space(primaries, gamma):
    """The photograph, a little pale so that every space has its colours, in sRGB and in other primaries: two arrays."""
    pale = (photograph() * 0.5 + 60).astype(np.uint8)  # (height, width, 3)
    unit = pale / 255
    linear = np.where(unit > 0.04045, ((unit + 0.055) / 1.055) ** 2.4, unit / 12.92)
    other = (linear @ SRGB.T @ np.linalg.inv(primaries).T).clip(0, 1)
    return pale, np.round(other ** (1 / gamma) * 255).astype(np.uint8)


def cmyk_profile():
    """A profile whose colours are those of plain arithmetic, but for pure cyan, which is green here."""
    corners = [[inks >> 3 & 1, inks >> 2 & 1, inks >> 1 & 1, inks & 1] for inks in range(16)]
    rgb = [[(1 - ink) * (1 - inks[3]) * 255 for ink in inks[:3]] for inks in corners]
    rgb[0b1000] = [0, 160, 0]
    lab = ImageCms.profileToProfile(
        Image.fromarray(np.array([rgb], np.uint8)), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )  # fmt: skip
    steps = bytes(range(256))
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * steps
    table += (np.asarray(lab) ^ np.uint8([0, 128, 128])).tobytes() + 3 * steps  # Pillow's a and b are signed
    return profile(b"CMYK", "inks", {b"A2B0": table})


# --- The table --------------------------------------------------------------------------------------------------


def exif(orientation=6, kind="H"):
    """EXIF data of one entry: the orientation, as a number ("H"), or as text ("s")."""
    value = struct.pack("<H", orientation).ljust(4, b"\0") if kind == "H" else b"6\0\0\0"
    entry = struct.pack("<HHI", 0x0112, 3 if kind == "H" else 2, 1 if kind == "H" else 2) + value
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)


def with_odd_exif():
    """Files whose EXIF data are broken, or whose orientation is no number."""
    odd = {
        "broken": b"Exif\0\0no TIFF header at all",
        "cut off": exif()[:17],
        "text": exif(kind="s"),
        "of 99": exif(orientation=99),
    }
    for how, data in odd.items():
        for form, more in (("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})):
            name = f"{form}, EXIF {how}" if how in ("broken", "cut off") else f"{form}, orientation {how}"
            yield name, Made(write(photograph(), form, exif=data, **more), photograph(), 2.5)


def cut_jpegs():
    """JPEG files that lack their end."""
    upright = np.rot90(photograph(), -1)
    for name, how in (
        ("", {}),
        ("progressive ", {"progressive": True}),
        ("grey ", {}),
        ("turned ", {"exif": exif()}),
    ):
        pixels = grey_photograph() if name == "grey " else photograph()
        data, shown = write(pixels, "JPEG", quality=88, **how), upright if name == "turned " else pixels
        yield f"{name}JPEG without its last 2 bytes", Made(data[:-2], shown, 3, cut=True)
        yield f"{name}JPEG without its last tenth", Made(data[: len(data) * 9 // 10], shown, 7, cut=True)
        yield f"half a {name}JPEG", Made(data[: len(data) // 2], refusal="cannot be read|ends too early|truncated")


def deep_images():
    """Grey images of more than 8 bits a pixel."""
    grey = grey_photograph()
    flat, wide = grey.astype(np.float32), grey.astype(int) * 257
    odd = flat / 255
    odd[0, :3] = np.nan, np.inf, -np.inf
    shown = grey.copy()
    shown[0, :3] = 0, 255, 0
    deep = np.round(grey * (4095 / 255)).astype(np.uint16)
    files = {
        "TIFF of floats 0..1": write(flat / 255, "TIFF"),
        "TIFF of floats 0..255": write(flat, "TIFF"),
        "TIFF of floats 0..65535": write(flat * 257, "TIFF"),
        "TIFF of floats -1..1": write(flat / 127.5 - 1, "TIFF"),
        "TIFF of floats 0..1, big-endian": tiff((flat / 255).astype(">f4").tobytes(), 32, 3, ">"),
        "TIFF of floats 0..1000, declared": tiff(
            (flat * (1000 / 255)).tobytes(), 32, 3, more=[(340, "f", 0.0), (341, "f", 1000.0)]
        ),
        "TIFF of 12 bits, packed": tiff(pack_12_bits(deep), 12),
        "TIFF of 12 bits in 16": write(deep, "TIFF"),
        "TIFF of 10 bits in 16, declared": tiff(
            np.round(grey * (1023 / 255)).astype("<u2").tobytes(), 16, more=[(281, "H", 1023)]
        ),
        "PNG of 12 bits in 16, sBIT": png((16, 0), deep.astype(">u2"), (b"sBIT", b"\x0c")),
        "PNG of 12 bits in 16": write(deep, "PNG"),
        "PNG of 16 bits, sBIT 12": png((16, 0), wide.astype(">u2"), (b"sBIT", b"\x0c")),
        "PNG of 16 bits": write(wide.astype(np.uint16), "PNG"),
        "PNG of 8 bits in 16": write(grey.astype(np.uint16), "PNG"),
        "TIFF of 16 bits": write(wide.astype(np.uint16), "TIFF"),
        "TIFF of 16 bits, big-endian": tiff(wide.astype(">u2").tobytes(), 16, order=">"),
        "TIFF of 16 bits, white is 0": tiff((65535 - wide).astype("<u2").tobytes(), 16, photometric=0),
        "TIFF of signed 16 bits": tiff((wide - 32768).astype("<i2").tobytes(), 16, 2),
        "TIFF of int32 0..255": write(grey.astype(np.int32), "TIFF"),
        "TIFF of int32 0..65535": write(grey.astype(np.int32) * 257, "TIFF"),
        "TIFF of uint32, whole range": tiff((grey.astype("<u4") * 16843009).tobytes(), 32),
    }
    for name, data in files.items():
        yield name, Made(data, grey, 1.1)
    yield "TIFF of floats with NaN and inf", Made(write(odd, "TIFF"), shown, 1.1)
    for name, value in (("zero", 0), ("constant 0.5", 0.5)):
        data = write(np.full((20, 30), value, np.float32), "TIFF")
        yield f"TIFF of floats, {name}", Made(data, np.full((20, 30), int(255 * value), np.uint8))
    yield (
        "PNG of 16 bits, constant",
        Made(write(np.full((20, 30), 25700, np.uint16), "PNG"), np.full((20, 30), 100, np.uint8)),
    )


def other_kinds():
    """Modes, frames and formats."""
    colour, grey = photograph(), grey_photograph()
    image, wide = Image.fromarray(colour), colour.astype(">u2") * 257
    alpha = Image.fromarray(np.where(np.indices(grey.shape)[1] < 100, 0, 255).astype(np.uint8))
    on_white = colour.copy()
    on_white[:, :100] = 255
    yield "PNG, RGB of 16 bits", Made(png((16, 2), wide), colour)
    yield (
        "TIFF, RGB of 16 bits",
        Made(tiff((colour.astype("<u2") * 257).tobytes(), 16, photometric=2, samples=3), colour),
    )
    yield (
        "PNG of grey with alpha",
        Made(write(Image.merge("LA", (image.convert("L"), alpha)), "PNG"), np.where(np.asarray(alpha) > 0, grey, 255)),
    )
    with_alpha = image.copy()
    with_alpha.putalpha(alpha)
    table = with_alpha.quantize(256)
    flat = Image.alpha_composite(Image.new("RGBA", SIZE, "white"), table.convert("RGBA")).convert("RGB")
    yield "PNG, palette with alpha", Made(write(table, "PNG"), np.asarray(flat))
    yield "bilevel TIFF", Made(write(image.convert("1"), "TIFF"), np.asarray(image.convert("1").convert("L")))
    others = [Image.fromarray(255 - colour), Image.fromarray(colour[::-1].copy())]
    frames = {"save_all": True, "append_images": others}
    yield "animated GIF", Made(write(image, "GIF", **frames), colour, 8)
    yield "animated PNG", Made(write(image, "PNG", **frames), colour)
    yield "animated WebP", Made(write(image, "WEBP", lossless=True, **frames), colour, 2)
    yield "TIFF of several pages", Made(write(image, "TIFF", **frames), colour)
    yield "MPO burst", Made(write(image, "MPO", quality=95, **frames), colour, 3)
    burst = io.BytesIO()
    heif = pillow_heif.from_pillow(image)
    for other in others:
        heif.add_from_pillow(other)
    heif.save(burst, quality=95)
    yield "HEIC burst", Made(burst.getvalue(), colour, 4)
    yield "AVIF", Made(write(image, "AVIF", quality=95), colour, 4)
    for start in (b"\xff\x0a\x7f\x16", b"\0\0\0\x0cJXL \r\n\x87\n"):
        yield f"JPEG XL ({start[:1].hex()})", Made(start + bytes(99), refusal="JPEG XL is not read", ending=".jxl")
    small = {"bits": 8, "photometric": 2, "samples": 3, "size": (8, 6)}
    thumbnail = tiff(bytes(8 * 6 * 3), more=[(50706, "I", 0x0401)], **small)
    yield "camera raw, DNG", Made(thumbnail, refusal=r"raw file \(DNG\)", ending=".tif")
    yield "camera raw, NEF", Made(tiff(bytes(8 * 6 * 3), **small), refusal=r"raw file \(NEF\)", ending=".NEF")
    yield "camera raw, CR2", Made(b"II*\0\x10\0\0\0CR\x02\0" + bytes(99), refusal=r"raw file \(CR2\)", ending=".cr2")
    yield "camera raw, CR3", Made(b"\0\0\0\x18ftypcrx " + bytes(99), refusal=r"raw file \(CR3\)", ending=".cr3")


def coloured_images():
    """Inks, Lab and profiles."""
    colour, grey = photograph(), grey_photograph()
    image = Image.fromarray(colour)
    inks = image.convert("CMYK")
    yield "CMYK JPEG, as Adobe writes it", Made(write(inks, "JPEG", quality=95), colour, 3)
    light, blue, red = Image.merge("RGB", inks.split()[:3]).convert("YCbCr").split()
    stored = [channel.point(lambda value: 255 - value) for channel in (light, blue, red)]
    data = write(Image.merge("CMYK", (*stored, inks.getchannel("K"))), "JPEG", quality=95)
    place = data.index(b"Adobe") + 11
    yield "YCCK JPEG, as Adobe writes it", Made(data[:place] + b"\x02" + data[place + 1 :], colour, 4)
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    yield "Lab TIFF", Made(write(lab, "TIFF"), colour, 1.5)
    for name, primaries in (("Display P3", DISPLAY_P3), ("Adobe RGB", ADOBE_RGB)):
        shown, pixels = in_space(primaries, 2.2)
        icc = rgb_profile(primaries, 2.2, name)
        for form, how in (
            ("JPEG", {"quality": 97, "subsampling": 0}),
            ("PNG", {}),
            ("WEBP", {"lossless": True}),
            ("TIFF", {}),
        ):
            yield f"{form} in {name}", Made(write(pixels, form, icc_profile=icc, **how), shown, 2)
    burst = io.BytesIO()
    phone = Image.fromarray(pixels)
    phone.info["icc_profile"] = icc
    pillow_heif.from_pillow(phone).save(burst, quality=97)
    yield f"HEIC in {name}", Made(burst.getvalue(), shown, 3)
    phone.putalpha(255)
    yield f"PNG with alpha in {name}", Made(write(phone, "PNG", icc_profile=icc), shown, 2)
    yield (
        "PNG that says sRGB",
        Made(write(image, "PNG", icc_profile=rgb_profile(ADOBE_RGB, 2.2, "a camera's sRGB")), colour, 0),
    )
    same = rgb_profile(SRGB, 2.2, "c2")
    yield "PNG in Adobe RGB, profile cut off", Made(write(image, "PNG", icc_profile=icc[:300]), colour, 0)
    yield "PNG, profile broken", Made(write(image, "PNG", icc_profile=b"no profile"), colour, 0)
    yield "CMYK JPEG with an RGB profile", Made(write(inks, "JPEG", quality=95, icc_profile=same), colour, 3)
    linear = np.round(255 * (grey / 255) ** 1.9).astype(np.uint8)
    icc = profile(b"GRAY", "dots", {b"kTRC": curve(1.158)})  # 2.2 / 1.9
    yield "grey PNG with a profile", Made(write(linear, "PNG", icc_profile=icc), grey, 5)
    cyan = Image.new("CMYK", (30, 20), (255, 0, 0, 0))
    shown = np.full((20, 30, 3), (0, 160, 0), np.uint8)
    yield "CMYK JPEG with a profile", Made(write(cyan, "JPEG", quality=95, icc_profile=cmyk_profile()), shown, 4)


@functools.cache
def table():
    """dict of the name of a kind of file to Made."""
    made = {}
    for group in (with_odd_exif, cut_jpegs, deep_images, other_kinds, coloured_images):
        made |= dict(group())
    return made
