"""Any input either loads or is refused in one line: hypothesis draws settings, JSON files, captions, broken images.

tests/soak.py draws more from the same strategies for the same checks.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import tempfile
import warnings

import numpy as np
from command_line import UserError, make_config, parse_command_line
from files import read_json, write_bytes, write_json
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from karpathy_splits import read_karpathy
from PIL import Image

import data_utils
from config import Config
from conftest import options
from train_image_caption_model import collect_captions

settings.register_profile(
    "same every time",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("same every time")

MAX_WORDS = 10
TEXT = st.text(st.characters(), max_size=20)  # halves of surrogate pairs among them


def check_one_line(error):
    assert len(str(error).splitlines()) == 1, str(error)


# --- Settings

VALUES = (
    TEXT
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["none", "karpathy", "9" * 5000, "1e999", "1_0", "-", "--", "--help", "a\nb", "%s", "\udc80"])
)


@example({"data_dir": "\udc80"})
@given(st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(Config)]), VALUES, max_size=3))
def test_any_settings_are_a_config_or_one_line(values):
    argv = [part for name, text in values.items() for part in (f"--{name}", text)]
    try:
        config, _ = parse_command_line(argv, "")
    except UserError as error:
        check_one_line(error)
        return
    with tempfile.TemporaryDirectory() as folder:  # as every run keeps them
        path = pathlib.Path(folder, "config.json")
        write_json(path, dataclasses.asdict(config))
        assert make_config(read_json(path, "")) == config


@example("--two\nlines")
@given(TEXT.map(lambda text: "--" + text) | TEXT)
def test_any_option_is_known_or_one_line(text):
    assume(text not in ("-h", "--help"))
    try:
        parse_command_line([text], "")
    except UserError as error:
        check_one_line(error)


# --- Annotations

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
NUMBERS = st.integers(1, 4) | st.sampled_from([3, 4, 0, -1, 10**400])
NAMES = (
    st.sampled_from(["a.jpg", "a.png", "b.jpg", "c", "..", ".", "", "../a.jpg", "/a.jpg", "a/b.jpg", "a\\b.jpg", "C:a"])
    | st.sampled_from([".tmp-1-a.jpg", "a\0.jpg", "a\n.jpg", "\udc80.jpg", "é" * 200, "x" * 300 + ".jpg"])
    | TEXT
)
SENTENCES = st.sampled_from(["a dog", "Dogs' tails", "ein Hündchen", "!?", "", "word " * 500, "\0", "\ud800"]) | TEXT
SPLIT_NAMES = st.sampled_from(["train", "restval", "val", "test", "extra"])


@st.composite
def records(draw, **fields):
    """Dicts of which now and then a field is missing or is anything; now and then no dict at all."""
    if rarely(draw):
        return draw(JSON)
    return {name: draw(JSON if rarely(draw) else values) for name, values in fields.items() if not rarely(draw)}


def rarely(draw):
    return draw(st.integers(0, 9)) == 9


def after(good, drawn):
    """A strategy for lists that begin with what can be used, so that some files load, and go on with anything."""
    return st.lists(drawn, max_size=6).map(lambda rest: good + rest)


COCO = st.fixed_dictionaries(
    {
        "images": after(
            [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
            records(id=NUMBERS, file_name=NAMES, coco_url=NAMES),
        ),
        "annotations": after(
            [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}],
            records(image_id=NUMBERS, caption=SENTENCES),
        ),
    }
)
KARPATHY = st.fixed_dictionaries(
    {
        "images": after(
            [
                {"imgid": -n, "filename": f"{split}.jpg", "split": split, "sentences": [{"raw": "a dog"}]}
                for n, split in enumerate(("train", "val", "test"), 1)
            ],
            records(
                imgid=NUMBERS,
                cocoid=NUMBERS,
                filename=NAMES,
                filepath=NAMES,
                split=SPLIT_NAMES,
                sentences=st.lists(records(raw=SENTENCES), max_size=3),
            ),
        )
    }
)


@st.composite
def files_of(draw, shaped):
    """The bytes of JSON files of a shape, now and then of any other shape, or of what is no JSON."""
    if rarely(draw):
        return draw(st.binary())
    shapeless = st.fixed_dictionaries({}, optional={"images": JSON, "annotations": JSON}) | JSON
    return json.dumps(draw(shapeless if rarely(draw) else shaped)).encode()


@contextlib.contextmanager
def strict_output():
    """Standard output as a terminal takes it: UTF-8 and nothing else."""
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as out:
        yield out


def check_usable(images, config):
    """The captions are of a length to train on, and every image has files of its own, where they belong."""
    for image in images:
        assert all(1 <= words <= MAX_WORDS for words in data_utils.count_words(image["captions"]))
        assert min(data_utils.count_words(image["references"])) > 0
        for path in (data_utils.feature_path(image, config), data_utils.image_path(image, config)):
            assert not path.is_file()
            write_bytes(path, b"x")
    features = {path.name for path in data_utils.features_folder(config).iterdir()}
    assert len(features) == len(images)


def check_captions_file(data):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "captions.json")
        path.write_bytes(data)
        with strict_output() as out:
            try:
                images = data_utils.read_captions(path, MAX_WORDS)
            except UserError as error:
                return check_one_line(error)
        said = out.buffer.getvalue().decode().splitlines()
        assert all(line.startswith(f"{path}: ") for line in said)
        config = make_config({"coco_dir": f"{folder}/coco", "data_dir": f"{folder}/data"})
        check_usable(images, config)
        folders = {"captions.json", "coco", "coco/train2014", "data", "data/features"}
        made = {str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*")} - folders
        assert {name.rpartition("/")[0] for name in made} == {"coco/train2014", "data/features"}

    whole = json.loads(data)
    listed = {(r["id"], r["file_name"]) for r in whole["images"] if has(r, id=int, file_name=str)}
    written = {(r["image_id"], r["caption"]) for r in whole["annotations"] if has(r, image_id=int, caption=str)}
    for image in images:
        assert (image["image_id"], image["file_name"]) in listed
        assert {(image["image_id"], caption) for caption in image["captions"] + image["references"]} <= written
        assert image["captions"]


def has(record, **fields):
    return isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in fields.items())


def coco_file(name):
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}, {"id": 3, "file_name": name}]
    annotations = [{"image_id": n, "caption": "a dog"} for n in (1, 2, 3)]
    return json.dumps({"images": images, "annotations": annotations}).encode()


@example(b'{"images": ["\\ud800"], "annotations": ["two\\nlines"]}')
@example(coco_file("x" * 300 + ".jpg"))
@example(coco_file("é" * 112 + ".jpg"))
@given(files_of(COCO))
def test_any_captions_file_loads_or_is_one_line(data):
    check_captions_file(data)


def check_karpathy_file(data):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "dataset.json")
        path.write_bytes(data)
        with strict_output() as out:
            try:
                splits = read_karpathy(path, folder, MAX_WORDS, data_utils.count_words, data_utils.image_problem)
            except UserError as error:
                return check_one_line(error)
        assert all(line.startswith(f"{path}: ") for line in out.buffer.getvalue().decode().splitlines())
        images = pathlib.Path(folder, "images")
        config = make_config({"dataset": "karpathy", "images": str(images), "data_dir": f"{folder}/data"})
        check_usable([image for split in splits.values() for image in split], config)
        assert {path.name for path in pathlib.Path(folder).iterdir()} == {"dataset.json", "images", "data"}
    assert splits.keys() == {"train", "val", "test"}
    assert all(image["captions"] for image in splits["train"])


@given(files_of(KARPATHY))
def test_any_karpathy_file_loads_or_is_one_line(data):
    check_karpathy_file(data)


# --- Vocabulary


@given(st.lists(SENTENCES.filter(lambda text: text.isascii() or text.isprintable()), max_size=5), st.integers(5, 12))
@example(["<start> start <END> [UNK] <pad> <unk> ''"], 12)
def test_captions_become_ids_and_the_same_words_again(captions, vocab_size):
    captions = [text for text, words in zip(captions, data_utils.count_words(captions), strict=True) if words]
    assume(captions)
    images = [{"captions": captions}]
    vocabulary = data_utils.build_vocabulary(images, vocab_size)
    assert vocabulary[:4] == list(data_utils.SPECIAL_WORDS)
    assert len(set(vocabulary)) == len(vocabulary) <= vocab_size

    (image,) = data_utils.encode_captions(images, vocabulary)
    standardized = [text.decode() for text in data_utils.standardize(captions).numpy()]
    assert [text.decode() for text in data_utils.standardize(standardized).numpy()] == standardized
    for text, ids in zip(standardized, image["ids"], strict=True):
        assert (ids[0], ids[-1]) == (data_utils.START, data_utils.END)
        assert not {data_utils.PAD, data_utils.START, data_utils.END} & set(ids[1:-1])
        known = [word if word in vocabulary else "<unk>" for word in text.split(" ")]
        assert [vocabulary[i] for i in ids[1:-1]] == known


# --- Prepared files

IDS = st.lists(st.integers(0, 20) | st.sampled_from([21, -1, 2**40]), max_size=5)
PREPARED = st.lists(
    records(
        image_id=NUMBERS,
        file_name=st.just("COCO_train2014_000000000001.jpg") | NAMES,
        captions=st.lists(SENTENCES, min_size=1, max_size=1),
        references=st.lists(SENTENCES, max_size=2),
        ids=st.lists(IDS.map(lambda ids: [data_utils.START, *ids, data_utils.END]), min_size=1, max_size=1),
    ),
    max_size=3,
)
WORDS = st.lists(SENTENCES, max_size=3).map(lambda words: [*data_utils.SPECIAL_WORDS, *words])


@given(
    st.tuples(st.sampled_from(["train.json", "validation.json"]), files_of(PREPARED))
    | st.tuples(st.just("vocabulary.json"), files_of(WORDS))
    | st.tuples(st.sampled_from(["settings.json", "feature_statistics.npz"]), files_of(JSON))
)
def test_any_prepared_file_loads_or_is_one_line(trained, damage):
    name, data = damage
    with tempfile.TemporaryDirectory() as folder:
        for path in (trained / "data").iterdir():
            pathlib.Path(folder, path.name).symlink_to(path)
        pathlib.Path(folder, name).unlink()
        pathlib.Path(folder, name).write_bytes(data)
        config, _ = parse_command_line([*options(trained), "--data_dir", folder], "")
        try:
            prepared = data_utils.load_prepared(config)
        except UserError as error:
            return check_one_line(error)
        for images in (prepared.train, prepared.validation):
            words = collect_captions(images, config).words
            assert 0 <= int(words.values.numpy().min()) <= int(words.values.numpy().max()) < len(prepared.vocabulary)
        assert prepared.feature_mean.shape == (data_utils.CHANNELS,)


# --- Images


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
            pixels = data_utils.load_image(path)
        except ValueError as error:
            check_one_line(error)
            assert str(error).startswith(f"{path} cannot be read as an image")
        else:
            assert (pixels.shape, pixels.dtype) == ((299, 299, 3), np.uint8)


@given(damaged_images())
def test_any_bytes_are_an_image_or_one_line(data):
    check_image(data)
