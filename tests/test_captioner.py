import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf

from captioning import captioner as captioner_module
from captioning.captioner import caption_batch, decode_captions
from captioning.data.captioned_images import CaptionedImage
from captioning.features.cache import ImageToCaption, cached_batches, dataset_images
from captioning.settings import make_config, naming_commands
from captioning.training.batches import _read_features
from captioning.training.checkpoints import captioner_checkpoint, list_checkpoints
from captioning.training.run_folder import load_captioner
from captioning.vocabulary import END, PAD
from support.errors import UserError
from tiny_captioner import SIZES, VOCABULARY, tiny_captioner

IMAGES = [ImageToCaption(pathlib.Path(f"{number}.jpg"), f"image {number}", number) for number in range(12)]


@pytest.fixture(scope="module")
def features():
    """(12, P, F), with more variety than photographs have."""
    rng = np.random.default_rng(3)
    return np.stack([rng.standard_normal((64, 2048)).clip(0) + rng.standard_normal() for _ in IMAGES], dtype="float32")


def write_run(folder, config, vocabulary=VOCABULARY, names=("best", "last")):
    """What script 3 needs of a run folder. Returns the captioner that the checkpoints hold."""
    tiny = tiny_captioner(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    (folder / "network.json").write_text(json.dumps("a network"))
    for number, name in enumerate(names, 1):
        captioner_checkpoint(tiny.encoder, tiny.decoder).write(folder / name / f"ckpt-{number}")
    return tiny


def damage(folder):
    for path in folder.glob("ckpt-*"):
        path.write_bytes(path.read_bytes()[:10])


# --- Features ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float16", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_trained_on_is_captioned_with(tmp_path, stored, dtype):
    """Features made elsewhere may have more digits than the settings name."""
    config = make_config({"features_dir": str(tmp_path), "feature_dtype": dtype})
    made = np.random.default_rng(0).standard_normal((64, 2048)).astype(stored)
    images = [CaptionedImage(1, "a.jpg")]
    np.save(tmp_path / "a.npy", made)
    trained = _read_features(tf.constant([str(tmp_path / "a.npy")]), config.feature_dtype)
    ((_, captioned),) = cached_batches(dataset_images(images, config), config)
    assert captioned.dtype == tf.float32
    np.testing.assert_array_equal(captioned, tf.cast(trained, tf.float32))
    np.testing.assert_array_equal(captioned[0], made.astype(dtype).astype(np.float32))


def test_each_image_gets_its_own_cached_features(tmp_path):
    config = make_config({"decode_batch": 2, "coco_dir": "coco", "features_dir": str(tmp_path)})
    images = [CaptionedImage(number, f"{number}.jpg", references=["a dog"]) for number in range(5)]
    for number in range(5):
        np.save(tmp_path / f"{number}.npy", np.full((64, 2048), number, np.float16))
    wanted = dataset_images(images, config)
    assert {image.references[0] for image in wanted} == {"a dog"}
    assert {image.path.parent for image in wanted} == {pathlib.Path("coco", "train2014")}
    batches = list(cached_batches(wanted, config))
    assert [features.shape for _, features in batches] == [(2, 64, 2048), (2, 64, 2048), (1, 64, 2048)]
    numbers = [[image.image_id for image in images] for images, _ in batches]
    assert numbers == [features[:, 0, 0].numpy().tolist() for _, features in batches] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("data", [None, b"", b"\x93NUMPY\x01\x00v\x00 and no more"])
def test_a_damaged_or_missing_feature_is_one_line(tmp_path, data):
    config = make_config({"dataset": "demo", "features_dir": str(tmp_path)})
    if data is not None:
        (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.npy.*run python data_utils.py --dataset demo"), naming_commands(config):
        list(cached_batches([ImageToCaption(pathlib.Path("a"), "a", feature_path=tmp_path / "a.npy")], config))


def test_no_images_are_no_batches():
    assert list(cached_batches([], make_config())) == []


# --- Captions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beam_width", [1, 3])
def test_generated_captions_are_what_was_decoded(features, beam_width):
    config = make_config({**SIZES, "max_words": 8, "beam_width": beam_width})
    tiny = tiny_captioner(config, features, seed=5)
    captions = caption_batch(tiny, IMAGES, features, config)
    decoded = decode_captions(tiny.encoder, tiny.decoder, tf.constant(features), config)
    rows = zip(IMAGES, captions, *(part.numpy() for part in decoded), strict=True)
    lengths = set()
    for image, caption, words, log_probs, weights in rows:
        count = len(caption.words)
        lengths.add(count)
        assert caption.words == [tiny.vocabulary[i] for i in words if i not in (PAD, END)]
        assert len(caption.log_probs) == count + (END in words)
        assert caption.log_probability == pytest.approx(log_probs.sum(), rel=1e-3)
        assert caption.log_probability < 0
        np.testing.assert_allclose(caption.attention_weights, weights[:count], atol=1e-4)
        np.testing.assert_allclose(caption.attention_weights.sum(1), 1, atol=1e-3)
        assert (caption.path, caption.name, caption.image_id) == (image.path, image.name, image.image_id)
    assert len(lengths) > 2


@pytest.mark.parametrize("most", [1, 2, 5])
def test_long_captions_are_decoded_to_their_end(features, monkeypatch, most):
    """A first pass of few words must change nothing of what is said in the end."""
    config = make_config({**SIZES, "max_words": 12, "repeat_block": 0})
    tiny = tiny_captioner(config, features, seed=5)
    whole = caption_batch(tiny, IMAGES, features, config)
    lengths = [len(caption.words) for caption in whole]
    assert min(lengths) <= 5 < max(lengths)
    monkeypatch.setattr(captioner_module, "_USUAL_WORDS", most)
    for short_first, at_once in zip(caption_batch(tiny, IMAGES, features, config), whole, strict=True):
        assert short_first.words == at_once.words
        assert short_first.log_probability == pytest.approx(at_once.log_probability, rel=1e-4)
        np.testing.assert_allclose(short_first.attention_weights, at_once.attention_weights, atol=1e-5)


# --- Loading a run ----------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_taken(tmp_path, capsys):
    config = make_config({**SIZES, "run_dir": str(tmp_path / "run")})
    saved = write_run(tmp_path / "run", config)
    loaded = load_captioner(config)
    assert loaded.checkpoint == "best/ckpt-1"
    assert loaded.vocabulary == saved.vocabulary
    assert loaded.network == "a network"
    for ours, theirs in zip(loaded.decoder.weights, saved.decoder.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert capsys.readouterr().out == ""


def test_other_weights_under_the_same_name_have_another_identity(tmp_path):
    """Training that begins anew writes best/ckpt-1 again."""
    config = make_config({**SIZES, "run_dir": str(tmp_path / "run")})
    captioner = write_run(tmp_path / "run", config, names=("best",))
    identities = []
    for change in (0.0, 0.0, 1e-6):
        captioner.decoder.output_layer.bias.assign_add([change] * len(VOCABULARY))
        captioner_checkpoint(captioner.encoder, captioner.decoder).write(tmp_path / "run" / "best" / "ckpt-1")
        loaded = load_captioner(config)
        assert loaded.checkpoint == "best/ckpt-1"
        identities.append(loaded.identity)
    assert identities[0] == identities[1] != identities[2] and identities[0]


def test_a_damaged_best_checkpoint_leaves_the_last_one_which_is_named(tmp_path, capsys):
    config = make_config({**SIZES, "run_dir": str(tmp_path / "run")})
    saved = write_run(tmp_path / "run", config)
    damage(tmp_path / "run" / "best")
    loaded = load_captioner(config)
    assert loaded.checkpoint == "last/ckpt-2"
    np.testing.assert_array_equal(loaded.encoder.dense.kernel, saved.encoder.dense.kernel)
    (line,) = capsys.readouterr().out.splitlines()
    assert "best/ckpt-1 cannot be read" in line and line.endswith("last/ckpt-2 is taken instead")


def test_without_any_whole_checkpoint_the_command_is_named_and_nothing_is_to_be_deleted(tmp_path):
    config = make_config({**SIZES, "dataset": "demo", "run_dir": str(tmp_path / "run")})
    write_run(tmp_path / "run", config)
    damage(tmp_path / "run" / "best")
    damage(tmp_path / "run" / "last")
    with (
        pytest.raises(UserError, match="best/ckpt-1 cannot be read.*move that folder away.*--dataset demo") as raised,
        naming_commands(config),
    ):
        load_captioner(config)
    assert "delete" not in str(raised.value)


def test_a_run_without_a_checkpoint_names_the_command(tmp_path):
    config = make_config({**SIZES, "dataset": "demo", "run_dir": str(tmp_path / "run")})
    write_run(tmp_path / "run", config, names=())
    with pytest.raises(UserError, match="run python train_image_caption_model.py --dataset demo first"):
        load_captioner(config)


def test_a_run_of_other_sizes_is_one_line(tmp_path):
    config = make_config({**SIZES, "run_dir": str(tmp_path / "run")})
    write_run(tmp_path / "run", config)
    with pytest.raises(UserError, match="--units 32, not 20"):
        load_captioner(dataclasses.replace(config, units=20))


@pytest.mark.parametrize("text", ["", "[]", '["<pad>"]', '{"a": 1}', None])
def test_a_damaged_vocabulary_is_one_line(tmp_path, text):
    config = make_config({**SIZES, "run_dir": str(tmp_path / "run")})
    write_run(tmp_path / "run", config)
    path = tmp_path / "run" / "vocabulary.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(UserError, match="vocabulary.json"):
        load_captioner(config)


def test_a_vocabulary_of_another_length_is_one_line(tmp_path):
    """The checkpoints do not fit it."""
    config = make_config({**SIZES, "run_dir": str(tmp_path / "run")})
    write_run(tmp_path / "run", config, vocabulary=VOCABULARY[:-1])
    with pytest.raises(UserError, match="cannot be read") as raised:
        load_captioner(config)
    assert "\n" not in str(raised.value)


def test_only_readable_numbers_are_checkpoints(tmp_path):
    config = make_config({**SIZES, "run_dir": str(tmp_path / "run")})
    write_run(tmp_path / "run", config, names=("best",))
    shutil.copy(tmp_path / "run" / "best" / "ckpt-1.index", tmp_path / "run" / "best" / ".tmp-1-ckpt-9.index")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "best")] == ["ckpt-1"]


def test_decoding_goes_by_the_settings():
    called = []
    graphs = tuple(lambda *args, name=name: called.append((name, *args)) for name in ("greedy", "beams"))
    for width, length_penalty, repeat_block, max_words in ((1, 0.3, 3, 7), (4, 0.3, 3, 7), (2, 1.5, 0, 9)):
        settings = {"beam_width": width, "length_penalty": length_penalty, "repeat_block": repeat_block}
        decode_captions("E", "D", "features", make_config({**settings, "max_words": max_words}), graphs=graphs)
    decode_captions("E", "D", "features", make_config({"repeat_block": 1}), max_words=5, graphs=graphs)
    assert called == [
        ("greedy", "E", "D", "features", 7, 3),
        ("beams", "E", "D", "features", 7, 4, 0.3, 3),
        ("beams", "E", "D", "features", 9, 2, 1.5, 0),
        ("greedy", "E", "D", "features", 5, 1),
    ]
