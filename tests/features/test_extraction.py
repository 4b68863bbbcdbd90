import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from captioning.data.captioned_images import CaptionedImage, image_path, name_features
from captioning.features import extraction
from captioning.features.cache import feature_path, features_folder, random_statistics
from captioning.features.cnn import CNNS
from captioning.features.extraction import _CALIBRATION_IMAGES, cache_features, calibration_paths, extract_features
from captioning.features.manifest import _MANIFEST, MADE_ELSEWHERE, read_manifest, scan_features
from captioning.features.missing import find_missing
from captioning.features.network import network_identity
from captioning.settings import make_config
from conftest import let_time_pass
from support.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent.parent
COUNT = 6
READING = ("support.file_states.read_state", "captioning.features.missing.check_feature_file")  # of features


@pytest.fixture
def config(tmp_path):
    return make_config({"coco_dir": str(tmp_path / "coco"), "data_dir": str(tmp_path / "data"), "extract_batch": 4})


@pytest.fixture
def images(config):
    images = [CaptionedImage(number, f"{number}.png") for number in range(COUNT)]
    for image in images:
        draw(image, config, image.image_id)
    return images


def draw(image, config, brightness):
    path = image_path(image, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        let_time_pass(path.parent)
    Image.new("L", (8, 8), brightness).save(path)


@pytest.fixture
def network(monkeypatch):
    """In place of InceptionV3: each image's brightness everywhere. Returns the list of all brightnesses computed."""
    computed = []

    def brightness(pixels):
        values = tf.reduce_mean(tf.cast(pixels, tf.float32), (1, 2, 3))
        computed.extend(values.numpy().round().astype(int).tolist())
        return tf.tile(values[:, None, None], (1, 64, 2048))

    def feature_network(config, statistics, calibration):
        if config.inception_weights == "random" and not statistics.exists():
            statistics.parent.mkdir(parents=True, exist_ok=True)
            statistics.write_bytes(f"of seed {config.seed}".encode())
        return brightness

    monkeypatch.setattr(extraction, "feature_network", feature_network)
    return computed


def run(images, config, shared=False):
    """Extract what is missing, as the script does. Returns how many that was."""
    missing = find_missing(images, config, shared)
    cache_features(missing, [], config, shared)
    return len(missing)


def manifest(config):
    return read_manifest(features_folder(config), scan_features(features_folder(config)))


def brightness_of(image, config):
    features = np.load(feature_path(image, features_folder(config)))
    assert features.min() == features.max()
    return features[0, 0]


def contents(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def forbid(monkeypatch, name):
    monkeypatch.setattr(name, lambda *args: pytest.fail(f"{name} was called"))


# --- What the cache knows of its images


def test_every_image_is_extracted_once_and_a_full_cache_is_not_read(config, images, network, monkeypatch, capsys):
    assert run(images, config) == COUNT
    assert [brightness_of(image, config) for image in images] == list(range(COUNT))
    assert manifest(config).network == "InceptionV3, weights imagenet"
    assert "features: 0 of 6 are in" in capsys.readouterr().out

    before = contents(features_folder(config))
    assert sorted(before) == [*(f"{number}.npy" for number in range(COUNT)), _MANIFEST]
    for name in (*READING, "captioning.features.extraction.load_image"):
        forbid(monkeypatch, name)
    assert run(images, config) == 0
    assert contents(features_folder(config)) == before
    assert "features: 6 of 6 are in" in capsys.readouterr().out


def test_an_image_that_changed_is_extracted_again_and_no_other(config, images, network, capsys):
    run(images, config)
    draw(images[2], config, 200)
    network.clear()
    assert run(images, config) == 1
    assert network == [200]
    assert brightness_of(images[2], config) == 200
    assert "images that have changed since: 1; their features are extracted again" in capsys.readouterr().out
    assert run(images, config) == 0


def test_an_image_replaced_by_one_of_another_ending_is_a_change(config, images, network):
    run(images, config)
    images[1] = dataclasses.replace(images[1], file_name="1.jpg")
    draw(images[1], config, 99)
    network.clear()
    assert run(images, config) == 1
    assert brightness_of(images[1], config) == network[0]


def test_features_outlive_their_images(config, images, network):
    run(images, config)
    shutil.rmtree(config.coco_dir)
    assert run(images, config) == 0


def test_a_copy_of_everything_without_its_times_is_not_extracted_again(config, images, network, tmp_path):
    run(images, config)
    for path in tmp_path.rglob("*.*"):
        os.utime(path, ns=(5, 5))
    assert run(images, config) == 0
    assert {entry.feature.mtime_ns for entry in manifest(config).entries.values()} == {5}  # to be quick the next time
    assert {entry.image.mtime_ns for entry in manifest(config).entries.values()} == {5}


def test_an_image_that_changes_while_it_is_read_is_extracted_again(config, images, network, monkeypatch):
    load_image = extraction.load_image

    def load_and_change(path, side, cut):
        pixels = load_image(path, side, cut)
        if path == image_path(images[3], config):
            draw(images[3], config, 150)
        return pixels

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "load_image", load_and_change)
        run(images, config)
    assert run(images, config) == 1
    assert brightness_of(images[3], config) == 150


def test_damaged_and_missing_features_are_made_again_and_no_other(config, images, network, monkeypatch):
    run(images, config)
    paths = [feature_path(image, features_folder(config)) for image in images]
    let_time_pass(paths[0].parent)
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    paths[2].write_bytes(paths[2].read_bytes().replace(b"(64, 2048)", b"(32, 4096)"))
    paths[3].write_bytes(paths[3].read_bytes().replace(b"<f2", b"<i2"))
    paths[4].unlink()
    untouched = contents(features_folder(config))[paths[5].name]
    network.clear()
    assert run(images, config) == 5
    assert sorted(network) == [0, 1, 2, 3, 4]
    assert [brightness_of(image, config) for image in images] == list(range(COUNT))
    assert contents(features_folder(config))[paths[5].name] == untouched


def test_images_that_cannot_be_read_are_named_and_no_trouble(config, images, network, capsys):
    image_path(images[1], config).write_text("not an image")
    image_path(images[2], config).unlink()
    missing = find_missing(images, config)
    skipped = cache_features(missing, [], config)
    assert list(skipped) == ["1.png", "2.png"]
    assert "1.png cannot be read" in capsys.readouterr().out
    assert find_missing(images, config) == images[1:3]


def forget(image, config):
    """Take the line of an image's feature out of the manifest, as a power cut may."""
    path = features_folder(config) / _MANIFEST
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [
        line
        for line in lines
        if not line.startswith(json.dumps([feature_path(image, features_folder(config)).stem])[:-1].encode())
    ]
    assert len(kept) == len(lines) - 1
    path.write_bytes(b"".join(kept))


@pytest.mark.parametrize("shared", [False, True])
def test_features_whose_lines_are_missing_are_extracted_again(config, images, network, capsys, shared):
    run(images, config)
    for image in images[2:4]:
        forget(image, config)
    network.clear()
    assert run(images, config, shared) == 2
    assert sorted(network) == [2, 3]
    path = feature_path(images[2], features_folder(config))
    assert f"features without a line in the manifest: 2, such as {path}; extracted again" in capsys.readouterr().out
    assert run(images, config) == 0
    for image in images:
        forget(image, config)
    assert run(images, config) == COUNT
    assert run(images, config) == 0


def test_a_feature_whose_new_line_is_missing_is_extracted_again(config, images, network):
    """The image changed, a shard made its feature again, and the power cut left the old line alone."""
    run(images, config)
    draw(images[1], config, 120)
    run(images, config, shared=True)
    (journal,) = manifest(config).journals
    journal.unlink()
    network.clear()
    assert run(images, config) == 1
    assert network == [120]


def test_a_journal_that_was_emptied_blocks_nothing(config, images, network):
    run(images[:4], config)
    run(images[4:], config, shared=True)
    (journal,) = manifest(config).journals
    journal.write_bytes(b"")
    assert run(images, config) == 2
    assert manifest(config).journals == []


def test_a_batch_is_on_the_disk_before_its_features_take_their_names(config, images, network, monkeypatch):
    """One fsync a batch, not one a file."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append("sync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append(pathlib.Path(paths[1]).suffix) or replace(*paths))
    cache_features(images, [], config, shared=True)
    begun = ["sync", ".jsonl", "sync"]  # the first line, and the folder with the file's name
    assert events == [*begun, "sync", *[".npy"] * 4, "sync", *[".npy"] * 2]
    assert len(manifest(config).entries) == COUNT
    events.clear()
    run(images, config)
    assert events == begun  # the manifest, before the journals are deleted


# --- Which network the cache belongs to


def test_a_calibration_is_a_part_of_the_network(config, images, network):
    """Statistics measured on other images, in the same place."""
    config = dataclasses.replace(config, inception_weights="random")
    run(images[:4], config)
    random_statistics(features_folder(config)).write_bytes(b"of other images")
    for shared in (False, True):
        with pytest.raises(UserError, match="made by another network"):
            find_missing(images, config, shared)
    with pytest.raises(UserError, match="features of two networks"):
        cache_features(images[4:], [], config)


def test_a_run_that_began_anew_and_was_stopped_before_it_calibrated_is_continued(config, images, network):
    before, after = (dataclasses.replace(config, inception_weights="random", seed=seed) for seed in (0, 1))
    run(images, before)
    for image in images:
        draw(image, config, 100 + image.image_id)
    assert len(find_missing(images, after)) == COUNT  # and no more
    assert run(images[:3], after, shared=True) == 3
    assert run(images, after) == 3
    assert manifest(config).network == network_identity(after, random_statistics(features_folder(config)))


def test_images_whose_names_differ_in_case_alone_have_features_of_their_own(config, network):
    """Also on a disk that ignores case."""
    names = ("A.png", "b.png", "a.png")
    images = name_features({"train": [CaptionedImage(n, name, str(n)) for n, name in enumerate(names)]})["train"]
    for image in images:
        draw(image, config, 10 * image.image_id)
    assert run(images, config) == 3
    assert [brightness_of(image, config) for image in images] == [0, 10, 20]
    assert len({feature_path(image, features_folder(config)).name.casefold() for image in images}) == 3
    assert feature_path(images[1], features_folder(config)).name == "b.npy"
    assert run(images, config) == 0


def test_another_network_is_refused_though_nothing_is_missing(config, images, network, tmp_path):
    run(images, config)
    weights = tmp_path / "other.h5"
    weights.write_bytes(b"weights")
    other = dataclasses.replace(config, inception_weights=str(weights))
    for shared in (False, True):
        with pytest.raises(UserError) as raised:
            find_missing(images, other, shared)
        line = str(raised.value)
        assert "made by another network (InceptionV3, weights imagenet) than the settings name (InceptionV3, w" in line
        assert f"name another --features_dir, or delete the .npy and .jsonl files in {features_folder(config)}" in line
        assert "\n" not in line
    assert run(images, dataclasses.replace(other, features_dir=str(tmp_path / "another"))) == COUNT
    for path in [*features_folder(config).glob("*.npy"), *features_folder(config).glob("*.jsonl")]:
        path.unlink()
    assert run(images, other) == COUNT


def test_a_cache_of_which_no_feature_fits_its_image_begins_anew(config, images, network):
    """The demo drawn anew with another seed, which random weights depend on too."""
    before, after = (dataclasses.replace(config, inception_weights="random", seed=seed) for seed in (0, 1))
    assert run(images, before) == COUNT
    assert find_missing(images, before) == []

    for image in images[1:]:
        draw(image, config, 100 + image.image_id)
    with pytest.raises(UserError, match="made by another network"):  # one is still the first network's
        find_missing(images, after)
    draw(images[0], config, 100)
    with pytest.raises(UserError, match="made by another network"):  # others may be at work with the first network
        find_missing(images, after, shared=True)
    assert run(images, after) == COUNT
    assert [brightness_of(image, config) for image in images] == [100, 101, 102, 103, 104, 105]
    assert manifest(config).network == network_identity(after, random_statistics(features_folder(config)))
    assert random_statistics(features_folder(config)).read_bytes() == b"of seed 1"


def test_features_of_other_images_keep_a_cache_from_beginning_anew(config, images, network):
    run(images, config)
    draw(images[0], config, 100)
    other = dataclasses.replace(config, inception_weights="random")
    with pytest.raises(UserError, match="made by another network"):
        find_missing(images[:1], other)
    assert len(manifest(config).entries) == COUNT


def test_random_weights_without_their_statistics_are_one_line(config, images, network):
    config = dataclasses.replace(config, inception_weights="random")
    run(images[:3], config)
    random_statistics(features_folder(config)).unlink()
    with pytest.raises(UserError, match="random_statistics.npz is missing, .* name another --features_dir, or delete"):
        find_missing(images, config)


def test_the_cache_is_claimed_before_the_first_feature(config, images, network, monkeypatch):
    def no_features(*args):
        assert manifest(config).network == "InceptionV3, weights imagenet"
        raise UserError("no features")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no features"):
        patch.setattr(extraction, "extract_features", no_features)
        run(images, config, shared=True)
    assert manifest(config).network is None
    assert find_missing(images, dataclasses.replace(config, inception_weights="random")) == images  # it holds nothing


def test_whole_features_that_this_program_did_not_write_are_refused(config, images, network):
    run(images, config)
    path = feature_path(images[4], features_folder(config))
    let_time_pass(path.parent)
    np.save(path, np.ones((64, 2048), np.float16))
    with pytest.raises(UserError, match=rf"{path} is not the feature file that python data_utils.py wrote there"):
        find_missing(images, config)
    path.unlink()
    assert run(images, config) == 1


@pytest.mark.parametrize("first", ["by name", "by path"])
def test_features_of_imagenets_weights_are_the_same_by_name_and_by_path(config, images, network, monkeypatch, first):
    path = pathlib.Path(config.coco_dir, "notop.h5")
    path.write_bytes(b"weights")
    known = dataclasses.replace(CNNS[config.cnn], imagenet_digest=hashlib.md5(b"weights").hexdigest())
    monkeypatch.setitem(CNNS, config.cnn, known)
    by_path = dataclasses.replace(config, inception_weights=str(path))
    before, after = (config, by_path) if first == "by name" else (by_path, config)
    assert run(images, before) == COUNT
    assert run(images, after) == 0
    path.write_bytes(b"others")
    with pytest.raises(UserError, match=r"another network \(InceptionV3, weights imagenet\) than .* \(.*SHA-256"):
        find_missing(images, by_path)


def test_features_of_another_cnn_are_refused(config, images, network):
    run(images, config)
    other = dataclasses.replace(config, cnn="VGG16")
    with pytest.raises(UserError, match=r"another network \(InceptionV3, .*\(VGG16, .*name another --features_dir, or"):
        find_missing(images, other)


# --- Features made elsewhere


@pytest.fixture
def elsewhere(config, images):
    """Every image's features, as another program leaves them."""
    features_folder(config).mkdir(parents=True)
    for image in images:
        np.save(feature_path(image, features_folder(config)), np.full((64, 2048), 50 + image.image_id, np.float16))
    return [feature_path(image, features_folder(config)) for image in images]


def test_features_made_elsewhere_are_used_as_a_whole_and_read_once(config, images, elsewhere, monkeypatch, capsys):
    shutil.rmtree(config.coco_dir)
    assert find_missing(images, config) == []
    assert "features: 6 of 6 are in" in capsys.readouterr().out
    assert manifest(config).network == MADE_ELSEWHERE
    assert len(manifest(config).entries) == COUNT
    before = contents(features_folder(config))

    for name in READING:
        forbid(monkeypatch, name)
    for weights in ("imagenet", "nowhere.h5"):  # which is of no importance
        assert find_missing(images, dataclasses.replace(config, inception_weights=weights)) == []
    assert capsys.readouterr().out.count("already, made elsewhere\n") == 2
    assert contents(features_folder(config)) == before


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("damage", [pathlib.Path.unlink, lambda path: path.write_bytes(b"half")])
def test_a_gap_in_features_made_elsewhere_is_not_filled(config, images, elsewhere, damage, known):
    if known:
        find_missing(images, config)
    damage(elsewhere[2])
    damage(elsewhere[4])
    for shared in (False, True):
        with pytest.raises(UserError) as raised:
            find_missing(images, config, shared)
        assert str(raised.value) == (
            "2 of 6 features are missing, damaged, not of the shape (64, 2048) of --cnn InceptionV3 "
            f"or too large for --feature_dtype float16, such as {elsewhere[2]}. "
            "The features in this folder were made elsewhere, and another network does not fill their gaps: "
            "make these with the program that made the others, or name another --features_dir"
        )
    for path in (elsewhere[2], elsewhere[4]):
        np.save(path, np.zeros((64, 2048), np.float32))
    assert find_missing(images, config) == []


def test_features_made_elsewhere_must_fit_into_the_number_type_that_they_are_read_in(config, images, elsewhere):
    np.save(elsewhere[2], np.full((64, 2048), 70_000, np.float32))
    with pytest.raises(UserError, match=rf"1 of 6 .*too large for --feature_dtype float16, such as {elsewhere[2]}"):
        find_missing(images, config)
    assert find_missing(images, dataclasses.replace(config, feature_dtype="float32")) == []


@pytest.mark.parametrize("known", [False, True])
def test_features_made_elsewhere_must_have_the_shape_of_the_cnn(config, images, elsewhere, known):
    if known:
        find_missing(images, config)
    other = dataclasses.replace(config, cnn="MobileNetV3Large")
    with pytest.raises(UserError, match=r"6 of 6 .*not of the shape \(49, 960\) of --cnn MobileNetV3Large"):
        find_missing(images, other)
    for path in elsewhere:
        np.save(path, np.ones((49, 960), np.float16))
    assert find_missing(images, other) == []
    with pytest.raises(UserError, match=r"6 of 6 features are .*not of the shape \(64, 2048\) of --cnn InceptionV3"):
        find_missing(images, config)
    with pytest.raises(
        UserError, match=r"0.npy of the shape \(49, 960\), which is that of --cnn MobileNetV3Large\. The"
    ):
        find_missing(images, config)
    for path in elsewhere:
        np.save(path, np.ones((7, 7, 960), np.float16))
    with pytest.raises(UserError, match=rf"such as {elsewhere[0]} of the shape \(7, 7, 960\)\. The"):
        find_missing(images, config)


def test_features_made_elsewhere_that_changed_are_read_again(config, images, elsewhere):
    find_missing(images, config)
    before = manifest(config).entries
    np.save(elsewhere[1], np.zeros((64, 2048), np.float32))
    assert find_missing(images, config) == []
    after = manifest(config).entries
    assert {stem for stem in after if after[stem] != before[stem]} == {"1"}


def test_a_folder_with_features_of_other_images_made_elsewhere_is_not_mixed(config, images, elsewhere):
    others = [CaptionedImage(100 + number, f"other{number}.png") for number in range(3)]
    with pytest.raises(UserError, match="3 of 3 features are missing, damaged.* made elsewhere"):
        find_missing(others, config)


def test_a_shard_leaves_no_manifest_of_features_made_elsewhere(config, images, elsewhere):
    before = contents(features_folder(config))
    assert find_missing(images[:2], config, shared=True) == []
    assert contents(features_folder(config)) == before


def test_a_folder_that_was_emptied_can_be_filled_by_another_network(config, images, elsewhere, network):
    find_missing(images, config)
    for path in elsewhere:
        path.unlink()
    assert run(images, config) == COUNT
    assert manifest(config).network == "InceptionV3, weights imagenet"


# --- Several processes, and stopped ones


def test_shards_add_to_one_cache_and_a_run_without_merges_their_journals(config, images, network):
    assert run(images[::2], config, shared=True) == 3
    assert run(images[1::2], config, shared=True) == 3
    assert not (features_folder(config) / _MANIFEST).exists()
    assert len(manifest(config).journals) == 2
    assert run(images[::2], config, shared=True) == 0
    assert run(images, config) == 0
    assert manifest(config).journals == []
    assert len(manifest(config).entries) == COUNT


def test_a_shard_of_another_network_stops_before_its_first_feature(config, images, network):
    run(images[:3], config, shared=True)
    other = dataclasses.replace(config, inception_weights="random")
    with pytest.raises(UserError, match="features of two networks"):  # they began at the same time
        cache_features(images[3:], [], other, shared=True)
    assert len(manifest(config).entries) == 3


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the lines", "after the lines", "after a feature"])
def test_a_kill_around_a_feature_costs_no_more_than_that_feature(config, images, network, monkeypatch, moment):
    """os._exit is as SIGKILL: nothing is tidied up."""
    code = (
        "import os, sys, json\n"
        "sys.path[:0] = 'tests', 'tests/features'\n"
        "import test_extraction as test\n"
        "config, moment = test.make_config(json.loads(sys.argv[1])), sys.argv[2]\n"
        "images = [test.CaptionedImage(n, f'{n}.png') for n in range(test.COUNT)]\n"
        "import captioning.features.manifest as manifest, support.files as files\n"
        "add, replace, done = manifest.Journal.add, os.replace, []\n"
        "def add_line(*args):\n"
        "    done.append(args)\n"
        "    if len(done) == 2 and moment == 'before the lines': os._exit(9)\n"
        "    add(*args)\n"
        "    if len(done) == 2 and moment == 'after the lines': os._exit(9)\n"
        "def rename(*args):\n"
        "    replace(*args)\n"
        "    if len(done) == 2: os._exit(9)\n"
        "manifest.Journal.add, os.replace = add_line, rename\n"
        "network = lambda pixels: test.tf.zeros((len(pixels), 64, 2048))\n"
        "test.extraction.feature_network = lambda *args: network\n"
        "test.cache_features(images, [], config)\n"
    )
    given = json.dumps({name: getattr(config, name) for name in ("coco_dir", "data_dir", "extract_batch")})
    done = subprocess.run([sys.executable, "-c", code, given, moment], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    lost = 1 if moment == "after a feature" else 2  # of the second batch
    assert len(find_missing(images, config)) == lost
    assert run(images, config) == lost
    assert set(network) <= {4, 5} and len(network) == lost
    assert manifest(config).journals == []


def test_an_interrupt_waits_for_no_batch_and_finished_features_stay(config, images, monkeypatch):
    """The first batch is done, and the interrupt comes after it is written, while others are being computed."""
    config = dataclasses.replace(config, extract_batch=1)
    first = image_path(images[0], config)
    made, waited, released = [], [], threading.Event()

    def extract_batch(network, cnn, paths, load, device):
        if paths != [first] and not released.is_set():
            waited.append(released.wait(20))
        made.extend(paths)
        for path in paths:
            load(path)
        return paths, np.zeros((len(paths), 64, 2048), np.float32), []

    def interrupted(*args):
        write_features(*args)
        raise KeyboardInterrupt

    write_features = extraction.write_features
    monkeypatch.setattr(extraction, "feature_network", lambda config, statistics, calibration: None)
    monkeypatch.setattr(extraction, "_extract_batch", extract_batch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extraction, "write_features", interrupted)
        run(images, config)
    assert not waited
    assert made == [first]
    released.set()
    assert run(images, config) == COUNT - 1
    assert made.count(first) == 1
    assert len(set(made)) == COUNT


# --- Running the network


def test_each_image_gets_its_own_features_in_order(config, images, network):
    paths = [image_path(image, config) for image in images]
    paths.insert(2, paths[0].with_name("missing.png"))
    batches = list(extract_features(extraction.feature_network(config, None, None), CNNS[config.cnn], paths, 2))
    assert [[path.stem for path in done] for done, _, _ in batches] == [["0", "1"], ["2"], ["3", "4"], ["5"]]
    assert [features[:, 0, 0].tolist() for _, features, _ in batches] == [[0, 1], [2], [3, 4], [5]]
    ((path, reason),) = [bad for _, _, failed in batches for bad in failed]
    assert path.name == "missing.png" and "cannot be read" in reason


def test_a_batch_without_a_readable_image_has_no_features(tmp_path):
    ((done, features, failed),) = extract_features(None, CNNS["InceptionV3"], [tmp_path / "a", tmp_path / "b"], 4)
    assert (done, features.shape, len(failed)) == ([], (0, 64, 2048), 2)


def test_random_weights_are_calibrated_on_the_first_training_images(config):
    images = [CaptionedImage(number, f"{number}.png") for number in range(100)]
    paths = calibration_paths({"train": images, "validation": []}, config)
    assert paths == [image_path(image, config) for image in images[:_CALIBRATION_IMAGES]]


@pytest.mark.slow
def test_batches_go_to_all_devices_in_turn(tmp_path):
    """Two halves of the CPU stand for two GPUs."""
    for number in range(8):
        Image.new("L", (8, 8), 10 * number).save(tmp_path / f"{number}.png")
    code = (
        "import json, pathlib, sys\n"
        "import tensorflow as tf\n"
        "from captioning.features import extraction\n"
        "cpu, = tf.config.list_physical_devices('CPU')\n"
        "tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)\n"
        "halves = tf.config.list_logical_devices('CPU')\n"
        "tf.config.list_logical_devices = lambda kind: halves\n"
        "weight = tf.constant(2.0).numpy()\n"
        "@tf.function(input_signature=[tf.TensorSpec((None, 299, 299, 3), tf.uint8)])\n"
        "def network(pixels):\n"
        "    values = tf.constant(weight) * tf.reduce_mean(tf.cast(pixels, tf.float32), (1, 2, 3))\n"
        "    return tf.tile(values[:, None, None], (1, 64, 2048))\n"
        "used = []\n"
        "def note(pixels):\n"
        "    features = network(pixels)\n"
        "    used.append((int(pixels.numpy().mean()), pixels.device[-5:], features.device[-5:]))\n"
        "    return features\n"
        "paths = sorted(pathlib.Path(sys.argv[1]).iterdir())\n"
        "extracted = extraction.extract_features(note, extraction.CNNS['InceptionV3'], paths, 1)\n"
        "means = [features.mean() for _, features, _ in extracted]\n"
        "print(json.dumps([[float(mean) for mean in means], sorted(used)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    means, used = json.loads(done.stdout.splitlines()[-1])
    assert means == [20 * number for number in range(8)]
    assert used == [[10 * number, f"CPU:{number % 2}", f"CPU:{number % 2}"] for number in range(8)]
