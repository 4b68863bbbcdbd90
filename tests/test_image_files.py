import io
import pathlib
import struct
import tempfile
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioning.image_files import load_image, upright_rgb
from strategies import check_one_line, rarely


def save(image, path, **how):
    image.save(path, **how)
    return path


RED = (220, 20, 20)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: save(Image.new("RGB", (400, 300), RED), folder / "a.jpg"),
        lambda folder: save(Image.new("RGB", (3, 500), RED), folder / "a.png"),
        lambda folder: save(Image.new("RGB", (1, 1), RED), folder / "a.jpg"),
        lambda folder: save(Image.new("RGB", (1, 5000), RED), folder / "a.jpg"),
        lambda folder: save(Image.new("RGB", (5000, 1), RED), folder / "a.png"),
        lambda folder: save(Image.new("RGB", (50, 50), RED), folder / "jpeg_inside.png", format="JPEG"),
        lambda folder: save(Image.new("RGB", (50, 50), RED).convert("CMYK"), folder / "a.jpg"),
        lambda folder: save(Image.new("RGB", (50, 50), RED).convert("P"), folder / "a.png"),
        lambda folder: save(Image.new("RGB", (50, 50), RED), folder / "png_inside.jpg", format="PNG"),
        lambda folder: save(Image.new("RGB", (50, 50), RED), folder / "a.gif", save_all=True),
        lambda folder: save(Image.new("RGBA", (50, 50), (*RED, 255)), folder / "a.webp", lossless=True),
    ],
)
def test_images_of_every_kind_load(tmp_path, make):
    pixels = load_image(make(tmp_path))
    assert pixels.shape == (299, 299, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.mean((0, 1)), RED, atol=8)


def test_grey_16_bit_and_transparent_images_keep_their_brightness(tmp_path):
    grey = save(Image.new("L", (50, 50), 100), tmp_path / "grey.png")
    deep = save(Image.fromarray(np.full((50, 50), 100 * 257, np.uint16)), tmp_path / "deep.png")
    clear = save(Image.new("RGBA", (50, 50), (0, 0, 0, 0)), tmp_path / "clear.png")
    for path, value in ((grey, 100), (deep, 100), (clear, 255)):
        np.testing.assert_allclose(load_image(path), value, atol=1)


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (400, 200), RED)
    picture.paste((20, 20, 220), (0, 0, 200, 200))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right: blue on top
    pixels = load_image(save(picture, tmp_path / "a.jpg", exif=exif)).astype(int)
    assert (pixels[20, :, 2] > pixels[20, :, 0]).all()
    assert (pixels[-20, :, 0] > pixels[-20, :, 2]).all()


def test_only_the_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.new("RGB", (50, 50), colour) for colour in (RED, (20, 20, 220), (20, 220, 20))]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(load_image(path).mean((0, 1)), RED, atol=8)


def test_an_image_of_20000_by_20000_pixels_is_refused_before_it_is_decoded(tmp_path):
    """A PNG file of 1 kB, which would take 400 MB; its data are cut off, which decoding would complain of."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)  # 1 bit a pixel
    data = zlib.compress(bytes(1_000_000))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data))
    with pytest.raises(ValueError, match="a.png cannot be read .*400000000 pixels"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xd8\xff\xe0 broken"])
def test_what_is_no_image_is_named(tmp_path, data):
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="bad.jpg cannot be read"):
        load_image(path)


def test_postscript_is_not_run(tmp_path):
    with pytest.raises(ValueError, match="PostScript is a program"):
        load_image(save(Image.new("RGB", (50, 50), RED), tmp_path / "a.jpg", format="EPS"))


def test_a_large_jpeg_file_is_decoded_at_a_fraction_of_its_size(tmp_path):
    path = save(Image.new("RGB", (4000, 2400), RED), tmp_path / "a.jpg")
    with Image.open(path) as image:
        assert upright_rgb(image).size == (500, 300)
    with Image.open(path) as image:
        assert upright_rgb(image, 1000).size == (2000, 1200)


def draw_pictures():
    """Small image files of every usual format and number type, as bytes."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 40, 3), np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (24, 40), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        (noise, "JPEG", {"exif": exif}),
        (noise, "JPEG", {"progressive": True}),
        (noise.convert("CMYK"), "JPEG", {}),
    ]
    kinds += [
        (noise, "PNG", {}),
        (noise.convert("RGBA"), "PNG", {}),
        (deep, "PNG", {}),
        (noise.convert("P"), "PNG", {}),
    ]
    kinds += [(noise, "GIF", {"save_all": True, "append_images": [noise.rotate(90)]}), (noise, "WEBP", {})]
    kinds += [(noise, "TIFF", {}), (deep, "TIFF", {}), (noise, "TIFF", {"compression": "tiff_lzw"}), (noise, "BMP", {})]
    kinds += [(noise, "PPM", {}), (noise, "ICO", {}), (noise, "JPEG2000", {}), (noise, "AVIF", {}), (noise, "EPS", {})]
    pictures = []
    for image, form, how in kinds:
        data = io.BytesIO()
        image.save(data, form, **how)
        pictures.append(data.getvalue())
    return pictures


PICTURES = draw_pictures()


@st.composite
def damaged_images(draw):
    """The bytes of a real image file with bits flipped, ranges zeroed, cut out or copied, or its end cut off; or of
    no image file."""
    if rarely(draw):
        return draw(st.binary())
    data = bytearray(draw(st.sampled_from(PICTURES)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        stop = start + draw(st.integers(1, 64))
        match draw(st.sampled_from(["flip", "zero", "cut", "copy", "write", "end"])):
            case "flip":
                data[start : start + 1] = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in data[start : start + 1])
            case "zero":
                data[start:stop] = bytes(len(data[start:stop]))
            case "cut":
                del data[start:stop]
            case "copy":
                data[start:start] = data[draw(st.integers(0, len(data))) :][: stop - start]
            case "write":
                data[start : start + 4] = draw(st.binary(min_size=4, max_size=4))
            case "end":
                del data[start:]
    return bytes(data)


def check_image(data):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # as the scripts do
        path = pathlib.Path(folder, "a.jpg")
        path.write_bytes(data)
        try:
            pixels = load_image(path)
        except ValueError as error:
            check_one_line(error)
            assert str(error).startswith(f"{path} cannot be read as an image")
        else:
            assert (pixels.shape, pixels.dtype) == ((299, 299, 3), np.uint8)


@pytest.mark.slow
@given(damaged_images())
def test_any_bytes_are_an_image_or_one_line(data):
    check_image(data)
