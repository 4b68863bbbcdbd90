import contextlib
import io
import os
import pathlib
import resource
import struct
import tempfile
import warnings
import zlib

import numpy as np
import pillow_heif
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioning.features.image_files import load_image, set_up_pillow
from captioning.features.image_reader import upright_rgb
from strategies import check_one_line, rarely
from support.file_states import find_stat, read_state


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
    pixels = load_image(make(tmp_path), 299)
    assert pixels.shape == (299, 299, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.mean((0, 1)), RED, atol=8)


def test_grey_16_bit_and_transparent_images_keep_their_brightness(tmp_path):
    grey = save(Image.new("L", (50, 50), 100), tmp_path / "grey.png")
    deep = save(Image.fromarray(np.full((50, 50), 100 * 257, np.uint16)), tmp_path / "deep.png")
    clear = save(Image.new("RGBA", (50, 50), (0, 0, 0, 0)), tmp_path / "clear.png")
    for path, value in ((grey, 100), (deep, 100), (clear, 255)):
        np.testing.assert_allclose(load_image(path, 299), value, atol=1)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make, soon):
    """A named pipe that nobody writes to would be waited for."""
    make(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="x.jpg cannot be read as an image .*no regular file"):
        load_image(tmp_path / "x.jpg", 299)
    assert find_stat(tmp_path / "x.jpg") is None and read_state(tmp_path / "x.jpg") is None


def test_no_order_in_a_name_is_in_the_line_that_says_why(tmp_path):
    with pytest.raises(ValueError) as raised:
        load_image(tmp_path / "a\x1b[31m\nb\udce9.jpg", 299)
    assert str(raised.value).isprintable() and r"a\x1b[31m\nb\udce9.jpg cannot be read" in str(raised.value)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (400, 200), RED)
    image.paste((20, 20, 220), (0, 0, 200, 200))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right: blue on top
    pixels = load_image(save(image, tmp_path / "a.jpg", exif=exif), 299).astype(int)
    assert (pixels[20, :, 2] > pixels[20, :, 0]).all()
    assert (pixels[-20, :, 0] > pixels[-20, :, 2]).all()


def test_only_the_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.new("RGB", (50, 50), colour) for colour in (RED, (20, 20, 220), (20, 220, 20))]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(load_image(path, 299).mean((0, 1)), RED, atol=8)


@contextlib.contextmanager
def pillow_set_up():
    """Inside the block Pillow is as the scripts set it up."""
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_up_pillow()
        yield
    Image.MAX_IMAGE_PIXELS = limit


@pytest.fixture
def pillow():
    with pillow_set_up():
        yield


def png_header(width, height):
    """A PNG file of 1 kB whose data are cut off, which decoding would complain of."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # 1 bit a pixel
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1_000_000)))


def gif_header(width, height):
    """A GIF file whose frame is to be cleared after it was shown: Pillow makes room for that as it opens the file."""
    control, frame = b"\x21\xf9\x04\x08\0\0\0\0", struct.pack("<HHHHB", 0, 0, width, height, 0)
    start = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return start + control + b"," + frame + b"\x02\x02\x44\x01\0;"


def jpeg_header(width, height):
    """A progressive JPEG file, all of whose pixels have room in the memory before the first one is decoded."""
    data = io.BytesIO()
    Image.new("RGB", (64, 64)).save(data, "JPEG", progressive=True, subsampling=0)
    data = bytearray(data.getvalue())
    place = data.index(b"\xff\xc2") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def ppm_header(width, height):
    return b"P6 %d %d 255\n" % (width, height)


def bmp_header(width, height):
    """A BMP file of 1 bit a pixel."""
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 1, 0, 0, 0, 0, 2, 0)
    return b"BM" + struct.pack("<IHHI", 62, 0, 0, 62) + info + bytes(8)


def test_an_image_of_20000_by_20000_pixels_is_refused_before_it_is_decoded(tmp_path, pillow):
    (tmp_path / "a.png").write_bytes(png_header(20_000, 20_000))
    with pytest.raises(ValueError, match="a.png cannot be read .*400000000 pixels"):
        load_image(tmp_path / "a.png", 299)


@pytest.mark.parametrize(
    "data",
    [
        png_header(12_000, 9_000),
        png_header(2**31 - 1, 2**31 - 1),
        gif_header(65_000, 65_000),
        gif_header(12_000, 9_000),
        jpeg_header(65_000, 65_000),
        jpeg_header(17_000, 15_000),
        ppm_header(12_000, 9_000),
        ppm_header(10**9, 10**9),
        bmp_header(12_000, 9_000),
        bmp_header(2**31 - 1, -(2**31) + 1),
    ],
)
def test_a_file_that_would_fill_the_memory_is_refused_in_one_line(tmp_path, pillow, data):
    """Most of them are smaller than a kB. What a test takes at the most is what the whole process takes."""
    (tmp_path / "a.jpg").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="a.jpg cannot be read as an image") as raised:
        load_image(tmp_path / "a.jpg", 299)
    check_one_line(raised.value)
    assert "pixels" in str(raised.value) or "too large" in str(raised.value).lower()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200e6


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A photograph of 108 megapixels, dark on the left: as a JPEG file and as a PNG file."""
    folder = tmp_path_factory.mktemp("large")
    image = Image.new("L", (12_000, 9_000), 200)
    image.paste(50, (0, 0, 6_000, 9_000))
    return save(image, folder / "a.jpg"), save(image, folder / "a.png", compress_level=1)


@pytest.mark.slow
def test_a_jpeg_file_of_108_megapixels_is_decoded_small(large, pillow):
    jpeg, _ = large
    pixels = load_image(jpeg, 299)
    assert pixels.shape == (299, 299, 3)
    np.testing.assert_allclose(pixels[:, :140], 50, atol=4)
    np.testing.assert_allclose(pixels[:, 160:], 200, atol=4)
    with Image.open(jpeg) as image:
        assert upright_rgb(image, 299).size == (1500, 1125)


@pytest.mark.slow
def test_a_png_file_of_108_megapixels_is_refused_in_one_line(large, pillow):
    _, png = large
    with pytest.raises(ValueError, match="a.png cannot be read .*12000 x 9000 pixels are more than 100000000"):
        load_image(png, 299)


def test_setting_up_pillow_twice_is_setting_it_up_once(pillow):
    limit, endings = Image.MAX_IMAGE_PIXELS, Image.registered_extensions()
    set_up_pillow()
    assert (limit, endings) == (Image.MAX_IMAGE_PIXELS, Image.registered_extensions())


@pytest.mark.parametrize("form", ["HEIF", "AVIF"])
def test_photographs_of_phones_load(tmp_path, pillow, form):
    image = Image.new("RGB", (400, 300), RED)
    image.paste((20, 20, 220), (0, 0, 200, 300))
    pixels = load_image(save(image, tmp_path / "a.heic", format=form), 299).astype(int)
    assert pixels.shape == (299, 299, 3)
    np.testing.assert_allclose(pixels[:, :140].mean((0, 1)), (20, 20, 220), atol=12)
    np.testing.assert_allclose(pixels[:, 160:].mean((0, 1)), RED, atol=12)


def test_a_heic_photograph_is_turned_upright(tmp_path, pillow):
    image = Image.new("RGB", (400, 200), RED)
    image.paste((20, 20, 220), (0, 0, 200, 200))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right: blue on top
    pixels = load_image(save(image, tmp_path / "a.heic", format="HEIF", exif=exif.tobytes()), 299).astype(int)
    assert (pixels[20, :, 2] > pixels[20, :, 0]).all()
    assert (pixels[-20, :, 0] > pixels[-20, :, 2]).all()


@pytest.mark.parametrize("change", ["cut", "zeros", "header"])
def test_a_damaged_heic_file_is_named(tmp_path, pillow, change):
    data = save(Image.new("RGB", (400, 300), RED), tmp_path / "a.heic", format="HEIF").read_bytes()
    damaged = {"cut": data[: len(data) // 2], "zeros": data[:40] + bytes(len(data) - 40), "header": data[:24]}[change]
    (tmp_path / "a.heic").write_bytes(damaged)
    with pytest.raises(ValueError, match="a.heic cannot be read") as raised:
        load_image(tmp_path / "a.heic", 299)
    check_one_line(raised.value)


@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xd8\xff\xe0 broken"])
def test_what_is_no_image_is_named(tmp_path, data):
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="bad.jpg cannot be read"):
        load_image(path, 299)


def test_postscript_is_not_run(tmp_path):
    with pytest.raises(ValueError, match="PostScript is a program"):
        load_image(save(Image.new("RGB", (50, 50), RED), tmp_path / "a.jpg", format="EPS"), 299)


def test_a_large_jpeg_file_is_decoded_at_a_fraction_of_its_size(tmp_path):
    path = save(Image.new("RGB", (4000, 2400), RED), tmp_path / "a.jpg")
    with Image.open(path) as image:
        assert upright_rgb(image, 299).size == (500, 300)
    with Image.open(path) as image:
        assert upright_rgb(image, 1000).size == (2000, 1200)


def draw_images():
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
    images = []
    for image, form, how in kinds:
        data = io.BytesIO()
        image.save(data, form, **how)
        images.append(data.getvalue())
    data = io.BytesIO()
    pillow_heif.from_pillow(noise).save(data)
    return [*images, data.getvalue()]


IMAGES = draw_images()


@st.composite
def damaged_images(draw):
    """The bytes of a real image file with bits flipped, ranges zeroed, cut out or copied, or its end cut off; or of
    no image file."""
    if rarely(draw):
        return draw(st.binary())
    data = bytearray(draw(st.sampled_from(IMAGES)))
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
    with tempfile.TemporaryDirectory() as folder, pillow_set_up():
        path = pathlib.Path(folder, "a.jpg")
        path.write_bytes(data)
        try:
            pixels = load_image(path, 299)
        except ValueError as error:
            check_one_line(error)
            assert str(error).startswith(f"{path} cannot be read as an image")
        else:
            assert (pixels.shape, pixels.dtype) == ((299, 299, 3), np.uint8)


@pytest.mark.slow
@given(damaged_images())
def test_any_bytes_are_an_image_or_one_line(data):
    check_image(data)
