import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import made_images
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from captioning.captioner import caption_batch
from captioning.export import graph_images
from captioning.export.graph_images import _decode_image
from captioning.export.saved_model import decode_captions, export_captioner, new_folder
from captioning.features import image_reader
from captioning.features.cache import ImageToCaption
from captioning.features.cnn import CNNS
from captioning.features.extraction import extract_features
from captioning.features.image_files import load_image
from captioning.features.network import extraction_graphs, feature_network
from captioning.settings import make_config
from captioning.vocabulary import END, PAD
from captioning.words import join_words
from conftest import write_coco
from support.errors import UserError
from support.process import release_memory
from tiny_captioner import MIXED, SIZES, colour_network, tiny_captioner

ROOT = pathlib.Path(__file__).parent.parent.parent

# Pillow's mode and size of an image; one of 299 x 299 without loss is the same to the last bit for Pillow and
# TensorFlow, in the others a pixel is off by one or two of 255.
SAME = {
    "colour.png": ("RGB", (299, 299)),
    "grey.png": ("L", (299, 299)),
    "alpha.png": ("RGBA", (299, 299)),
    "palette.png": ("P", (299, 299)),
    "palette.gif": ("P", (299, 299)),
    "colour.bmp": ("RGB", (299, 299)),
}
NEAR = {
    "large.png": ("RGB", (640, 480)),
    "grey_alpha.png": ("LA", (200, 350)),
    "colour.jpg": ("RGB", (640, 480)),
    "grey.jpg": ("L", (400, 300)),
    "cmyk.jpg": ("CMYK", (300, 640)),
    "half.jpg": ("RGB", (650, 900)),
    "quarter.jpg": ("L", (1500, 1300)),
    "eighth.jpg": ("RGB", (3000, 2400)),
}

CAPTIONED = ("colour.png", "grey.png", "alpha.png", "palette.gif", "large.png", "colour.jpg", "grey.jpg", "half.jpg")

# All that another program needs.
PROGRAM = """
import json, sys
import tensorflow as tf
caption = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
answer = caption(images=tf.constant([open(path, "rb").read() for path in sys.argv[2:]]))
answer = {name: value.numpy().tolist() for name, value in answer.items()}
answer["captions"] = [text.decode() for text in answer["captions"]]
answer["statuses"] = [text.decode() for text in answer["statuses"]]
print(json.dumps({**answer, "modules": list(sys.modules)}))
"""


def draw(folder, name, mode, size):
    """A smooth image with some grain, another for each name, with some of every colour and opacity."""
    rng = np.random.default_rng(list(name.encode()))
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 4 if "A" in mode else 3), np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
    grain = rng.integers(-30, 31, smooth.shape)
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).convert(mode).save(folder / name)
    return folder / name


@pytest.mark.slow
def test_a_fresh_process_gets_the_same_captions_from_the_bytes_alone(tmp_path):
    write_coco(tmp_path / "coco", count=8)
    paths = [draw(tmp_path, name, *(SAME | NEAR)[name]) for name in CAPTIONED]
    config = make_config(
        {
            "data_dir": str(tmp_path / "data"),
            "inception_weights": "random",
            "extract_precision": "bfloat16",
            **SIZES,
            "max_words": 9,
        }
    )
    exact = dataclasses.replace(config, extract_precision="float32")
    calibration = sorted((tmp_path / "coco" / "train2014").iterdir())
    network = feature_network(exact, tmp_path / "statistics.npz", calibration)
    ((_, features, _),) = extract_features(network, CNNS[config.cnn], paths, len(paths))
    captioner = tiny_captioner(config, features, seed=22)  # whose captions a pixel off by one does not change
    images = [ImageToCaption(path, str(path)) for path in paths]
    expected = caption_batch(captioner, images, features, config)
    assert len({caption.caption for caption in expected}) > len(paths) / 2
    assert len({len(caption.words) for caption in expected}) > 2

    with extraction_graphs(config):  # this process's, not the model's
        export_captioner(captioner, network, config, tmp_path / "deep" / "exported")
    assert sorted(os.listdir(tmp_path / "deep")) == [".exported.export.lock", "exported"]

    del network
    release_memory()  # as the other process takes as much
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", PROGRAM, tmp_path / "deep" / "exported", *paths]
    run = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    ours = {path.stem for path in ROOT.glob("*.py")} | {"captioning", "support"}
    assert "model" in ours and not ours & {name.partition(".")[0] for name in answer["modules"]}
    assert answer["captions"] == [caption.caption for caption in expected]
    for caption, log_probability, weights in zip(
        expected, answer["log_probabilities"], answer["attention_weights"], strict=True
    ):
        same = caption.path.name in SAME
        assert log_probability == pytest.approx(caption.log_probability, abs=1e-2 if same else 0.5)
        assert np.shape(weights)[1] == 64
        own = weights[: len(caption.words)]
        np.testing.assert_allclose(own, caption.attention_weights, atol=1e-3 if same else 0.1)


def test_the_limits_of_pixels_are_those_of_the_scripts():
    """Pillow's own, 89 megapixels, is another."""
    for name in ("MOST_PIXELS", "MOST_FILE_PIXELS"):
        assert getattr(graph_images, name) == getattr(image_reader, name)


def encoded(kind, width, height):
    data = io.BytesIO()
    Image.new("L", (width, height)).save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize(
    ("kind", "limits", "status"),
    [  # (of an image as it is decoded, of any file), in pixels; a JPEG file is decoded at a fourth
        ("PNG", (1200 * 1300 - 1, 10**7), "too large"),
        ("PNG", (1200 * 1300, 10**7), "ok"),
        ("PNG", (10**7, 1200 * 1300 - 1), "too large"),
        ("JPEG", (300 * 325, 1200 * 1300), "ok"),
        ("JPEG", (300 * 325 - 1, 1200 * 1300), "too large"),
        ("JPEG", (300 * 325, 1200 * 1300 - 1), "too large"),
    ],
)
def test_an_image_is_too_large_where_it_is_for_the_scripts(tmp_path, monkeypatch, kind, limits, status):
    for module in (graph_images, image_reader):
        monkeypatch.setattr(module, "MOST_PIXELS", limits[0])
        monkeypatch.setattr(module, "MOST_FILE_PIXELS", limits[1])
    data = encoded(kind, 1200, 1300)
    read = tf.function(lambda data: graph_images._read_image(data, 299))  # traced with these limits
    _, found = read(tf.constant(data))
    assert found.numpy().decode() == status
    (tmp_path / "a").write_bytes(data)
    with contextlib.nullcontext() if status == "ok" else pytest.raises(ValueError, match="pixels are more than"):
        load_image(tmp_path / "a", 299)


decode_in_graph = tf.function(lambda data: _decode_image(data, 299))
read_in_graph = tf.function(lambda data: graph_images._read_image(data, 299))


@pytest.mark.parametrize("name", SAME | NEAR)
def test_images_are_decoded_as_for_the_features(tmp_path, name):
    path = draw(tmp_path, name, *(SAME | NEAR)[name])
    decoded = decode_in_graph(tf.constant(path.read_bytes()))
    assert decoded.dtype == tf.uint8
    difference = np.abs(decoded.numpy().astype(int) - load_image(path, 299))  # (299, 299, 3)
    assert difference.max() <= (0 if name in SAME else 3)
    assert difference.mean() < 0.5


@pytest.mark.parametrize(
    "name", [name for name in made_images.table() if not re.search("HEIC|AVIF|TIFF|JPEG XL|raw|EXIF cut|of 99", name)]
)
def test_files_as_people_have_them_are_read_as_by_the_scripts_or_refused(tmp_path, name):
    made = made_images.table()[name]
    pixels, status = read_in_graph(tf.constant(made.data))
    if made.shown is None or "progressive" in name and made.cut or name == "animated WebP":
        assert status == b"unreadable"
    elif " in Display P3" in name or " in Adobe RGB" in name or "profile" in name:
        assert status == b"not sRGB"
    else:
        (tmp_path / "a").write_bytes(made.data)
        difference = np.abs(pixels.numpy().astype(int) - load_image(tmp_path / "a", 299))  # (299, 299, 3)
        assert status == b"ok" and difference.mean() < (2 if made.cut else 0.6)


def test_the_beam_is_the_configs(tmp_path):
    config = make_config({**SIZES, "max_words": 5, "beam_width": 3, "length_penalty": 1.0})
    captioner = dataclasses.replace(tiny_captioner(config), vocabulary=MIXED)
    export_captioner(captioner, colour_network, config, tmp_path / "model")
    paths = [draw(tmp_path, name, *how) for name, how in SAME.items()]
    served = tf.saved_model.load(str(tmp_path / "model")).signatures["serving_default"]
    answer = served(images=tf.constant([path.read_bytes() for path in paths]))

    features = colour_network(np.stack([load_image(path, 299) for path in paths]))
    decoded = decode_captions(captioner.encoder, captioner.decoder, features, config)
    said = [join_words([MIXED[i] for i in ids if i not in (PAD, END)]) for ids in decoded.words.numpy()]
    assert any(" " in text for text in said) and any(re.search("[一-龥]word|word[0-9]+[一-龥]", text) for text in said)
    assert [text.decode() for text in answer["captions"].numpy()] == said
    sums = tf.reduce_sum(decoded.log_probs, axis=1)
    np.testing.assert_allclose(answer["log_probabilities"], sums, atol=1e-3)
    np.testing.assert_allclose(answer["attention_weights"], decoded.attention_weights, atol=1e-3)
    greedy = dataclasses.replace(config, beam_width=1)
    decoded = decode_captions(captioner.encoder, captioner.decoder, features, greedy)
    assert not np.allclose(tf.reduce_sum(decoded.log_probs, axis=1), sums, atol=0.1)  # or no beam would be seen


LOCK = ".model.export.lock"  # which stays


def test_an_empty_folder_is_taken_and_a_killed_exports_rest_goes(tmp_path):
    config = make_config({**SIZES, "max_words": 3})
    captioner = tiny_captioner(config)
    (tmp_path / "model").mkdir()
    for name in (".tmp-0123-model.export", ".tmp-0123-other_model.export"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.pb").write_bytes(b"half")
    export_captioner(captioner, colour_network, config, tmp_path / "model")
    assert set(os.listdir(tmp_path)) == {"model", LOCK, ".tmp-0123-other_model.export"}
    assert not (tmp_path / "model" / "half.pb").exists()
    assert tf.saved_model.contains_saved_model(str(tmp_path / "model"))

    kept = (tmp_path / "model" / "saved_model.pb").read_bytes()
    with pytest.raises(UserError, match="model is there already"):
        export_captioner(captioner, colour_network, config, tmp_path / "model")
    assert (tmp_path / "model" / "saved_model.pb").read_bytes() == kept


def test_two_exports_to_one_folder_do_not_mix(tmp_path):
    """The second one is refused while the first is at work, however the folder is written."""
    with new_folder(tmp_path / "model") as first:
        (first / "a").write_text("first")
        for other in (tmp_path / "model", tmp_path / "deep" / ".." / "model"):
            with pytest.raises(UserError, match=f"process {os.getpid()} is at work"), new_folder(other):
                pytest.fail("two at once")
        with new_folder(tmp_path / "other") as beside:
            assert beside != first and (first / "a").exists()
    assert os.listdir(tmp_path / "model") == ["a"]


def test_what_came_into_the_folder_meanwhile_stays(tmp_path):
    with pytest.raises(UserError, match="cannot write .*model"), new_folder(tmp_path / "model") as temporary:
        (temporary / "a").touch()
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine.txt").touch()
    assert os.listdir(tmp_path / "model") == ["mine.txt"]
    assert set(os.listdir(tmp_path)) == {"model", LOCK}


@pytest.mark.parametrize("name", ["x" * 300, os.fsdecode(b"caf\xe9")])
def test_a_name_that_cannot_be_is_one_line(tmp_path, name):
    with pytest.raises(UserError) as raised, new_folder(tmp_path / name):
        pytest.fail("such a folder")
    assert str(raised.value).isprintable() and os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    def half(model, folder, signatures):
        (tmp_path / folder / "saved_model.pb").write_bytes(b"half")
        raise error

    monkeypatch.setattr(tf.saved_model, "save", half)
    config = make_config(SIZES)
    captioner = tiny_captioner(config)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        export_captioner(captioner, colour_network, config, tmp_path / "model")
    assert isinstance(error, KeyboardInterrupt) or "No space left on device" in str(raised.value)
    assert os.listdir(tmp_path) == [LOCK]


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    config = make_config(SIZES)
    captioner = tiny_captioner(config)
    for folder in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(UserError) as raised:
            export_captioner(captioner, colour_network, config, folder)
        assert "\n" not in str(raised.value)
