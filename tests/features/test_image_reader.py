import re
import threading

import made_images
import numpy as np
import pytest
from PIL import Image
from test_image_files import pillow_set_up

from captioning.attention.page import _read_image
from captioning.features import image_reader
from captioning.features.image_files import load_image
from strategies import check_one_line


def as_network_sees(shown):
    """An image that a viewer shows, resized: uint8 (height, width) or (height, width, 3) -> int (299, 299, 3)."""
    image = Image.fromarray(shown).convert("RGB").resize((299, 299), Image.Resampling.BILINEAR)
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", made_images.table())
def test_a_file_is_read_as_viewers_show_it(tmp_path, name):
    made, cut = made_images.table()[name], []
    path = tmp_path / f"a{made.ending}"
    path.write_bytes(made.data)
    with pillow_set_up():
        if made.shown is None:
            with pytest.raises(ValueError, match=made.refusal) as raised:
                load_image(path, 299, cut)
            check_one_line(raised.value)
            assert cut == []
            return
        pixels = load_image(path, 299, cut)
        _, size, problem = _read_image(path)  # of the page
    assert (pixels.shape, pixels.dtype) == ((299, 299, 3), np.uint8)
    assert np.abs(pixels - as_network_sees(made.shown)).mean() <= made.atol
    assert cut == [path] * made.cut
    assert problem == "" and size == made.shown.shape[1::-1]


def test_numbers_of_16_bits_are_scaled_as_ever():
    """By 257, and cut off."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    scaled = np.asarray(image_reader._to_8_bits(Image.fromarray(values), None))
    assert (scaled == values // 257).all()


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((0, 0.6, 1.2), (0, 127, 255)),  # beyond 1, as resizing leaves it
        ((0, 2.0, 8.0), (0, 63, 255)),
        ((0, 0.0005, 0.001), (0, 0, 0)),
        ((-5.0, 0, 260.0), (0, 0, 255)),
        ((np.nan, np.nan, np.nan), (0, 0, 0)),
        ((np.inf, 1.0, -np.inf), (255, 255, 0)),
        ((-1000.0, 0.0, 1000.0), (0, 127, 255)),
        ((-3.0, -3.0, -3.0), (0, 0, 0)),
    ],
)
def test_floats_without_a_range(numbers, expected):
    image = Image.fromarray(np.float32([numbers]))
    pixels = np.asarray(image_reader._to_8_bits(image, None))[0]
    np.testing.assert_allclose(pixels.astype(int), expected, atol=43 if numbers[2] == 1.2 else 0)


def test_the_largest_of_other_whole_numbers_is_white():
    image = Image.fromarray(np.int32([[0, 50_000, 100_000]]))
    assert np.asarray(image_reader._to_8_bits(image, None)).tolist() == [[0, 127, 255]]


@pytest.mark.parametrize("data", [b"", b"\x00", bytes(500), b"acsp" * 100])
def test_a_profile_of_nonsense_changes_nothing(data):
    image = Image.fromarray(made_images.photograph())
    image.info["icc_profile"] = data
    assert image_reader._to_srgb(image) is image


def test_many_threads_convert_colours_at_once(tmp_path):
    """As those do that read batches."""
    shown, pixels = made_images.in_space(made_images.ADOBE_RGB, 2.2)
    icc = made_images.rgb_profile(made_images.ADOBE_RGB, 2.2, "Adobe RGB")
    (tmp_path / "a.png").write_bytes(made_images.write(pixels, "PNG", icc_profile=icc))
    results = []
    read = lambda: results.append(load_image(tmp_path / "a.png", 299))  # noqa: E731
    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all((result == results[0]).all() for result in results)
    assert np.abs(results[0] - as_network_sees(shown)).mean() < 1


@pytest.mark.parametrize(("share", "used"), [(0.96, True), (0.85, False)])
def test_nine_tenths_of_a_jpegs_rows_must_be_there(tmp_path, share, used):
    """The file is even all over, so its bytes are spread as its rows are."""
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1600), np.uint8)
    data = made_images.write(noise, "JPEG", quality=30)
    (tmp_path / "a.jpg").write_bytes(data[: int(share * len(data))])
    if used:
        assert load_image(tmp_path / "a.jpg", 299).shape == (299, 299, 3)
        return
    with pytest.raises(ValueError, match="ends too early") as raised:
        load_image(tmp_path / "a.jpg", 299)
    there = int(re.search(r"(\d+) % of its rows", str(raised.value))[1])
    assert abs(there - 100 * share) < 3


def test_where_pillow_lacks_littlecms_colours_stay(monkeypatch):
    def lacking(*args):
        raise ImportError("no LittleCMS")

    image_reader._find_transform.cache_clear()
    monkeypatch.setattr(image_reader.ImageCms, "ImageCmsProfile", lacking)
    assert image_reader._find_transform(b"a profile", False, False) == (None, None)
    image_reader._find_transform.cache_clear()
