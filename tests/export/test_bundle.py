import argparse
import ast
import collections
import dataclasses
import errno
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from matplotlib import get_data_path
from PIL import Image
from test_image_files import IMAGES, jpeg_header, pillow_set_up, png_header
from test_saved_model import NEAR, SAME, draw

import inference_image_caption as inference
from captioning.attention.evidence import explain_captions
from captioning.captioner import caption_batch, decoding_settings
from captioning.decoder.nucleus_sampling import draw_words, keep_nucleus
from captioning.export import bundle as export_bundle
from captioning.export import onnx_models
from captioning.export.saved_model import decode_captions
from captioning.features import image_reader
from captioning.features.cache import ImageToCaption
from captioning.features.cnn import CNNS
from captioning.features.extraction import extract_features
from captioning.features.image_files import load_image
from captioning.features.image_reader import MOST_FILE_PIXELS
from captioning.features.network import feature_network
from captioning.inference.own_images import _IMAGE_FORMATS, find_images
from captioning.settings import make_config
from captioning.training import run_folder
from captioning.vocabulary import END, PAD, START
from captioning.words import CHARACTER, join_words, split_words
from conftest import options
from support.errors import UserError
from tiny_captioner import MIXED, SIZES, colour_network, tiny_captioner

ROOT = pathlib.Path(__file__).parent.parent.parent
SHARED = ROOT.parent / "shared"
RUNNER = ROOT / "captioning" / "export" / "bundle_files" / "caption.py"
CONFIG = make_config({**SIZES, "max_words": 9, "beam_width": 1, "repeat_block": 2})

# What the script may import, and what these packages import themselves.
ALLOWED = {"numpy", "PIL", "ai_edge_litert", "onnxruntime", "flatbuffers", "ml_dtypes", "google", "pillow_heif"}
ALLOWED |= {"typing_extensions", "backports", "tqdm", "packaging", "defusedxml", "olefile", "image_reader"}


def load_runner(folder=RUNNER.parent):
    """A bundle's script as a module."""
    sys.modules["image_reader"] = image_reader  # which lies beside the script in a bundle
    spec = importlib.util.spec_from_file_location("bundle_runner", folder / "caption.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def export(kind, folder, weights="float32", config=CONFIG, network=colour_network, seed=1):
    """Export the tiny captioner to folder / "bundle". Returns (captioner, bundle)."""
    captioner = dataclasses.replace(tiny_captioner(config, seed=seed), vocabulary=MIXED, network="a network")
    export_bundle.export_bundle(captioner, network, kind, weights, config, folder / "bundle")
    return captioner, folder / "bundle"


@pytest.fixture(scope="module", params=["litert", "onnx"])
def exported(request, tmp_path_factory):
    """(captioner, folder of its bundle with float32 weights, that folder's script as a module)"""
    captioner, folder = export(request.param, tmp_path_factory.mktemp("exported"))
    return captioner, folder, load_runner(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return [draw(folder, name, *how) for name, how in (SAME | NEAR).items()]


# --- Images ---------------------------------------------------------------------------------------------------


def kinds_of_files():
    """Image files of every kind that script 1 reads, by name."""
    files = {f"{number}.jpg": data for number, data in enumerate(IMAGES)}  # the ending says nothing
    rng = np.random.default_rng(3)
    noise = Image.fromarray(rng.integers(0, 256, (30, 50, 3), np.uint8))
    for turned in range(1, 9):
        exif, data = Image.Exif(), io.BytesIO()
        exif[0x0112] = turned
        noise.save(data, "JPEG", exif=exif)
        files[f"turned{turned}.jpg"] = data.getvalue()
    more = {"LA.png": "LA", "L.png": "L", "1.png": "1", "L.tiff": "L", "CMYK.tiff": "CMYK", "LAB.tiff": "LAB"}
    for name, mode in more.items():
        data = io.BytesIO()
        image = Image.merge("LAB", noise.split()) if mode == "LAB" else noise.convert(mode)
        image.save(data, name.partition(".")[2])
        files[name] = data.getvalue()
    clear = io.BytesIO()
    noise.convert("P").save(clear, "PNG", transparency=3)
    return files | {"clear.png": clear.getvalue()}


@pytest.mark.parametrize("name", kinds_of_files())
def test_the_script_reads_an_image_as_script_1_does(tmp_path, name):
    runner, path = load_runner(), tmp_path / name
    path.write_bytes(kinds_of_files()[name])
    with pillow_set_up():
        try:
            expected = load_image(path, 299)
        except ValueError:  # PostScript alone
            assert path.read_bytes().startswith(b"%!PS")
            with pytest.raises(OSError, match="PostScript"):
                runner.read_pixels(path, 299)
            return
        pixels = runner.read_pixels(path, 299)
    assert (pixels.shape, pixels.dtype) == ((299, 299, 3), np.uint8)
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_the_script_reads_photographs_and_drawings_as_script_1_does(images):
    for path in images:
        assert np.abs(load_runner().read_pixels(path, 299).astype(int) - load_image(path, 299)).max() <= 1, path


def test_the_script_has_the_limits_of_script_1(tmp_path, monkeypatch):
    runner = load_runner()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", MOST_FILE_PIXELS // 2)
    for data in (png_header(12_000, 9_000), png_header(20_000, 20_000), jpeg_header(17_000, 15_000)):
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises((OSError, Image.DecompressionBombError), match="pixels"):
            runner.read_pixels(tmp_path / "a.png", 299)


# --- Captions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "length_penalty", "repeat_block"), [(1, 1.0, 2), (2, 0.0, 0), (3, 1.0, 2), (5, 0.7, 1), (3, 1.0, 3)]
)
def test_the_script_finds_the_captions_of_script_3(exported, images, width, length_penalty, repeat_block):
    captioner, _, runner = exported
    encode, decode = (runner.load_model(name, bundle_format(exported)) for name in ("encoder", "decoder"))
    for max_words in (9, 2):
        given = {"max_words": max_words, "beam_width": width, "length_penalty": length_penalty}
        given["repeat_block"] = repeat_block
        config = dataclasses.replace(CONFIG, **given)
        how = argparse.Namespace(**given, captions=1)
        pixels = np.stack([load_image(path, 299) for path in images])
        features = colour_network(pixels)
        decoded = tf.function(decode_captions)(captioner.encoder, captioner.decoder, features, config)
        assert len({tuple(words) for words in decoded.words.numpy()}) >= 3
        for image, words, log_probs in zip(pixels, decoded.words.numpy(), decoded.log_probs.numpy(), strict=True):
            ((found, score),) = runner.beam_search(encode(pixels=image[None]), decode, how)
            assert found.tolist() == [i for i in words.tolist() if i != PAD]
            assert score == pytest.approx(log_probs.sum(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    "several",
    [
        {"captions_per_image": 5},
        {"captions_per_image": 3, "beam_width": 4, "length_penalty": 0.3, "repeat_block": 1},
        {"captions_per_image": 4, "sample": "yes", "temperature": 2.0},
        {"captions_per_image": 3, "sample": "yes", "temperature": 1.5, "top_p": 1.0, "sample_seed": 7},
        {"captions_per_image": 2, "sample": "yes", "temperature": 0.3, "repeat_block": 1},  # and mostly there are fewer
    ],
)
def test_the_script_says_the_several_captions_of_script_3(exported, images, several, capsys):
    captioner, _, runner = exported
    config = decoding_settings({}, dataclasses.replace(CONFIG, **several))
    features = colour_network(np.stack([load_image(path, 299) for path in images]))
    named = [ImageToCaption(pathlib.Path(path), str(path)) for path in images]
    captions = caption_batch(captioner, named, features, config)
    capsys.readouterr()
    given = {name: value for name, value in several.items() if name not in ("captions_per_image", "sample")}
    options = [part for name, value in given.items() for part in (f"--{name.removeprefix('sample_')}", str(value))]
    options += ["--captions", str(config.captions_per_image), *(["--sample"] if config.sample == "yes" else [])]
    assert runner.main([*map(str, images), *options]) == 0
    printed = capsys.readouterr()
    expected = [f"{each.name}: {said.caption}" for each in captions for said in (each, *each.others)]
    assert printed.out.splitlines() == expected
    few = [each for each in captions if 1 + len(each.others) < config.captions_per_image]
    assert printed.err.count("different captions were found") == len(few)
    raised = config.sample == "no" and several.get("beam_width", 1) < config.captions_per_image
    assert ("--beam_width is 5, to find as many captions" in printed.err) == raised
    assert len(set(expected)) == len(expected) > len(images)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.5)])
def test_the_script_draws_a_word_as_script_3_does(temperature, top_p):
    rng = np.random.default_rng(2)
    log_probs = tf.nn.log_softmax(3 * rng.standard_normal((400, 300))).numpy().astype(np.float32)  # (N, V)
    chances = np.append(rng.random(398, np.float32), np.float32([0, 1 - 2**-24]))
    nucleus = keep_nucleus(tf.nn.softmax(log_probs / np.float32(temperature)), top_p)
    draw = load_runner().draw_word
    drawn = [draw(*each, temperature, top_p) for each in zip(log_probs, chances, strict=True)]
    assert drawn == draw_words(nucleus, chances).numpy().tolist()


def bundle_format(exported):
    return json.loads((exported[1] / "captioner.json").read_text())["format"]


def test_the_maps_are_those_of_the_figures(exported, images):
    captioner, _, runner = exported
    encode, explain = (runner.load_model(name, bundle_format(exported)) for name in ("encoder", "evidence"))
    pixels = load_image(images[0], 299)[None]
    words = np.int32([5, 9, 6, 19, 7])
    weights, evidence, norms = explain_captions(
        captioner.encoder, captioner.decoder, colour_network(pixels), tf.constant([[*words, END]])
    )
    encoded = encode(pixels=pixels)
    np.testing.assert_allclose(encoded["feature_norms"], norms, rtol=1e-4)
    found = runner.find_maps(encoded, explain, words)  # (L, P) each
    np.testing.assert_allclose(found["weights"], weights[0, :5], atol=1e-4)
    np.testing.assert_allclose(found["evidence"], evidence[0, :5], atol=1e-4)
    assert np.abs(found["evidence"] - found["weights"]).max() > 0.01


def test_the_figure_draws_attention_weights_unless_evidence_is_wanted(exported, images, tmp_path, monkeypatch):
    _, _, runner = exported
    drawn = []
    monkeypatch.setattr(
        runner, "draw_attention", lambda path, words, maps: drawn.append(maps) or Image.new("1", (1, 1))
    )
    monkeypatch.setattr(runner, "find_maps", lambda *_: {"weights": "the weights", "evidence": "the evidence"})
    for more in ([], ["--attention_map", "evidence"], ["--attention_map", "weights"]):
        assert runner.main([str(images[0]), "--figure", str(tmp_path / "a.png"), *more]) == 0
    assert drawn == ["the weights", "the evidence", "the weights"]


def test_a_caption_is_said_by_the_script_in_a_process_that_has_no_tensorflow(exported, images, tmp_path):
    captioner, folder, _ = exported
    paths = images[:6]
    (tmp_path / "more").mkdir()
    for path in paths[3:]:
        path = pathlib.Path(path)
        (tmp_path / "more" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "more" / "notes.txt").write_text("no image")
    program = (
        "import importlib.abc, pathlib, runpy, sys\n"
        "class Refuse(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        top = name.partition('.')[0]\n"
        f"        if top not in sys.stdlib_module_names and top not in {sorted(ALLOWED)} and not top.startswith('_'):\n"
        "            raise ModuleNotFoundError(f'{name} is not allowed', name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "for name in ('tensorflow', 'keras', 'captioning', 'support', 'matplotlib'):\n"
        "    try:\n"
        "        __import__(name)\n"
        "        raise SystemExit('the block does not work')\n"
        "    except ModuleNotFoundError:\n"
        "        pass\n"
        "script, *sys.argv[1:] = sys.argv[1:]\n"
        "sys.argv[0] = script\n"
        "sys.path[0] = str(pathlib.Path(script).parent)\n"  # as where Python is given the script
        "runpy.run_path(script, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program, folder / "caption.py", *paths[:3], tmp_path / "more", "--beam_width", "3"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert ended.returncode == 0, ended.stderr
    in_order = [*paths[:3], *sorted(tmp_path / "more" / path.name for path in paths[3:])]
    config = dataclasses.replace(CONFIG, beam_width=3)
    features = colour_network(np.stack([load_image(path, 299) for path in in_order]))
    generated = caption_batch(captioner, [ImageToCaption(path, str(path)) for path in in_order], features, config)
    assert ended.stdout.splitlines() == [f"{caption.name}: {caption.caption}" for caption in generated]
    assert any(re.search("[一-龥]word", caption.caption) for caption in generated)


def test_the_script_is_short_and_imports_no_more_than_it_says():
    text = RUNNER.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name if isinstance(node, ast.Import) else node.module for node in nodes for alias in node.names}
    tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert tops == {"numpy", "PIL", "ai_edge_litert", "onnxruntime", "image_reader"}
    text = pathlib.Path(image_reader.__file__).read_text(encoding="utf-8")  # which is copied beside it
    assert not re.search(r"^ *(from|import) (captioning|support|tensorflow|pillow_heif)", text, re.MULTILINE)


def test_the_script_takes_the_files_that_script_3_takes(tmp_path):
    runner = load_runner()
    assert set(runner.FORMATS) == _IMAGE_FORMATS
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for name in (
        "._a.jpg a.jpg b.PNG paper.pdf drawing.eps film.mpg data.h5 notes.txt deep/c.tiff deep/deeper/._d.webp".split()
    ):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    named = [str(tmp_path / "deep" / "c.tiff"), str(tmp_path), str(tmp_path / "paper.pdf"), "x" * 300, "http:/gone.jpg"]
    theirs = find_images(named, tmp_path / "out", collections.Counter())
    found = runner.find_images(named)
    assert found == [image.path for image in theirs]
    assert [path.name for path in found[:4]] == ["c.tiff", "a.jpg", "b.PNG", "paper.pdf"]


def test_the_script_does_not_wait_for_a_pipe_and_prints_no_order_to_the_terminal(exported, tmp_path):
    """Nor does a name that is not UTF-8 end it."""
    _, folder, _ = exported
    os.mkfifo(tmp_path / "pipe.jpg")
    names = [b"pipe.jpg", b"caf\xe9.png", b"a\x1b[31m\nb.png", b"x" * 300]
    paths = [os.fsencode(tmp_path) + b"/" + name for name in names]
    try:
        for path in paths[1:3]:
            with open(path, "wb") as file:
                Image.new("RGB", (9, 9)).save(file, "PNG")
    except OSError:
        pytest.skip("the file system does not take such names")
    utf8 = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, folder / "caption.py", *paths]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=utf8)
    assert ended.returncode == 1
    said = [line.partition(": ")[0] for line in ended.stdout.splitlines()]
    assert said == [rf"{tmp_path}/caf\udce9.png", rf"{tmp_path}/a\x1b[31m\nb.png"]
    failed = [line for line in ended.stderr.splitlines() if line.startswith(str(tmp_path))]
    assert len(failed) == 2 and "pipe.jpg: " in failed[0] and "x" * 300 in failed[1]
    assert "\x1b" not in ended.stdout + ended.stderr


def test_a_damaged_image_is_one_line_and_the_others_get_captions(exported, images, tmp_path, capsys):
    _, _, runner = exported
    (tmp_path / "bad.jpg").write_bytes(b"text")
    assert runner.main([str(tmp_path / "bad.jpg"), str(tmp_path / "gone.jpg"), str(images[0])]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{images[0]}: word")
    assert [line.partition(": ")[0] for line in printed.err.splitlines()] == [
        str(tmp_path / "bad.jpg"),
        str(tmp_path / "gone.jpg"),
    ]
    assert runner.main([str(images[0])]) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        *(["--beam_width", "0"], ["--max_words", "0"], ["--figure", "a.png"], []),
        *(["--captions", "0"], ["--temperature", "0"], ["--top_p", "0"], ["--top_p", "1.1"], ["--seed", "-1"]),
        *(["--repeat_block", "-1"], ["--temperature", "0.7"], ["--top_p", "0.5"], ["--sample", "--beam_width", "3"]),
    ],
)
def test_options_of_the_script_that_cannot_be_are_refused(exported, images, tmp_path, wrong):
    _, _, runner = exported
    (tmp_path / "empty").mkdir()
    named = images[:2] if wrong else [tmp_path / "empty"]
    with pytest.raises(SystemExit) as ended:
        runner.main([*map(str, named), *wrong])
    assert ended.value.code == 2


# --- Figures ----------------------------------------------------------------------------------------------------


def test_the_figure_is_lit_where_the_map_is_high(tmp_path):
    runner, width, line, gap = load_runner(), 224, 26, 4
    Image.new("RGB", (640, 480), (200, 200, 200)).save(tmp_path / "a.png")
    maps = np.full((6, 64), 0.01, np.float32)
    for word in range(6):
        maps[word, 9 * word] = 0.5  # on the diagonal
    figure = np.asarray(runner.draw_attention(tmp_path / "a.png", ["a"] * 6, maps), int)
    assert figure.shape == (2 * (165 + line + gap), 5 * width, 3)
    for word in range(6):
        left, top = (word + 1) % 5 * width, (word + 1) // 5 * (165 + line + gap) + line
        panel = figure[top : top + 165, left : left + 220, 0]
        row, column = np.unravel_index(panel.argmax(), panel.shape)
        assert (row * 8 // 165, column * 8 // 220) == (word, word)
        assert panel.max() > 190 and panel[-10:, :10].max() < 60
        assert (figure[top - line : top, left : left + width] < 100).any()  # the word


def test_a_figure_is_drawn_also_of_a_caption_without_words(exported, images, tmp_path, monkeypatch, capsys):
    _, _, runner = exported
    assert runner.main([str(images[0]), "--figure", str(tmp_path / "words.png")]) == 0
    monkeypatch.setattr(runner, "beam_search", lambda *_: [(np.int32([END]), 0.0)])
    assert runner.main([str(images[0]), "--figure", str(tmp_path / "none.png")]) == 0
    with Image.open(tmp_path / "words.png") as words, Image.open(tmp_path / "none.png") as none:
        assert words.size[0] == none.size[0] and words.size[1] >= none.size[1] > 100
    assert capsys.readouterr().out.splitlines()[1] == f"{images[0]}: "


@pytest.mark.parametrize("caption", ["", "a dog", "一只狗 and 2 dogs", "น้ำ", "می\u200cخواهد بدود", "<unk> 狗"])
def test_the_script_writes_captions_as_script_3_does(caption):
    words = ["<unk>" if word == "unk" else word for word in split_words(caption)]
    assert load_runner().join_words(words, CHARACTER) == join_words(words)


def test_letters_of_a_figure_are_in_a_font_that_has_them_or_named(tmp_path, monkeypatch, capsys):
    runner = load_runner()
    monkeypatch.setenv("PATH", str(tmp_path))  # no fontconfig
    assert runner.find_missing(runner.find_font("dog"), "god") == capsys.readouterr().err == ""
    runner.find_font("кот狗")
    assert "no font here has these letters, and the figure has boxes for them: кот狗\n" in capsys.readouterr().err
    (tmp_path / "fc-match").write_text(
        f"#!/bin/sh\nprintf '{pathlib.Path(get_data_path(), 'fonts/ttf/DejaVuSans.ttf')}\\n0'\n"
    )
    (tmp_path / "fc-match").chmod(0o755)
    assert runner.find_font("кот\u200c").getname()[0] == "DejaVu Sans"
    assert capsys.readouterr().err == ""
    runner.find_font("кот狗")
    assert "for them: 狗\n" in capsys.readouterr().err


# --- The folder -------------------------------------------------------------------------------------------------


def test_the_bundle_says_what_it_is(exported):
    captioner, folder, _ = exported
    about = json.loads((folder / "captioner.json").read_text())
    sampling = {"captions": 1, "sample": False, "temperature": 1.0, "top_p": 0.9, "seed": 42}
    assert about["decoding"] == {"max_words": 9, "beam_width": 1, "length_penalty": 1.0, "repeat_block": 2, **sampling}
    assert about["sizes"] == {
        "image": 299,
        "locations": 64,
        "channels": 2048,
        **SIZES,
        "vocabulary": len(MIXED),
    }
    assert (about["network"], about["checkpoint"]) == ("a network", captioner.checkpoint)
    assert json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")) == MIXED
    readme = (folder / "README.md").read_text()
    assert f"pip install numpy pillow {export_bundle._RUNTIMES[about['format']]}\n" in readme
    assert len(readme.splitlines()) <= 20
    assert (folder / "image_reader.py").read_bytes() == pathlib.Path(image_reader.__file__).read_bytes()
    others = {"captioner.json", "vocabulary.json", "README.md", "caption.py", "image_reader.py"}
    models = {path.name for path in folder.iterdir()} - others
    expected = {"encoder", "decoder"} if about["format"] == "litert" else {"encoder", "decoder", "evidence"}
    assert {pathlib.Path(name).stem for name in models if not name.startswith("__")} == expected
    assert [name for name in os.listdir(folder.parent) if name.startswith(".")] == [".bundle.export.lock"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    def half(functions, captioner, weights, images, folder):
        (folder / "encoder.tflite").write_bytes(b"half")
        raise error

    monkeypatch.setattr(export_bundle, "_write_litert", half)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        export("litert", tmp_path)
    assert set(os.listdir(tmp_path)) == {".bundle.export.lock"}


def test_two_exports_to_one_folder_do_not_mix(tmp_path, monkeypatch):
    """The second one comes while the first writes its models."""
    monkeypatch.setattr(export_bundle, "bundle_functions", lambda captioner, network, cnn: captioner)

    def write(captioner, again, weights, images, folder):
        monkeypatch.setattr(export_bundle, "_write_litert", lambda *_: pytest.fail("two at once"))
        with pytest.raises(UserError, match="is at work"):
            export("litert", tmp_path, "float16", seed=2)
        (folder / "encoder.tflite").write_bytes(b"first")

    monkeypatch.setattr(export_bundle, "_write_litert", write)
    export("litert", tmp_path)
    assert (tmp_path / "bundle" / "encoder.tflite").read_bytes() == b"first"
    assert json.loads((tmp_path / "bundle" / "captioner.json").read_text())["weights"] == "float32"


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine.txt").touch()
    with pytest.raises(UserError, match="bundle is there already"):
        export("litert", tmp_path)
    assert os.listdir(tmp_path / "bundle") == ["mine.txt"]


def test_a_model_that_no_file_can_hold_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(export_bundle, "_MOST_BYTES", 10_000)
    with pytest.raises(UserError, match="take --format savedmodel") as raised:
        export("litert", tmp_path)
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == []


def test_onnx_without_its_converter_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(UserError, match="pip install tf2onnx"):
        export("onnx", tmp_path)
    assert set(os.listdir(tmp_path)) == {".bundle.export.lock"}


# --- Number types -----------------------------------------------------------------------------------------------


def sizes(folder):
    return {path.stem: path.stat().st_size for path in folder.glob("*.tflite")}


@pytest.mark.parametrize("exported", ["litert"], indirect=True)
def test_float16_weights_take_half_the_room_and_give_nearly_the_same(exported, tmp_path, images):
    captioner, large, _ = exported
    _, small = export("litert", tmp_path, "float16")
    assert sizes(small)["encoder"] < 0.55 * sizes(large)["encoder"]
    assert sizes(small)["decoder"] < sizes(large)["decoder"]
    runner = load_runner(small)
    encode, decode = (runner.load_model(name, "litert") for name in ("encoder", "decoder"))
    pixels = np.stack([load_image(path, 299) for path in images[:3]])
    encoded_features = captioner.encoder(colour_network(pixels))  # (B, P, D)
    for image, expected in zip(pixels, encoded_features.numpy(), strict=True):
        found = encode(pixels=image[None])["encoded_features"]  # the stand-in multiplies errors by up to 255
        assert np.sum(found * expected) > 0.99 * np.linalg.norm(found) * np.linalg.norm(expected)
        hidden, keys = (
            f(expected[None]) for f in (captioner.decoder.initial_hidden, captioner.decoder.attention.key_layer)
        )
        step = decode(words=np.int32([[START]]), encoded_features=expected[None], hidden=hidden, keys=keys)
        logits, _, _ = captioner.decoder(tf.constant([[START]]), expected[None], hidden, keys)
        known = tf.nn.log_softmax(logits[:, 3:])[0]  # without the words that are never said
        np.testing.assert_allclose(step["log_probs"][0, 3:], known, atol=0.05)


def test_onnx_weights_are_halved_and_computed_with_in_float32():
    """What float16 cannot hold stays float32, as do small tensors."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((64, 64)), "b": np.full((64, 64), 1e9), "c": rng.standard_normal((1, 64))}
    weights = {name: values.astype(np.float32) for name, values in weights.items()}
    steps = [("MatMul", "x", "a", "xa"), ("MatMul", "xa", "b", "xab"), ("Add", "xab", "c", "y")]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, 64)) for name in "xy")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, [one, two], [result]) for kind, one, two, result in steps],
        "graph",
        [x],
        [y],
        [onnx.numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    onnx_models._halve_weights(graph)
    kept = {tensor.name: onnx.numpy_helper.to_array(tensor).dtype for tensor in graph.initializer}
    assert kept == {"a/float16": np.float16, "b": np.float32, "c": np.float32}
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    given = rng.standard_normal((1, 64), np.float32)
    rounded = weights["a"].astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": given})[0], given @ rounded @ weights["b"], rtol=1e-3)


def captions(folder, images):
    runner = load_runner(folder)
    encode, decode = (runner.load_model(name, "litert") for name in ("encoder", "decoder"))
    how = argparse.Namespace(max_words=9, beam_width=1, length_penalty=1.0, repeat_block=2, captions=1)
    pixels = [runner.read_pixels(path, 299)[None] for path in images]
    return [tuple(runner.beam_search(encode(pixels=each), decode, how)[0][0].tolist()) for each in pixels]


@pytest.mark.slow
def test_int8_weights_are_calibrated_on_training_images(trained, tmp_path, capsys, monkeypatch):
    from ai_edge_litert.interpreter import Interpreter

    seen = []
    monkeypatch.setattr(export_bundle, "load_image", lambda path, side: seen.append(path) or load_image(path, side))
    monkeypatch.setattr(run_folder, "run_network", lambda config, keep=False: colour_network)
    argv = [*options(trained), "--export", str(tmp_path / "bundle"), "--format", "litert", "--weights", "int8"]
    inference.main(argv)
    training = {image["file_name"] for image in json.loads((trained / "data" / "train.json").read_text())}
    assert {path.name for path in seen} == training
    printed = capsys.readouterr().out
    assert f"calibrated on {len(training)} training images of {trained / 'data'}, drawn by seed 42" in printed
    tensors = Interpreter(str(tmp_path / "bundle" / "encoder.tflite")).get_tensor_details()
    assert any(tensor["dtype"] is np.int8 for tensor in tensors)
    assert len(captions(tmp_path / "bundle", sorted((trained / "coco" / "train2014").iterdir())[:3])) == 3
    assert json.loads((tmp_path / "bundle" / "captioner.json").read_text())["weights"] == "int8"


@pytest.mark.parametrize("missing", ["data", "images"])
def test_int8_weights_without_training_images_are_one_line(trained, tmp_path, monkeypatch, missing):
    monkeypatch.setattr(run_folder, "run_network", lambda config, keep=False: colour_network)
    gone = tmp_path / "gone"
    shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("captions"))
    if missing == "data":
        saved = json.loads((tmp_path / "run" / "config.json").read_text())
        (tmp_path / "run" / "config.json").write_text(json.dumps(saved | {"data_dir": str(gone)}))
    else:
        monkeypatch.setattr(export_bundle, "image_path", lambda image, config: gone / image.file_name)
    argv = ["--run_dir", str(tmp_path / "run"), "--export", str(tmp_path / "bundle")]
    with pytest.raises(UserError, match="int8 weights are calibrated on training images, and ") as raised:
        inference.main([*argv, "--format", "litert", "--weights", "int8"])
    message = str(raised.value)
    assert "\n" not in message and str(gone) in message and "--data_dir" in message and "--weights float16" in message
    assert sorted(os.listdir(tmp_path)) == [".bundle.export.lock", "run"]


# --- Script 3 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (
            ["--export", "m", "--weights", "int8"],
            "--weights int8 does not go with --format savedmodel, only with litert",
        ),
        (
            ["--export", "m", "--format", "onnx", "--weights", "int8"],
            "does not go with --format onnx, only with litert",
        ),
        (["--export", "m", "--format", "savedmodel", "--weights", "float32"], "only with litert, onnx"),
        (["--format", "litert"], "give --export DIR"),
        (["--weights", "int8"], "give --export DIR"),
        (["--export", "m", "--format", "tflite"], "invalid choice: 'tflite'"),
        (["--export", "m", "--format", "litert", "--weights", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_a_format_that_cannot_be_is_one_line(tmp_path, monkeypatch, wrong, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=match) as raised:
        inference.main(wrong)
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["litert", "onnx"])
def test_a_run_is_exported_and_says_what_script_3_says(trained, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(run_folder, "run_network", lambda config, keep=False: colour_network)
    image = min((trained / "coco" / "train2014").iterdir())
    run = ["--run_dir", str(trained / "run")]
    inference.main([*run, "--export", str(tmp_path / "bundle"), "--format", kind])
    about = json.loads((tmp_path / "bundle" / "captioner.json").read_text())
    assert (about["format"], about["weights"]) == (kind, {"litert": "float16", "onnx": "float32"}[kind])
    assert about["network"] == json.loads((trained / "run" / "network.json").read_text())
    assert about["checkpoint"].startswith("best/ckpt-") and about["checkpoint_identity"]
    inference.main([*run, "--image", str(image), "--output", str(tmp_path / "out"), "--figures", "0"])
    (record,) = (json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines())
    script = [sys.executable, tmp_path / "bundle" / "caption.py", image]
    ended = subprocess.run(script, capture_output=True, text=True)
    assert ended.stdout == f"{image}: {record['caption']}\n", ended.stderr


def test_features_made_elsewhere_cannot_be_exported(trained, tmp_path):
    with pytest.raises(UserError, match="made by another program"):
        inference.main(["--run_dir", str(trained / "run"), "--export", str(tmp_path / "m"), "--format", "litert"])
    assert os.listdir(tmp_path) == []


def test_tf2onnx_is_given_no_large_weights_of_which_it_would_keep_dozens_of_copies(tmp_path, monkeypatch):
    import onnx
    from tf2onnx import convert

    largest, real = [], convert._convert_common

    def seen(graph, **more):
        shapes = [node.attr["value"].tensor.tensor_shape.dim for node in graph.node if node.op == "Const"]
        largest.append(max(np.prod([axis.size for axis in shape]) for shape in shapes))
        return real(graph, **more)

    monkeypatch.setattr(convert, "_convert_common", seen)
    _, folder = export("onnx", tmp_path)
    assert len(largest) == 3 and max(largest) <= 10_000
    encoder = onnx.load(folder / "encoder.onnx").graph
    assert max(np.prod(weight.dims) for weight in encoder.initializer) > 10_000
    assert [value.name for value in encoder.input] == ["pixels"]


def test_the_script_names_a_folder_that_cannot_be_listed(tmp_path, monkeypatch, capsys):
    for name in ("a.jpg", "inner/b.jpg", "inner/._b.jpg", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    runner, real = load_runner(), os.scandir
    assert runner.find_images([tmp_path, tmp_path / "c.txt"]) == [
        tmp_path / x for x in ("a.jpg", "inner/b.jpg", "c.txt")
    ]
    assert capsys.readouterr().err == ""

    def scandir(path):
        if str(path).endswith("inner"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert runner.find_images([tmp_path]) == [tmp_path / "a.jpg"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "Permission denied" in line and "inner" in line


# --- Photographs ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared: photographs and InceptionV3's weights")
def test_photographs_get_the_captions_of_script_3_from_float32_weights(tmp_path):
    """Some photographs, through InceptionV3; a captioner with drawn weights says much about small differences."""
    paths = sorted((SHARED / "flickr8k_coco" / "train2014").glob("*.jpg"))[:12]
    paths += sorted((SHARED / "coco_mini" / "train2017").glob("*.jpg"))[:8]
    weights = str(SHARED / "weights" / "inception_v3_notop.weights.h5")
    config = make_config({**SIZES, "inception_weights": weights, "extract_precision": "float32", "max_words": 12})
    network = feature_network(config)
    features = np.concatenate([batch for _, batch, _ in extract_features(network, CNNS["InceptionV3"], paths, 10)])
    captioner = tiny_captioner(config, features, seed=22)
    for kind in ("litert", "onnx"):
        folder = tmp_path / kind
        export_bundle.export_bundle(captioner, network, kind, "float32", config, folder)
        runner = load_runner(folder)
        encode, decode = (runner.load_model(name, kind) for name in ("encoder", "decoder"))
        encoded = [encode(pixels=runner.read_pixels(path, 299)[None]) for path in paths]
        for width in (1, 3):
            settings = dataclasses.replace(config, beam_width=width)
            expected = decode_captions(captioner.encoder, captioner.decoder, features, settings).words.numpy()
            how = argparse.Namespace(**{name: getattr(settings, name) for name in export_bundle._DECODING}, captions=1)
            found = [runner.beam_search(each, decode, how)[0][0].tolist() for each in encoded]
            assert found == [[i for i in words.tolist() if i != PAD] for words in expected]
            assert len({tuple(words) for words in found}) > 8
    assert START not in np.concatenate(found)
