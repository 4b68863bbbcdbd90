import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf

from captioning import captioner
from captioning.captioner import caption_batch, decoding_settings, sample_chances
from captioning.data.captioned_images import CaptionedImage
from captioning.decoder.beam_search import beam_search
from captioning.decoder.rules import DecodedCaptions
from captioning.export import saved_model
from captioning.export.saved_model import decode_captions
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
    trained = _read_features(tf.constant([str(tmp_path / "a.npy")]), config)
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


# --- Several captions ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(features):
    return tiny_captioner(make_config(SIZES), features, seed=5)


def all_captions(caption):
    return [caption.caption, *(other.caption for other in caption.others)]


def test_several_captions_are_the_best_beams_each_with_its_own_evidence(tiny, features):
    config = make_config({**SIZES, "max_words": 6, "beam_width": 5, "captions_per_image": 3})
    captions = caption_batch(tiny, IMAGES, features, config, with_evidence=True)
    one = caption_batch(tiny, IMAGES, features, dataclasses.replace(config, captions_per_image=1))
    how = 6, 5, config.length_penalty, config.repeat_block
    words = beam_search(tiny.encoder, tiny.decoder, tf.constant(features), *how, count=3).words.numpy()
    for image, caption, first, rows in zip(IMAGES, captions, one, words.tolist(), strict=True):
        expected = [[tiny.vocabulary[i] for i in row if i not in (PAD, END)] for row in rows if any(row)]
        assert [each.words for each in (caption, *caption.others)] == expected
        assert len(set(all_captions(caption))) == len(expected)
        assert (caption.caption, caption.image_id) == (first.caption, image.image_id)
        assert caption.log_probability == pytest.approx(first.log_probability, rel=1e-3)
        for other in caption.others:
            assert (other.name, other.path, other.others) == (image.name, image.path, ())
            assert other.log_probability < 0 and len(other.evidence) == len(other.words)
    evidence = [other.evidence for caption in captions for other in (caption, *caption.others)]
    assert len({each.round(4).tobytes() for each in evidence}) > len(IMAGES)


DRAWN = {"max_words": 7, "sample": "yes", "captions_per_image": 4, "temperature": 2.0, "top_p": 0.95}


def test_drawn_captions_are_the_same_in_any_batch_and_folder_and_others_with_another_seed(tiny, features):
    config = make_config({**SIZES, **DRAWN})
    captions = list(map(all_captions, caption_batch(tiny, IMAGES, features, config)))
    assert all(len(set(each)) == len(each) == 4 for each in captions)
    assert len({text for each in captions for text in each}) > 2 * len(IMAGES)
    moved = [dataclasses.replace(image, path=pathlib.Path("elsewhere", image.path)) for image in IMAGES[3:5]]
    assert list(map(all_captions, caption_batch(tiny, moved, features[3:5], config))) == captions[3:5]
    fewer = dataclasses.replace(config, captions_per_image=2)
    assert [all_captions(each) for each in caption_batch(tiny, IMAGES, features, fewer)] == [c[:2] for c in captions]
    other = caption_batch(tiny, IMAGES, features, dataclasses.replace(config, sample_seed=7))
    assert sum(map(len, map(set.intersection, map(set, captions), map(set, map(all_captions, other))))) < 24


def test_a_caption_is_drawn_again_where_it_came_before_and_in_the_end_there_are_fewer(tiny, features):
    """A little colder, and some captions come twice; nearly frozen, and always the greedy one comes."""
    config = make_config({**SIZES, **DRAWN, "temperature": 0.9})
    captions = [all_captions(each) for each in caption_batch(tiny, IMAGES, features, config)]
    assert all(len(set(each)) == len(each) for each in captions)
    assert {4} < set(map(len, captions))
    frozen = dataclasses.replace(config, temperature=0.01)
    greedy = make_config({**SIZES, "max_words": 7})
    likeliest = [[caption.caption] for caption in caption_batch(tiny, IMAGES, features, greedy)]
    captions = [all_captions(each) for each in caption_batch(tiny, IMAGES, features, frozen)]
    assert sum(map(list.__eq__, captions, likeliest)) >= 10  # two words may be as likely as each other


def test_what_captions_are_drawn_by_depends_on_the_files_name_and_the_seed():
    config = make_config(DRAWN)
    chances = sample_chances("a.jpg", config)
    assert chances.shape == (20, 7) and chances.dtype == np.float32 and 0 <= chances.min() < chances.max() < 1
    np.testing.assert_array_equal(chances, sample_chances("a.jpg", config))
    for name, seed in (("b.jpg", 42), ("a.jpg", 43)):
        assert (sample_chances(name, dataclasses.replace(config, sample_seed=seed)) != chances).any()
    np.testing.assert_array_equal(
        sample_chances("a.jpg", dataclasses.replace(config, captions_per_image=1)), chances[:5]
    )


@pytest.mark.parametrize(
    ("given", "width", "line"),
    [
        ({}, 1, ""),
        ({"captions_per_image": 5}, 5, "--beam_width 5 is taken instead of 1, to find as many captions\n"),
        ({"captions_per_image": 5, "beam_width": 3}, 5, "--beam_width 5 is taken instead of 3, "),
        ({"captions_per_image": 5, "beam_width": 7}, 7, ""),
        ({"captions_per_image": 5, "sample": "yes", "temperature": 0.5}, 1, ""),
    ],
)
def test_there_are_as_many_beams_as_captions(capsys, given, width, line):
    config = decoding_settings(given, make_config(given))
    assert config == dataclasses.replace(make_config(given), beam_width=width)
    printed = capsys.readouterr().out
    assert printed.startswith(line) and bool(printed) == bool(line)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.5}, "--temperature says how captions are drawn: give --sample too"),
        ({"top_p": 0.5, "captions_per_image": 3}, "--top_p says how captions are drawn: give --sample too"),
        ({"sample": "yes", "beam_width": 3}, "--sample draws captions and --beam_width searches for them"),
    ],
)
def test_settings_of_decoding_that_do_not_go_together_are_one_line(given, message):
    with pytest.raises(UserError, match=message):
        decoding_settings(given, make_config(given))


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
    with pytest.raises(UserError, match="does not fit model.py and the vocabulary: .* in the checkpoint") as raised:
        load_captioner(config)
    assert "\n" not in str(raised.value)


def test_only_readable_numbers_are_checkpoints(tmp_path):
    config = make_config({**SIZES, "run_dir": str(tmp_path / "run")})
    write_run(tmp_path / "run", config, names=("best",))
    shutil.copy(tmp_path / "run" / "best" / "ckpt-1.index", tmp_path / "run" / "best" / ".tmp-1-ckpt-9.index")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "best")] == ["ckpt-1"]


def test_decoding_goes_by_the_settings(tiny, features, monkeypatch):
    """Those of script 3, and those of a SavedModel, which says one caption of each image."""
    called, one = [], DecodedCaptions(np.full((1, 1), END), np.zeros((1, 1)), np.zeros((1, 1, 64)))
    several = DecodedCaptions(*(x[:, np.newaxis] for x in one))
    for module, greedy, beams in (
        (captioner, "_greedy_graph", "_beam_graph"),
        (saved_model, "greedy_decode", "beam_search"),
    ):
        monkeypatch.setattr(module, greedy, lambda E, D, features, *how: called.append(("greedy", *how)) or one)
        monkeypatch.setattr(module, beams, lambda E, D, features, *how: called.append(("beams", *how)) or several)
    for width, length_penalty, repeat_block, count in ((1, 0.3, 3, 1), (4, 0.3, 3, 2), (2, 1.5, 0, 1)):
        settings = {"beam_width": width, "length_penalty": length_penalty, "repeat_block": repeat_block}
        config = make_config({**settings, "captions_per_image": count, "max_words": 7 + width})
        caption_batch(tiny, IMAGES[:1], features[:1], config)
        saved_model.decode_captions(tiny.encoder, tiny.decoder, features[:1], config)
    assert called[::2] == [("greedy", 8, 3), ("beams", 11, 4, 0.3, 3, 2), ("beams", 9, 2, 1.5, 0, 1)]
    assert called[1::2] == [("greedy", 8, 3), ("beams", 11, 4, 0.3, 3), ("beams", 9, 2, 1.5, 0)]
