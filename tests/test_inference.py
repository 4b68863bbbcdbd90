import dataclasses
import json
import re
import shutil
import socket

import data_utils
import inference_image_caption as inference
import train_image_caption_model as training
from command_line import UserError, parse_command_line
from conftest import full_disk, options

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image


def infer(root, *more):
    inference.main([*options(root), *more])


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_validation_images_are_captioned_printed_and_plotted(trained, tmp_path, capsys):
    (tmp_path / ".tmp-999999999-1-001.png").touch()  # of a run that was killed
    infer(trained, "--output", str(tmp_path), "--plot_images", "3")
    assert not list(tmp_path.glob(".tmp*"))
    written = records(tmp_path / "captions.jsonl")
    assert len(written) == 3
    validation = json.loads((trained / "data" / "validation.json").read_text())
    by_id = {image["image_id"]: image for image in validation}
    printed = capsys.readouterr().out
    for record in written:
        assert record["caption"] == " ".join(record["words"])
        assert record["caption"] in printed
        for reference in by_id[record["image_id"]]["references"]:
            assert reference in printed
        weights = np.array(record["attention_weights"])
        assert weights.shape == (len(record["words"]), 64)
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-3)
        assert record["log_probability"] < 0
    assert len(list(tmp_path.glob("*.png"))) == 3

    infer(trained, "--output", str(tmp_path / "again"), "--plot_images", "3")
    assert records(tmp_path / "again" / "captions.jsonl") == written  # the choice depends on the seed


@pytest.mark.parametrize("most", [0, 2, 3, 4])
def test_no_more_figures_are_drawn_than_asked_for(trained, tmp_path, capsys, most):
    infer(trained, "--output", str(tmp_path), "--plot_images", "3", "--figures", str(most))
    assert len(records(tmp_path / "captions.jsonl")) == 3
    assert [figure.name[:3] for figure in sorted(tmp_path.glob("*.png"))] == ["001", "002", "003"][:most]
    printed = capsys.readouterr().out
    assert f"and {min(most, 3)} attention figures are in" in printed
    assert ("--figures 3 draws all" in printed) == (most < 3)


def test_each_image_gets_its_own_cached_features(tmp_path):
    config, _ = parse_command_line(["--features_dir", str(tmp_path), "--decode_batch", "2"], "")
    images = [{"file_name": f"{number}.jpg", "number": number} for number in range(5)]
    for image in images:
        np.save(data_utils.feature_path(image, config), np.full((64, 2048), image["number"], np.float16))
    batches = list(inference.cached_batches(images, config))
    assert [features.shape for _, features in batches] == [(2, 64, 2048), (2, 64, 2048), (1, 64, 2048)]
    numbers = [[image["number"] for image in images] for images, _ in batches]
    assert numbers == [features[:, 0, 0].numpy().tolist() for _, features in batches] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("extract_batch", "sizes"), [("2", [4, 3, 4]), ("8", [7, 4])])
def test_each_picture_of_many_gets_its_own_features(tmp_path, monkeypatch, capsys, extract_batch, sizes):
    """However the batches of extraction and of decoding lie."""
    for number in range(14):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "05.png").write_bytes(b"broken")
    for number in (8, 9):  # a whole batch of extraction
        (tmp_path / f"{number:02d}.png").write_bytes(b"broken")
    monkeypatch.setattr(inference, "EXTRACTED", 10)
    monkeypatch.setattr(
        inference,
        "feature_network",
        lambda config: lambda pixels: tf.fill((len(pixels), 64, 2048), 1.0) * tf.cast(pixels[:, :1, :1, 0], "float32"),
    )
    config, _ = parse_command_line(["--extract_batch", extract_batch, "--decode_batch", "4"], "")
    batches = list(inference.extract_batches(inference.own_images([str(tmp_path)], tmp_path), config))
    assert [len(images) for images, _ in batches] == sizes
    numbers = [[int(image["path"].stem) for image in images] for images, _ in batches]
    assert sum(numbers, []) == [0, 1, 2, 3, 4, 6, 7, 10, 11, 12, 13]
    assert numbers == [features[:, 0, 0].tolist() for _, features in batches]
    assert capsys.readouterr().out.count("cannot be read") == 3


def test_own_pictures_in_files_and_folders_and_a_bad_one(trained, tmp_path, monkeypatch, capsys):
    pictures = tmp_path / "pictures" / "deep" / "deeper"
    pictures.mkdir(parents=True)
    Image.new("RGB", (80, 200), "red").save(pictures / "portrait.png")
    (pictures / "notes.txt").write_text("not a picture, and not taken for one")
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    monkeypatch.setattr(inference, "feature_network", lambda config: lambda pixels: tf.zeros((len(pixels), 64, 2048)))
    with pytest.raises(SystemExit) as stopped:
        infer(trained, "--image", str(tmp_path / "broken.jpg"), str(tmp_path / "pictures"), "--output", str(tmp_path))
    assert stopped.value.code == 1
    assert "broken.jpg cannot be read" in capsys.readouterr().out
    (record,) = records(tmp_path / "captions.jsonl")
    assert record["image"].endswith("portrait.png")
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_pictures_from_the_web_among_files_and_bad_ones(trained, tmp_path, server, monkeypatch, capsys):
    Image.new("RGB", (80, 200), "red").save(server.folder / "red.png")
    Image.new("RGB", (80, 200), "blue").save(tmp_path / "blue.png")
    (server.folder / "notes.txt").write_text("no picture")
    (server.folder / "huge.jpg").write_bytes(bytes(20_000))
    monkeypatch.setattr(inference, "LARGEST", 10_000)
    (tmp_path / "secret").write_text("of this machine")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{closed.getsockname()[1]}/a.jpg"
    red = f"{server.url}/red.png?size=../../large"
    bad = {
        f"{server.url}/notes.txt": "cannot be read as an image",
        f"{server.url}/missing.jpg": "404",
        f"{server.url}/huge.jpg": "longer than 10,000 bytes",
        refused: "refused",
        f"file://{tmp_path / 'secret'}": "only http and https",
        "http://[half": "Invalid IPv6 URL",
    }
    monkeypatch.setattr(inference, "feature_network", lambda config: lambda pixels: tf.zeros((len(pixels), 64, 2048)))
    with pytest.raises(SystemExit) as stopped:
        infer(trained, "--image", red, *bad, red, str(tmp_path / "blue.png"), "--output", str(tmp_path / "out"))
    assert stopped.value.code == 1
    printed = capsys.readouterr().out.splitlines()
    for address, reason in bad.items():
        (line,) = [line for line in printed if address in line]
        assert reason in line
    assert [record["image"] for record in records(tmp_path / "out" / "captions.jsonl")] == [
        red,
        str(tmp_path / "blue.png"),
    ]
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    kept = {path.name.rsplit("_", 1)[0] for path in (tmp_path / "out" / "downloads").iterdir()}
    assert kept == {"red_png", "notes_txt"}


def test_a_picture_from_the_web_is_fetched_anew(trained, tmp_path, server, monkeypatch):
    seen = []

    def network(pixels):
        seen.append(np.asarray(pixels).mean((0, 1, 2)).tolist())
        return tf.zeros((len(pixels), 64, 2048))

    monkeypatch.setattr(inference, "feature_network", lambda config: network)
    for colour in ((255, 0, 0), (0, 0, 255)):
        Image.new("RGB", (30, 30), colour).save(server.folder / "webcam.png")
        infer(trained, "--image", f"{server.url}/webcam.png", "--output", str(tmp_path))
    assert seen == [[255, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize(
    "address", ["http://a/../../x.jpg", "http://a/", "http://a/" + "x" * 5000, "http://a/é\\..\\b"]
)
def test_no_address_leads_out_of_the_folder_or_to_anothers_file(tmp_path, address):
    first, second = (image["path"] for image in inference.own_images([address, address + "?"], tmp_path))
    assert first.parent == second.parent == tmp_path and first != second
    assert re.fullmatch("[A-Za-z0-9_]{1,80}", first.name)


def test_new_pictures_are_refused_where_another_program_made_the_features(trained, tmp_path):
    Image.new("RGB", (80, 200), "red").save(tmp_path / "a.png")
    with pytest.raises(UserError, match="made by another program"):
        infer(trained, "--image", str(tmp_path / "a.png"))


def test_an_exported_model_computes_in_float32(trained, tmp_path, monkeypatch):
    exported = []
    monkeypatch.setattr(inference, "feature_network", lambda config: config.extract_precision)
    monkeypatch.setattr(inference, "export_captioner", lambda _, network, config, folder: exported.append(network))
    infer(trained, "--export", str(tmp_path / "model"), "--extract_precision", "bfloat16")
    assert exported == ["float32"]


def test_inference_before_training_names_the_command(trained, tmp_path):
    with pytest.raises(UserError, match="run python train_image_caption_model.py first"):
        infer(trained, "--run_dir", str(tmp_path / "nothing"))


def test_a_run_of_other_sizes_or_words_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="--units 16, not 20"):
        infer(trained, "--units", "20")
    shutil.copytree(trained / "run", tmp_path / "run")
    vocabulary = json.loads((trained / "run" / "vocabulary.json").read_text())
    (tmp_path / "run" / "vocabulary.json").write_text(json.dumps(vocabulary[:4] + vocabulary[:3:-1]))
    with pytest.raises(UserError, match="another vocabulary"):
        infer(trained, "--run_dir", str(tmp_path / "run"))


def test_a_folder_without_pictures_is_one_line(trained, tmp_path):
    with pytest.raises(UserError, match="no image file"):
        infer(trained, "--image", str(tmp_path))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 40])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (1200, 100)])
def test_figures_of_any_number_of_words_and_any_shape(tmp_path, count, size):
    Image.new("RGB", size, "white").save(tmp_path / "image.png")
    weights = np.random.default_rng(0).random((count, 64))
    words = [f"word{i}" for i in range(count)]
    caption = {"path": tmp_path / "image.png", "words": words, "caption": " ".join(words), "attention_weights": weights}
    inference.plot_attention(caption, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.width > 100
        dark = (np.asarray(figure.convert("L")) < 128).mean()
    assert dark > 0.02 if count else dark < 0.1  # the attention panels darken what was not looked at


@pytest.mark.parametrize("data", [b"", b"P6 20000 20000 255\n"])  # the second is more than Pillow opens
def test_an_image_damaged_since_its_features_were_made_is_one_line(tmp_path, data):
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with pytest.raises(UserError, match="image.png cannot be drawn"):
        inference.plot_attention({"path": path}, tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("size", "panel"), [((1, 1), (190, 190)), ((40, 20), (190, 95)), ((1, 5000), (1, 570)), ((5000, 1), (190, 1))]
)
def test_panels_fill_their_room_whatever_the_image(tmp_path, size, panel):
    Image.new("RGB", size, "red").save(tmp_path / "image.png")
    weights = np.ones((12, 64))
    caption = {"path": tmp_path / "image.png", "words": ["w"] * 12, "caption": "w", "attention_weights": weights}
    inference.plot_attention(caption, tmp_path / "figure.png")
    figure = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB")).astype(int)
    assert max(figure.shape) < 2500
    title, below = figure[: inference.LINE], figure[inference.LINE :]
    assert title.min() < 100  # there is one,
    assert title[0].min() == 255  # which does not touch the edge
    column = below[:, : inference.PANEL_WIDTH + inference.GAP]  # three panels, one below the other
    red = (column == (255, 0, 0)).all(axis=2)
    assert (red.any(axis=0).sum(), red.any(axis=1).sum()) == (panel[0], 3 * panel[1])


def test_a_full_disk_is_one_line_that_names_the_figure(trained, tmp_path):
    with full_disk(500), pytest.raises(UserError, match=r"cannot write .*\.png: .* MB free there"):
        infer(trained, "--output", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]


@pytest.mark.parametrize("size", [(640, 480), (480, 640)])
def test_the_light_falls_where_the_weight_is(size):
    weights = np.zeros(64)
    weights[8 * 1 + 6] = 1.0  # second row, seventh column
    light = inference.upsample(weights, size)
    width, height = size
    assert light.shape == (height, width)
    assert light.max() == 1.0
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert abs(row / height - 1.5 / 8) < 0.03
    assert abs(column / width - 6.5 / 8) < 0.03
    along = light[row]  # smooth: no steps as nearest-neighbour would give
    assert np.abs(np.diff(along)).max() < 0.05


def test_karpathys_splits_are_prepared_trained_on_and_scored(coco, capsys):
    """Every third image is a test image: none of them is trained on, and all of them are scored."""
    captions = json.loads((coco / "coco" / "annotations" / "captions_train2014.json").read_text())
    images = []
    for image in captions["images"]:
        texts = [record["caption"] for record in captions["annotations"] if record["image_id"] == image["id"]]
        split = "test" if image["id"] % 3 == 0 else "val" if image["id"] % 5 == 0 else "train"
        sentences = [{"raw": text, "tokens": text.split()} for text in texts]
        images.append({"imgid": image["id"], "filename": image["file_name"], "split": split, "sentences": sentences})
    (coco / "dataset.json").write_text(json.dumps({"dataset": "flickr8k", "images": images}))
    argv = [*options(coco), "--dataset", "karpathy", "--karpathy_json", str(coco / "dataset.json")]
    argv += ["--images", str(coco / "coco" / "train2014")]
    data_utils.main(argv)
    training.main([*argv, "--epochs", "1"])
    inference.main([*argv, "--evaluate", "--split", "test", "--output", str(coco / "scores")])

    expected = {image["imgid"] for image in images if image["split"] == "test"}
    trained_on = {image["image_id"] for image in json.loads((coco / "data" / "train.json").read_text())}
    assert not trained_on & expected
    (results,) = (coco / "scores").glob("captions_*greedy_results.json")
    assert {record["image_id"] for record in json.loads(results.read_text())} == expected
    assert "CIDEr" in capsys.readouterr().out

    inference.main([*argv, "--output", str(coco / "figures")])  # validation images are drawn from where they lie
    assert len(list((coco / "figures").glob("*.png"))) == 2


def test_a_split_that_is_not_there_is_one_line(trained):
    with pytest.raises(UserError, match="no test split"):
        infer(trained, "--evaluate", "--split", "test")


def test_long_captions_are_decoded_to_their_end(trained, tmp_path, monkeypatch):
    """A first pass of few words must change nothing of what is said in the end."""
    argv = [*options(trained), "--run_dir", str(tmp_path)]
    training.main([*argv, "--epochs", "6", "--schedule", "constant"])
    config, _ = parse_command_line(argv, "")
    captioner = inference.load_captioner(config)
    images = inference.split_images("validation", config)
    config = dataclasses.replace(config, max_words=12, repeat_block=0)

    def captions():
        batches = inference.cached_batches(images, config)
        return [caption for batch in batches for caption in inference.caption_batch(captioner, *batch, config)]

    whole = captions()
    assert max(len(caption["words"]) for caption in whole) > 2
    monkeypatch.setattr(inference, "SHORT", 2)
    for short_first, at_once in zip(captions(), whole, strict=True):
        assert short_first["words"] == at_once["words"]
        assert short_first["log_probability"] == pytest.approx(at_once["log_probability"], rel=1e-4)
        np.testing.assert_allclose(short_first["attention_weights"], at_once["attention_weights"], atol=1e-5)
