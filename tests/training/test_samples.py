import dataclasses
import json
import re
import shutil
import types

import keras
import numpy as np
import pytest
from PIL import Image

from captioning.data.captioned_images import CaptionedImage
from captioning.features.cache import ImageToCaption
from captioning.settings import make_config
from captioning.training.samples import _SAMPLES, _SHOWN_EPOCHS, Samples, _read_samples, _show_samples, choose_samples
from conftest import options
from support.errors import UserError
from tiny_captioner import SIZES, VOCABULARY, tiny_captioner


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three images with cached features, all of which differ."""
    rng = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("images")
    images = []
    for number in range(3):
        path, features = folder / f"{number}.jpg", folder / f"{number}.npy"
        Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(path)
        np.save(features, (rng.standard_normal((64, 2048)).clip(0) + rng.standard_normal()).astype(np.float16))
        images.append(ImageToCaption(path, str(path), number, ["what people said"], features))
    return images


@pytest.fixture(scope="module")
def state(images):
    """What show_samples needs of a TrainingState."""
    features = np.stack([np.load(image.feature_path) for image in images]).astype(np.float32)
    tiny = tiny_captioner(make_config(SIZES), features, seed=5)
    optimizer = types.SimpleNamespace(learning_rate=keras.Variable(0.25))
    return types.SimpleNamespace(encoder=tiny.encoder, decoder=tiny.decoder, optimizer=optimizer)


def show(epoch, images, state, folder, **settings):
    """As training does after an epoch. Returns what samples.json holds then."""
    config = make_config({**SIZES, "max_words": 5, "repeat_block": 0, "run_dir": str(folder), **settings})
    _show_samples(Samples(images, VOCABULARY), state, {"epoch": epoch, "train_loss": 1.0}, config)
    return json.loads((folder / "samples.json").read_text())


def columns(page):
    """What the page shows of each image: dict of its name to the epochs."""
    _, *articles = page.read_text().split("<article")
    names = [re.search("<bdi>(.*?)</bdi>", article)[1] for article in articles]
    return {
        name: [int(epoch) for epoch in re.findall(r"<b>epoch (\d+)</b>", article)]
        for name, article in zip(names, articles, strict=True)
    }


def test_samples_are_few_of_the_validation_images_and_depend_on_the_seed_alone():
    images = [CaptionedImage(number, f"{number}.jpg", references=[f"{number}"]) for number in range(50)]
    config = make_config({"seed": 1, "coco_dir": "coco", "features_dir": "features"})
    chosen = choose_samples(images, config)
    assert len({image.image_id for image in chosen}) == _SAMPLES
    assert choose_samples(images, dataclasses.replace(config, epochs=99, run_dir="other")) == chosen
    assert choose_samples(images, dataclasses.replace(config, seed=2)) != chosen
    for image in chosen:
        assert image.references == [str(image.image_id)]
        assert image.feature_path.name == f"{image.image_id}.npy"
    assert len(choose_samples(images[:2], config)) == 2


def test_each_epoch_has_a_line_for_each_image_and_a_column_on_the_page(images, state, tmp_path, capsys):
    first = show(1, images, state, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"  {p.path.name}: {r['caption']}" for p, r in zip(images, first[0]["captions"], strict=True)]
    assert len(set(lines)) == 3 and all(len(line.split()) > 1 for line in lines)
    both = show(2, images, state, tmp_path)
    assert both[0] == first[0]
    assert [row["epoch"] for row in both] == [1, 2]
    assert columns(tmp_path / "samples.html") == {"0.jpg": [1, 2], "1.jpg": [1, 2], "2.jpg": [1, 2]}
    assert "what people said" in (tmp_path / "samples.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"samples.json", "samples.html"}


def test_samples_are_greedy_whatever_the_beam_width(images, state, tmp_path):
    assert show(1, images, state, tmp_path) == show(1, images, state, tmp_path, beam_width=4)


def test_the_page_holds_attention_and_evidence(images, state, tmp_path):
    (epoch,) = show(1, images, state, tmp_path)
    for record in epoch["captions"]:
        assert np.shape(record["evidence"]) == np.shape(record["attention_weights"]) == (len(record["words"]), 64)
    page = (tmp_path / "samples.html").read_text()
    words = sum(len(record["words"]) for record in epoch["captions"])
    assert page.count(' data-weights="') == page.count(' data-evidence="') == words > 0


def test_a_run_that_is_continued_goes_on_with_the_samples_and_one_begun_anew_does_not(images, state, tmp_path):
    for epoch, expected in ((1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (2, [1, 2]), (3, [1, 2, 3]), (1, [1])):
        assert [row["epoch"] for row in show(epoch, images, state, tmp_path)] == expected
        assert set(map(tuple, columns(tmp_path / "samples.html").values())) == {tuple(expected)}


def test_of_many_epochs_the_page_shows_the_first_and_the_latest(images, state, tmp_path):
    for epoch in range(1, _SHOWN_EPOCHS + 4):
        rows = show(epoch, images[:1], state, tmp_path)
    assert [row["epoch"] for row in rows] == list(range(1, _SHOWN_EPOCHS + 4))
    assert columns(tmp_path / "samples.html") == {"0.jpg": [1, *range(5, _SHOWN_EPOCHS + 4)]}


def test_samples_of_other_images_are_not_shown_with_these(images, state, tmp_path):
    show(1, images[:2], state, tmp_path)
    show(2, images[1:], state, tmp_path)
    assert columns(tmp_path / "samples.html") == {"1.jpg": [1, 2], "2.jpg": [2]}


def test_a_image_that_is_gone_and_a_caption_without_words_are_shown_as_such(images, tmp_path, capsys):
    silent = tiny_captioner(make_config(SIZES))
    silent.decoder.output_layer.bias.assign(100 * np.eye(len(VOCABULARY))[3])  # <end>
    optimizer = types.SimpleNamespace(learning_rate=keras.Variable(0.25))
    state = types.SimpleNamespace(encoder=silent.encoder, decoder=silent.decoder, optimizer=optimizer)
    gone = dataclasses.replace(images[0], path=tmp_path / "gone.jpg")
    for epoch in (1, 2):
        show(epoch, [gone], state, tmp_path)
    assert capsys.readouterr().out == 2 * "  gone.jpg: \n"
    page = (tmp_path / "samples.html").read_text()
    assert "(no words)" in page and "the file is gone" in page


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", "[{}]", '[{"epoch": 1}]', '[{"epoch": 1, "captions": [{"image": 1}]}]', '[{"captions": []}]'],
)
def test_damaged_samples_are_one_line(images, state, tmp_path, text):
    (tmp_path / "samples.json").write_text(text)
    with pytest.raises(UserError, match="samples.json .*: delete it") as raised:
        show(2, images, state, tmp_path)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "samples.json").read_text() == text


def test_there_are_no_samples_at_first(tmp_path):
    assert _read_samples(tmp_path / "samples.json") == []


def test_a_training_leaves_its_samples_and_no_events(trained):
    first, second = json.loads((trained / "run" / "samples.json").read_text())
    assert (first["epoch"], second["epoch"]) == (1, 2)
    shown = [record["image"] for record in first["captions"]]
    assert shown == [record["image"] for record in second["captions"]] and len(set(shown)) == _SAMPLES
    validation = json.loads((trained / "data" / "validation.json").read_text())
    assert {record["image_id"] for record in first["captions"]} <= {image["image_id"] for image in validation}
    epochs = columns(trained / "run" / "samples.html")
    assert len(epochs) == _SAMPLES and set(map(tuple, epochs.values())) == {(1, 2)}
    assert not (trained / "run" / "tensorboard").exists()


@pytest.mark.slow
def test_a_training_that_is_continued_goes_on_with_its_samples_and_writes_events(trained, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    import train_image_caption_model

    shutil.copytree(trained / "run", tmp_path / "run")
    before = json.loads((tmp_path / "run" / "samples.json").read_text())
    wanted = ["--run_dir", str(tmp_path / "run"), "--epochs", "3", "--tensorboard", "yes"]
    train_image_caption_model.main([*options(trained), *wanted])
    after = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert after[:2] == before and after[2]["epoch"] == 3
    assert set(map(tuple, columns(tmp_path / "run" / "samples.html").values())) == {(1, 2, 3)}
    printed = capsys.readouterr().out
    for record in after[2]["captions"]:
        assert record["caption"] in printed
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
