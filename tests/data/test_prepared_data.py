import dataclasses
import hashlib
import json
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.data.coco import read_coco_captions
from captioning.data.prepared_data import leave_out, read_prepared_settings, retract_prepared, save_prepared
from captioning.data.splits import _draw_examples, _split_by_image
from captioning.features.cache import cached_network, feature_path, features_folder, load_data, measure_features
from captioning.features.cnn import CNNS
from captioning.features.manifest import _MANIFEST, MADE_ELSEWHERE
from captioning.features.missing import find_missing
from captioning.settings import DATA_SETTINGS, make_config, naming_commands
from captioning.vocabulary import END, SPECIAL_WORDS, START
from conftest import write_coco, write_features
from strategies import JSON, NAMES, NUMBERS, SENTENCES, check_one_line, files_of, records
from support.errors import UserError


def make(root, **settings):
    places = {"coco_dir": str(root / "coco"), "data_dir": str(root / "data")}
    return make_config({**places, "num_examples": None, "inception_weights": "random", **settings})


def prepare(config):
    """Prepare COCO's layout from cached features, as script 1 does."""
    images = read_coco_captions(f"{config.coco_dir}/annotations/captions_train2014.json", config.max_words)
    train, validation = _split_by_image(images, config.val_fraction, config.seed)
    assert find_missing(images, config) == []
    splits = {"train": train, "validation": validation}
    save(splits, {}, config)
    return splits


def save(splits, skipped, config):
    """Save as script 1 does what is left of splits."""
    kept = leave_out(splits, skipped, config.max_words)
    save_prepared(
        kept,
        skipped,
        *measure_features(kept["train"], features_folder(config)),
        cached_network(features_folder(config)),
        config,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of prepared data, which tests only read."""
    root = pathlib.Path(tmp_path_factory.mktemp("prepared"))
    write_coco(root / "coco")
    write_features(root / "data" / "features")
    prepare(make(root))
    return root


@pytest.fixture
def copied(root, tmp_path):
    """The Config of prepared data that a test may damage."""
    shutil.copytree(root / "data", tmp_path / "data")
    return dataclasses.replace(make(root), data_dir=str(tmp_path / "data"))


def without_encoding(images):
    return [dataclasses.replace(image, encoded_captions=()) for image in images]


def test_what_was_prepared_is_loaded(root, capsys):
    config = make(root)
    splits = prepare(config)
    printed = capsys.readouterr().out
    assert "train: 19 images, 95 captions" in printed and "0 images skipped" in printed
    prepared = load_data(config)
    assert without_encoding(prepared.train) == without_encoding(splits["train"])
    assert without_encoding(prepared.validation) == without_encoding(splits["validation"])
    assert prepared.test == []
    assert prepared.network == MADE_ELSEWHERE
    for image in prepared.train + prepared.validation:
        for caption, token_ids in zip(image.captions, image.encoded_captions, strict=True):
            assert (token_ids[0], token_ids[-1]) == (START, END)
            words = "".join(letter if letter.isalpha() or letter == "'" else " " for letter in caption.lower()).split()
            assert [prepared.vocabulary[i] for i in token_ids[1:-1]] == words


def test_one_line_says_that_characters_are_the_words(copied, capsys):
    prepared = load_data(copied)
    chinese = dataclasses.replace(prepared.train[0], captions=["一只狗 dog"])
    for images, count in ((prepared.train, 0), ([chinese], 1)):
        capsys.readouterr()
        save({"train": images, "validation": prepared.validation}, {}, copied)
        lines = [line for line in capsys.readouterr().out.splitlines() if "characters are the words" in line]
        assert len(lines) == count and all(line.startswith("Han: ") for line in lines)
    assert set(load_data(copied).vocabulary[4:]) == {"一", "只", "狗", "dog"}


def test_the_statistics_are_those_of_the_training_features(root):
    config = make(root)
    prepared = load_data(config)
    sample = np.stack([np.load(feature_path(image, features_folder(config))) for image in prepared.train]).astype(float)
    np.testing.assert_allclose(prepared.feature_mean, sample.mean((0, 1)), atol=1e-3)
    assert prepared.feature_std == pytest.approx(np.std(sample - sample.mean((0, 1))), rel=1e-3)


def test_karpathys_data_have_a_test_split(copied):
    config = dataclasses.replace(copied, dataset="karpathy")
    prepared = load_data(copied)
    splits = {"train": prepared.train, "validation": prepared.validation[:2], "test": prepared.validation[2:]}
    save(splits, {}, config)
    loaded = load_data(config)
    assert [len(loaded.train), len(loaded.validation), len(loaded.test)] == [19, 2, 3]
    with pytest.raises(UserError, match="prepared with --dataset karpathy, not coco"):
        load_data(copied)


def test_skipped_images_are_left_out_and_named(copied):
    images = load_data(copied).train
    save({"train": images, "validation": images[:3]}, {images[0].file_name: "a reason"}, copied)
    prepared = load_data(copied)
    assert len(prepared.train) == len(images) - 1 and len(prepared.validation) == 2
    assert json.loads(pathlib.Path(copied.data_dir, "skipped.json").read_text()) == {images[0].file_name: "a reason"}
    with pytest.raises(
        UserError, match=r"no readable validation images are left \(1 skipped, such as: .+\): see that --images"
    ):
        save({"train": images, "validation": images[:1]}, {images[0].file_name: "a reason"}, copied)


def test_the_words_are_the_training_captions_and_the_draw_keeps_all_references(copied):
    images = load_data(copied).train + load_data(copied).validation
    images = _draw_examples(images, 30, seed=0)
    train, validation = _split_by_image(images, 0.2, 0)
    captions = {image.image_id: [f"{text} word{image.image_id}" for text in image.captions] for image in images}
    splits = {
        name: [dataclasses.replace(image, captions=captions[image.image_id]) for image in split]
        for name, split in (("train", train), ("validation", validation))
    }
    save(splits, {}, copied)
    prepared = load_data(copied)
    own_words = {f"word{image.image_id}" for image in train}
    assert {word for word in prepared.vocabulary if word.startswith("word")} == own_words
    assert all(len(image.references) == 5 for image in prepared.validation)


def test_leftovers_of_a_killed_run_go(copied):
    leftover = pathlib.Path(copied.data_dir, ".tmp-999999999-1-train.json")
    leftover.touch()
    prepared = load_data(copied)
    save({"train": prepared.train, "validation": prepared.validation}, {}, copied)
    assert not leftover.exists()


# --- Settings


@pytest.mark.parametrize("name", DATA_SETTINGS)
def test_a_setting_that_contradicts_what_was_prepared_is_named(root, name):
    config = make(root)
    value = getattr(config, name)
    other = f"{value}x" if isinstance(value, str) else 3 if value is None else value * 2
    said = value if value != "" else "''"
    with pytest.raises(UserError, match=f"prepared with --{name} {said}, not {other}: give --{name} {said}, or run"):
        load_data(dataclasses.replace(config, **{name: other}))


@pytest.mark.parametrize("prepared_with", ["imagenet", "notop.h5", "moved.h5"])
def test_one_file_of_weights_has_several_names(copied, tmp_path, monkeypatch, prepared_with):
    """Imagenet's weights by name, and by the path of the file wherever it lies, are those that were prepared with."""
    file, other = tmp_path / "notop.h5", tmp_path / "other.h5"
    file.write_bytes(b"weights")
    other.write_bytes(b"others")
    known = dataclasses.replace(CNNS[copied.cnn], imagenet_digest=hashlib.md5(b"weights").hexdigest())
    monkeypatch.setitem(CNNS, copied.cnn, known)
    network = f"{copied.cnn}, weights imagenet"
    settings, manifest = pathlib.Path(copied.data_dir, "settings.json"), features_folder(copied) / _MANIFEST
    saved = json.loads(settings.read_text()) | {"inception_weights": prepared_with, "network": network}
    settings.write_text(json.dumps(saved))
    manifest.write_text(manifest.read_text().replace(MADE_ELSEWHERE, network))
    for weights in ("imagenet", str(file)):
        assert load_data(dataclasses.replace(copied, inception_weights=weights)).network == network
    for weights in (str(other), "random"):
        with pytest.raises(UserError, match=f"prepared with --inception_weights {prepared_with}, not {weights}: give"):
            load_data(dataclasses.replace(copied, inception_weights=weights))


def test_the_command_that_prepares_other_data_names_their_kind(copied):
    settings = pathlib.Path(copied.data_dir, "settings.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"dataset": "demo"}))
    with pytest.raises(UserError, match="or run python data_utils.py --dataset demo with the new value$"):
        load_data(dataclasses.replace(copied, dataset="demo", seed=1))


def test_a_folder_has_several_spellings(copied, monkeypatch):
    folder = pathlib.Path(copied.coco_dir)
    monkeypatch.chdir(folder.parent)
    for same in (f"{folder}/", folder.name, f"./{folder.name}/../{folder.name}"):
        load_data(dataclasses.replace(copied, coco_dir=same))


def test_nothing_prepared_names_the_command(tmp_path):
    config = make_config({"dataset": "demo", "data_dir": str(tmp_path)})
    for read in (lambda: load_data(config), lambda: read_prepared_settings(tmp_path)):
        with pytest.raises(UserError, match=r"settings.json is missing: run python data_utils.py --dataset demo$"):
            with naming_commands(config):
                read()


def test_the_settings_of_prepared_data_make_their_config(root):
    saved = read_prepared_settings(root / "data")
    assert make_config({"data_dir": str(root / "data")}, saved) == make(root)


def test_what_is_retracted_is_not_loaded(copied):
    retract_prepared(copied.data_dir)
    retract_prepared(copied.data_dir)
    with pytest.raises(UserError, match="settings.json is missing: run python data_utils.py"), naming_commands(copied):
        load_data(copied)


# --- Features


def test_prepared_features_are_not_read(root, monkeypatch):
    monkeypatch.setattr("support.file_states.read_state", None)
    load_data(make(root))


def test_features_that_another_program_replaced_after_preparing_are_one_line(copied):
    image = load_data(copied).validation[0]
    path = feature_path(image, features_folder(copied))
    np.save(path, np.load(path) + np.float16(1))
    with (
        pytest.raises(UserError, match=rf"{path} is damaged, or changed since it was prepared: run python data_utils"),
        naming_commands(copied),
    ):
        load_data(copied)
    path.unlink()
    with (
        pytest.raises(UserError, match=rf"{path} is missing from the feature cache: run python data_utils.py$"),
        naming_commands(copied),
    ):
        load_data(copied)


def test_a_cache_of_another_network_than_the_prepared_one_is_one_line(copied):
    path = pathlib.Path(copied.data_dir, "features", _MANIFEST)
    path.write_text(path.read_text().replace(MADE_ELSEWHERE, "InceptionV3, weights imagenet"))
    with pytest.raises(UserError) as raised, naming_commands(copied):
        load_data(copied)
    assert str(raised.value) == (
        f"{path.parent} holds features of another network (InceptionV3, weights imagenet) than those that were "
        "prepared (made elsewhere): run python data_utils.py"
    )


# --- Damage


def edited(change):
    """A function from a JSON file's bytes to those of the value that `change` makes of its value."""
    return lambda data: json.dumps(change(json.loads(data))).encode()


def with_first(**values):
    return edited(lambda images: [{**images[0], **values}, *images[1:]])


def without(key):
    return edited(lambda settings: {name: value for name, value in settings.items() if name != key})


def less_a_field(images):
    return [{name: value for name, value in image.items() if name != "url"} for image in images]


DAMAGES = [
    ("settings.json", edited(lambda value: [value])),
    ("settings.json", without("seed")),
    ("settings.json", without("network")),
    ("vocabulary.json", edited(lambda words: dict.fromkeys(words))),
    ("vocabulary.json", edited(lambda words: [*words, 7])),
    ("vocabulary.json", edited(lambda words: words[4:])),
    ("vocabulary.json", edited(lambda words: [*words, words[-1]])),
    ("train.json", edited(lambda images: {"images": images})),
    ("train.json", edited(lambda images: [*images, None])),
    ("train.json", edited(less_a_field)),
    ("validation.json", edited(lambda images: [])),
    ("train.json", with_first(file_name="../escape.jpg")),
    ("train.json", with_first(folder="../escape")),
    ("train.json", with_first(image_id=True)),
    ("train.json", with_first(image_id="")),
    ("train.json", with_first(coco_split="../escape")),
    ("train.json", with_first(feature_stem="../escape")),
    ("train.json", with_first(extra="field")),
    ("train.json", with_first(url=3)),
    ("train.json", with_first(captions="A red dog.")),
    ("train.json", with_first(references=[3])),
    ("train.json", with_first(encoded_captions=[[2, 3]])),
    ("train.json", with_first(captions=["a", "b"], encoded_captions=[[2, True, 3], [2, 5, 3]])),
    ("train.json", with_first(captions=["a"], encoded_captions=[[2, -1, 3]])),
    ("train.json", with_first(captions=["a"], encoded_captions=[[2, 21, 3]])),  # there are 21 words
    ("feature_statistics.npz", lambda data: data[:-100]),
    ("feature_statistics.npz", lambda data: data[:200] + bytes(8) + data[208:]),
]
FILES = ("settings.json", "vocabulary.json", "train.json", "validation.json", "feature_statistics.npz")


@pytest.mark.parametrize(
    ("name", "damage"),
    [*DAMAGES, *((name, damage) for name in FILES for damage in (None, lambda data: b"", lambda data: data[:-20]))],
)
def test_a_damaged_prepared_file_is_named_with_the_command(copied, name, damage):
    path = pathlib.Path(copied.data_dir, name)
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(UserError, match=name) as raised, naming_commands(copied):
        load_data(copied)
    assert "run python data_utils.py" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_data_from_before_the_choice_of_a_cnn_are_inceptionv3s(copied):
    path = pathlib.Path(copied.data_dir, "settings.json")
    saved = json.loads(path.read_text())
    assert saved.pop("cnn") == "InceptionV3"
    path.write_text(json.dumps(saved))
    load_data(copied)
    with pytest.raises(UserError, match="prepared with --cnn InceptionV3, not VGG16: give --cnn InceptionV3, or run"):
        load_data(dataclasses.replace(copied, cnn="VGG16"))


TOKEN_IDS = st.lists(st.integers(0, 20) | st.sampled_from([21, -1, 2**40]), max_size=5)
PREPARED = st.lists(
    records(
        image_id=NUMBERS,
        file_name=st.just("COCO_train2014_000000000001.jpg") | NAMES,
        folder=st.just("") | NAMES,
        coco_split=st.just("") | NAMES,
        feature_stem=st.just("") | NAMES,
        url=st.none() | NAMES,
        captions=st.lists(SENTENCES, min_size=1, max_size=1),
        references=st.lists(SENTENCES, max_size=2),
        encoded_captions=st.lists(TOKEN_IDS.map(lambda ids: [START, *ids, END]), min_size=1, max_size=1),
    ),
    max_size=3,
)
WORDS = st.lists(SENTENCES, max_size=3).map(lambda words: [*SPECIAL_WORDS, *words])


@pytest.mark.slow
@given(
    st.tuples(st.sampled_from(["train.json", "validation.json"]), files_of(PREPARED))
    | st.tuples(st.just("vocabulary.json"), files_of(WORDS))
    | st.tuples(st.sampled_from(["settings.json", "feature_statistics.npz"]), files_of(JSON))
)
def test_any_prepared_file_loads_or_is_one_line(root, damage):
    name, data = damage
    with tempfile.TemporaryDirectory() as folder:
        for path in (root / "data").iterdir():
            pathlib.Path(folder, path.name).symlink_to(path)
        pathlib.Path(folder, name).unlink()
        pathlib.Path(folder, name).write_bytes(data)
        config = dataclasses.replace(make(root), data_dir=folder)
        try:
            prepared = load_data(config)
        except UserError as error:
            return check_one_line(error)
        for image in prepared.train + prepared.validation:
            assert all(0 <= i < len(prepared.vocabulary) for ids in image.encoded_captions for i in ids)
        assert prepared.feature_mean.shape == (2048,)
