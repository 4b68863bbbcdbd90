import json
import shutil
import struct
import threading
import zipfile
import zlib

import data_utils
import inference_image_caption
import train_image_caption_model
from command_line import UserError, make_config, parse_command_line
from conftest import IMAGES, full_disk, options, write_coco

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image


def prepare(root, *more):
    argv = [*options(root), *more]
    data_utils.main(argv)
    config, _ = parse_command_line(argv, "")
    return config, data_utils.load_prepared(config)


def file_names(images):
    return {image["file_name"] for image in images}


# --- Preparing, by the script's own entry point


def test_the_split_is_by_image_and_the_vocabulary_is_the_training_captions(coco):
    captions_file = coco / "coco" / "annotations" / "captions_train2014.json"
    data = json.loads(captions_file.read_text())
    for annotation in data["annotations"]:  # a word of its own for each image
        annotation["caption"] += f" word{annotation['image_id']}"
    captions_file.write_text(json.dumps(data))

    _, prepared = prepare(coco)
    train, validation = file_names(prepared.train), file_names(prepared.validation)
    assert not train & validation
    assert len(train | validation) == IMAGES
    assert len(validation) == 5  # 20 % of 24, rounded up
    own_words = {f"word{image['image_id']}" for image in prepared.train}
    assert {word for word in prepared.vocabulary if word.startswith("word")} == own_words
    assert prepared.vocabulary[:4] == ["<pad>", "<unk>", "<start>", "<end>"]


def test_captions_become_ids_and_back(coco):
    _, prepared = prepare(coco)
    for image in prepared.train:
        for caption, ids in zip(image["captions"], image["ids"], strict=True):
            assert (ids[0], ids[-1]) == (data_utils.START, data_utils.END)
            words = "".join(letter if letter.isalpha() or letter == "'" else " " for letter in caption.lower()).split()
            assert [prepared.vocabulary[i] for i in ids[1:-1]] == words


def test_the_vocabulary_is_the_most_frequent_words_up_to_vocab_size(coco):
    _, prepared = prepare(coco, "--vocab_size", "10")
    assert len(prepared.vocabulary) == 10
    counts = {}
    for image in prepared.train:
        for caption in image["captions"]:
            for word in caption.lower().replace(".", "").replace(",", "").split():
                counts[word] = counts.get(word, 0) + 1
    least_kept = min(counts[word] for word in prepared.vocabulary[4:])
    assert all(count <= least_kept for word, count in counts.items() if word not in prepared.vocabulary)
    assert any(data_utils.UNK in ids for image in prepared.train for ids in image["ids"])


def test_the_draw_is_of_captions_and_fixed_by_the_seed(coco):
    def drawn(*more):
        _, prepared = prepare(coco, "--num_examples", "30", *more)
        images = prepared.train + prepared.validation
        return sorted((image["image_id"], caption) for image in images for caption in image["captions"]), prepared

    first, prepared = drawn()
    assert len(first) == 30
    assert all(len(image["references"]) == 5 for image in prepared.validation)  # the metrics use them all
    assert drawn()[0] == first
    assert drawn("--seed", "1")[0] != first


def test_preparing_again_remakes_damaged_features_only(coco, monkeypatch):
    features = coco / "data" / "features"
    paths = sorted(features.glob("*.npy"))
    nan = np.load(paths[4])
    nan[3, 3] = np.nan
    damages = {
        paths[0]: b"",
        paths[1]: paths[1].read_bytes()[:-100],
        paths[2]: paths[2].read_bytes().replace(b"(64, 2048)", b"(32, 4096)"),
        paths[3]: paths[3].read_bytes().replace(b"<f2", b"<i2"),
    }
    for path, data in damages.items():
        path.write_bytes(data)
    np.save(paths[4], nan)
    paths[5].unlink()
    (coco / "data" / ".tmp-999999999-1-train.json").touch()  # of a run that was killed
    untouched = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths[6:]}

    monkeypatch.setattr(
        data_utils, "feature_network", lambda config, paths: lambda pixels: tf.ones((len(pixels), 64, 2048)) * 0.5
    )
    prepare(coco)
    for path in paths[:6]:
        assert (np.load(path) == np.full((64, 2048), 0.5, np.float16)).all()
    assert not list((coco / "data").glob(".tmp*"))
    for path, (time, data) in untouched.items():
        assert (path.stat().st_mtime_ns, path.read_bytes()) == (time, data)


def test_an_interrupt_waits_for_no_batch_and_finished_features_stay(coco, monkeypatch):
    """The first batch is done and the interrupt comes as it is written, while others are being computed."""
    for path in (coco / "data" / "features").glob("*.npy"):
        path.unlink()
    config, _ = parse_command_line(options(coco), "")
    first = data_utils.image_path(data_utils.read_splits(config)["train"][0], config)
    made, waited, released = [], [], threading.Event()

    def extract_batch(network, paths):
        if paths != [first] and not released.is_set():
            waited.append(released.wait(20))
        made.extend(paths)
        return paths, np.zeros((len(paths), 64, 2048), np.float32), []

    def interrupted(path, feature):
        write_npy(path, feature)
        raise KeyboardInterrupt

    write_npy = data_utils.write_npy
    monkeypatch.setattr(data_utils, "feature_network", lambda config, paths: None)
    monkeypatch.setattr(data_utils, "extract_batch", extract_batch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data_utils, "write_npy", interrupted)
        data_utils.main([*options(coco), "--extract_batch", "1"])
    assert not waited
    assert made == [first]
    released.set()
    prepare(coco)
    assert made.count(first) == 1
    assert len(set(made)) == IMAGES


def test_a_full_disk_is_one_line_and_no_finished_feature_is_made_again(coco, monkeypatch):
    features = coco / "data" / "features"
    paths = sorted(features.glob("*.npy"))
    paths[0].unlink()
    before = {path: path.read_bytes() for path in paths[1:]}
    made = []
    monkeypatch.setattr(
        data_utils,
        "feature_network",
        lambda config, paths: lambda pixels: made.append(len(pixels)) or tf.zeros((len(pixels), 64, 2048)),
    )
    with full_disk(100_000), pytest.raises(UserError, match=rf"cannot write {paths[0]}: .* MB free there; make room"):
        data_utils.main(options(coco))
    assert {path: path.read_bytes() for path in features.iterdir() if path.suffix == ".npy"} == before
    prepare(coco)
    assert made == [1, 1]
    assert {path: path.read_bytes() for path in paths[1:]} == before


def test_an_image_that_cannot_be_read_is_named_skipped_and_counted(coco, monkeypatch, capsys):
    bad = "COCO_train2014_000000000007"
    (coco / "coco" / "train2014" / f"{bad}.jpg").write_text("no image")
    (coco / "data" / "features" / f"{bad}.npy").unlink()
    monkeypatch.setattr(data_utils, "feature_network", lambda config, paths: None)
    _, prepared = prepare(coco)
    assert len(prepared.train + prepared.validation) == IMAGES - 1
    assert f"{bad}.jpg" not in file_names(prepared.train + prepared.validation)
    printed = capsys.readouterr()
    assert f"{bad}.jpg cannot be read" in printed.out + printed.err
    assert list(json.loads((coco / "data" / "skipped.json").read_text())) == [f"{bad}.jpg"]


def test_records_that_cannot_be_used_are_left_out(coco, capsys):
    path = coco / "coco" / "annotations" / "captions_train2014.json"
    data = json.loads(path.read_text())
    data["images"] += [
        {"id": 901, "file_name": "../../escape.jpg"},
        {"id": 902},
        {"id": 1, "file_name": "again.jpg"},
        {"id": 903, "file_name": "COCO_train2014_000000000001.png"},
        {"id": 904, "file_name": "without_caption.jpg"},
    ]
    data["annotations"] += [
        {"id": 1, "image_id": 999, "caption": "no such image"},
        {"id": 2, "image_id": 1, "caption": " !? "},
        {"id": 3, "image_id": 1, "caption": None},
        {"id": 4, "image_id": 1, "caption": "word " * 500},
        "nonsense",
    ]
    path.write_text(json.dumps(data))
    _, prepared = prepare(coco)
    images = prepared.train + prepared.validation
    assert len(images) == IMAGES
    assert sum(len(image["captions"]) for image in images) == IMAGES * 5
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["not json", "[1, 2]", '{"images": []}', '{"images": [], "annotations": []}'])
def test_a_wrong_captions_file_is_one_line(coco, text):
    (coco / "coco" / "annotations" / "captions_train2014.json").write_text(text)
    with pytest.raises(UserError, match="captions_train2014.json"):
        prepare(coco)


@pytest.mark.parametrize("name", data_utils.PREPARED_SETTINGS)
@pytest.mark.parametrize("main", [train_image_caption_model.main, inference_image_caption.main])
def test_a_setting_that_contradicts_what_was_prepared_is_named(trained, monkeypatch, main, name):
    config, _ = parse_command_line(options(trained), "")
    value = getattr(config, name)
    other = (
        "demo" if name == "dataset" else f"{value}x" if isinstance(value, str) else 3 if value is None else value * 2
    )
    argv = [*options(trained), f"--{name}", str(other)]
    said = value if value != "" else "''"
    monkeypatch.setattr(train_image_caption_model, "open_run", None)  # no work is begun
    with pytest.raises(UserError, match=f"prepared with --{name} {said}, not {other}: give --{name} {said}, or run"):
        main(argv)


def test_nothing_prepared_names_the_command(tmp_path):
    with pytest.raises(UserError, match="run python data_utils.py --dataset demo"):
        data_utils.load_prepared(make_config({"dataset": "demo", "data_dir": str(tmp_path)}))


def edited(change):
    """A function from a JSON file's bytes to those of the value that `change` makes of its value."""
    return lambda data: json.dumps(change(json.loads(data))).encode()


def with_first(**values):
    return edited(lambda images: [{**images[0], **values}, *images[1:]])


DAMAGES = [
    ("settings.json", edited(lambda value: [value])),
    ("vocabulary.json", edited(lambda words: dict.fromkeys(words))),
    ("vocabulary.json", edited(lambda words: [*words, 7])),
    ("vocabulary.json", edited(lambda words: words[4:])),
    ("vocabulary.json", edited(lambda words: [*words, words[-1]])),
    ("train.json", edited(lambda images: {"images": images})),
    ("train.json", edited(lambda images: [*images, None])),
    ("validation.json", edited(lambda images: [])),
    ("train.json", with_first(file_name="../escape.jpg")),
    ("train.json", with_first(image_id="1")),
    ("train.json", with_first(captions="A red dog.")),
    ("train.json", with_first(references=[3])),
    ("train.json", with_first(ids=[[2, 3]])),
    ("train.json", with_first(captions=["a", "b"], ids=[[2, True, 3], [2, 5, 3]])),
    ("train.json", with_first(captions=["a"], ids=[[2, -1, 3]])),
    ("train.json", with_first(captions=["a"], ids=[[2, 21, 3]])),  # there are 21 words
    ("feature_statistics.npz", lambda data: data[:-100]),
    ("feature_statistics.npz", lambda data: data[:200] + bytes(8) + data[208:]),
]
FILES = ("settings.json", "vocabulary.json", "train.json", "validation.json", "feature_statistics.npz")


@pytest.mark.parametrize(
    ("name", "damage"),
    [*DAMAGES, *((name, damage) for name in FILES for damage in (None, lambda data: b"", lambda data: data[:-20]))],
)
def test_a_damaged_prepared_file_is_named_with_the_command(trained, tmp_path, name, damage):
    shutil.copytree(trained / "data", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("features"))
    argv = [*options(trained), "--data_dir", str(tmp_path), "--features_dir", str(trained / "data" / "features")]
    settings = json.loads((tmp_path / "settings.json").read_text())
    settings["features_dir"] = argv[-1]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    config, _ = parse_command_line(argv, "")
    data_utils.load_prepared(config)
    if damage:
        (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    else:
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name) as raised:
        data_utils.load_prepared(config)
    assert "run python data_utils.py" in str(raised.value)
    assert "\n" not in str(raised.value)


# --- Downloads, from a server on this machine


def test_only_the_images_needed_are_fetched_and_only_once(coco, server):
    """Captions file and image folder are absent: the archive gives the one, coco_url the others."""
    source = write_coco(server.folder / "source")
    captions_file = source / "annotations" / "captions_train2014.json"
    data = json.loads(captions_file.read_text())
    for image in data["images"]:
        image["coco_url"] = f"{server.url}/source/train2014/{image['file_name']}"
    data["images"][2]["coco_url"] = f"{server.url}/missing.jpg"
    captions_file.write_text(json.dumps(data))
    archive = server.folder / "annotations" / "annotations_trainval2014.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        file.write(captions_file, "annotations/captions_train2014.json")
        file.writestr("annotations/captions_val2014.json", "{}")
    server.publish(archive)

    for path in (coco / "coco").rglob("*.*"):
        path.unlink()
    for path in (coco / "data" / "features").glob("*.npy"):
        path.unlink()
    server.monkeypatch.setattr(
        data_utils, "feature_network", lambda config, paths: lambda pixels: tf.zeros((len(pixels), 64, 2048))
    )
    _, prepared = prepare(coco, "--num_examples", "12")
    images = prepared.train + prepared.validation
    fetched = {path.name for path in (coco / "coco" / "train2014").iterdir()}
    drawn = file_names(images) | set(json.loads((coco / "data" / "skipped.json").read_text()))
    assert fetched == file_names(images)
    assert len(drawn) <= 12
    assert sum(len(image["captions"]) for image in images) >= 12 - 5

    before = len(server.requests)
    prepare(coco, "--num_examples", "12")
    assert [path for path in server.requests[before:] if path != "/missing.jpg"] == []


def test_the_zip_of_all_images_is_the_other_way(coco, server):
    archive = server.folder / "zips" / "train2014.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for path in (coco / "coco" / "train2014").iterdir():
            file.write(path, f"train2014/{path.name}")
            path.unlink()
    server.publish(archive)
    for path in (coco / "data" / "features").glob("*.npy"):
        path.unlink()
    server.monkeypatch.setattr(
        data_utils, "feature_network", lambda config, paths: lambda pixels: tf.zeros((len(pixels), 64, 2048))
    )
    _, prepared = prepare(coco, "--image_source", "zip")
    assert len(prepared.train + prepared.validation) == IMAGES
    assert len(list((coco / "coco" / "train2014").iterdir())) == IMAGES


# --- Images


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
    pixels = data_utils.load_image(make(tmp_path))
    assert pixels.shape == (299, 299, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.mean((0, 1)), RED, atol=8)


def test_grey_16_bit_and_transparent_images_keep_their_brightness(tmp_path):
    grey = save(Image.new("L", (50, 50), 100), tmp_path / "grey.png")
    deep = save(Image.fromarray(np.full((50, 50), 100 * 257, np.uint16)), tmp_path / "deep.png")
    clear = save(Image.new("RGBA", (50, 50), (0, 0, 0, 0)), tmp_path / "clear.png")
    for path, value in ((grey, 100), (deep, 100), (clear, 255)):
        np.testing.assert_allclose(data_utils.load_image(path), value, atol=1)


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (400, 200), RED)
    picture.paste((20, 20, 220), (0, 0, 200, 200))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right: blue on top
    pixels = data_utils.load_image(save(picture, tmp_path / "a.jpg", exif=exif)).astype(int)
    assert (pixels[20, :, 2] > pixels[20, :, 0]).all()
    assert (pixels[-20, :, 0] > pixels[-20, :, 2]).all()


def test_only_the_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.new("RGB", (50, 50), colour) for colour in (RED, (20, 20, 220), (20, 220, 20))]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(data_utils.load_image(path).mean((0, 1)), RED, atol=8)


def test_an_image_of_20000_by_20000_pixels_is_refused_before_it_is_decoded(tmp_path):
    """A PNG file of 1 kB, which would take 400 MB; its data are cut off, which decoding would complain of."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)  # 1 bit a pixel
    data = zlib.compress(bytes(1_000_000))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data))
    with pytest.raises(ValueError, match="a.png cannot be read .*400000000 pixels"):
        data_utils.load_image(tmp_path / "a.png")


@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xd8\xff\xe0 broken"])
def test_what_is_no_image_is_named(tmp_path, data):
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="bad.jpg cannot be read"):
        data_utils.load_image(path)


def test_postscript_is_not_run(tmp_path):
    with pytest.raises(ValueError, match="PostScript is a program"):
        data_utils.load_image(save(Image.new("RGB", (50, 50), RED), tmp_path / "a.jpg", format="EPS"))


# --- Features


def test_inception_end_to_end_with_random_weights(coco):
    """Images in, (64, 2048) out, in range; the same network again for new pictures; another one is refused."""
    features = coco / "data" / "features"
    for path in features.glob("*.npy"):
        path.unlink()
    config, prepared = prepare(coco)
    paths = sorted(features.glob("*.npy"))
    assert len(paths) == IMAGES
    first = np.load(paths[0])
    assert first.shape == (64, 2048)
    assert first.dtype == np.float16
    assert 0.05 < first.astype(float).std() < 20  # the activations neither vanish nor explode
    sample = np.stack([np.load(data_utils.feature_path(image, config)) for image in prepared.train]).astype(float)
    np.testing.assert_allclose(prepared.feature_mean, sample.mean((0, 1)), atol=1e-3)
    assert prepared.feature_std == pytest.approx(np.std(sample - sample.mean((0, 1))), rel=1e-3)

    network = data_utils.feature_network(config)
    pixels = data_utils.load_image(coco / "coco" / "train2014" / f"{paths[0].stem}.jpg")
    with data_utils.extraction_graphs(config):
        again = network(tf.constant(pixels[np.newaxis]))[0].numpy()
    assert np.abs(again - first).mean() < 0.05 * first.astype(float).std()

    with pytest.raises(UserError, match="made with other weights"):
        data_utils.feature_network(parse_command_line([*options(coco), "--seed", "1"], "")[0])


def test_extraction_leaves_the_rewriting_of_other_graphs_as_it_was():
    def rewriting():
        options = tf.config.optimizer.get_experimental_options()
        return options["auto_mixed_precision_onednn_bfloat16"], options["arithmetic_optimization"]

    config, _ = parse_command_line(["--extract_precision", "bfloat16"], "")
    with pytest.raises(KeyboardInterrupt), data_utils.extraction_graphs(config):
        assert rewriting() == (True, False)
        raise KeyboardInterrupt
    assert rewriting() == (False, True)


def test_missing_and_unfit_weights_are_one_line(coco):
    for weights in ("nowhere.h5", str(coco / "coco" / "annotations" / "captions_train2014.json")):
        config, _ = parse_command_line([*options(coco), "--inception_weights", weights], "")
        with pytest.raises(UserError, match="--inception_weights") as raised:
            data_utils.feature_network(config, [])
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_are_read_in_the_graph_as_numpy_reads_them(tmp_path, dtype):
    features = np.random.default_rng(0).standard_normal((64, 2048)).astype(dtype)
    np.save(tmp_path / "a.npy", features)
    read = tf.function(data_utils.read_feature)(str(tmp_path / "a.npy"))
    assert read.shape == (64, 2048)
    np.testing.assert_array_equal(read, features.astype(np.float32))


def test_pipelines_keep_the_order_and_do_without_the_tuning_thread():
    dataset = data_utils.parallel_map(lambda i: 2 * i, np.arange(100)).batch(50).prefetch(1)
    assert dataset.options().autotune.enabled is False
    assert [i for batch in dataset for i in batch.numpy()] == list(range(0, 200, 2))
