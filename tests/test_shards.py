"""data_utils.py --shard I/N: shares of the images, extracted side by side into one folder."""

import json
import os
import pathlib
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import tensorflow as tf

import data_utils
from captioning.features import extraction
from captioning.features.manifest import MADE_ELSEWHERE, read_manifest, scan_features
from conftest import IMAGES, options, write_coco
from support import files
from support.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def brightness(config, statistics, calibration):
    """A network that costs nothing: an image's brightness everywhere."""
    return lambda pixels: tf.tile(tf.reduce_mean(tf.cast(pixels, tf.float32), (1, 2, 3))[:, None, None], (1, 64, 2048))


def no_network(config, statistics, calibration):
    pytest.fail("there was something left to extract")


def prepare(root, *more):
    data_utils.main([*options(root), "--inception_weights", "imagenet", *more])


def cached(root):
    return {path.name: path.read_bytes() for path in (root / "data" / "features").glob("*.npy")}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*") if path.is_file()}


@pytest.fixture
def plain(tmp_path):
    """The root of a tiny data set of which nothing is cached."""
    write_coco(tmp_path / "coco")
    return tmp_path


def demo_options(root):
    return ["--dataset", "demo", "--demo_images", "10", "--coco_dir", str(root / "scenes"), "--data_dir", str(root)]


def compare_features(folder, other):
    """Equal up to rounding: shards have batches of other sizes, whose products may be summed in another order."""
    mine, theirs = (
        {path.name: np.load(path).astype(np.float32) for path in sorted(each.glob("*.npy"))} for each in (folder, other)
    )
    for name, features in mine.items():
        distances = {key: np.linalg.norm(features - each) / np.linalg.norm(each) for key, each in theirs.items()}
        assert distances.pop(name) < 1e-3, name
        assert min(distances.values()) > 0.1  # those of another image are no mere rounding away
    with np.load(folder / "random_statistics.npz") as first, np.load(other / "random_statistics.npz") as second:
        for name in first.files:
            if first[name].dtype.kind == "f":
                np.testing.assert_allclose(first[name], second[name], rtol=1e-3, atol=1e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.slow
def test_two_shards_at_once_give_the_cache_of_one_run(tmp_path, monkeypatch, capsys):
    both, alone = tmp_path / "both", tmp_path / "alone"
    command = [sys.executable, "data_utils.py", *demo_options(both)]
    shards = [
        subprocess.Popen([*command, "--shard", f"{number}/2"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for number in (1, 2)
    ]
    data_utils.main(demo_options(alone))
    for number, shard in enumerate(shards, 1):
        printed, _ = shard.communicate()
        assert shard.returncode == 0
        assert f"shard {number} of 2 is done: 5 images cached, 0 skipped" in printed
    names = {path.name for path in (both / "features").glob("*.np?")}
    assert "random_statistics.npz" in names and len(names) == 10 + 1
    compare_features(both / "features", alone / "features")

    monkeypatch.setattr(extraction, "feature_network", no_network)
    assert not (both / "settings.json").exists()
    data_utils.main(demo_options(both))
    assert "10 of 10 are in" in capsys.readouterr().out
    assert (both / "settings.json").exists()
    manifests = [read_manifest(root / "features", scan_features(root / "features")) for root in (both, alone)]
    assert [len(manifest.journals) for manifest in manifests] == [0, 0]
    assert manifests[0].network == manifests[1].network
    assert len(manifests[1].entries) == 10
    for stem in manifests[1].entries:
        (feature, image), (_, other_image) = (manifest.entries[stem] for manifest in manifests)
        assert image.crc32 == other_image.crc32
        assert feature.crc32 == zlib.crc32((both / "features" / f"{stem}.npy").read_bytes())


def test_shards_share_the_images_and_the_run_without_fills_the_gaps(plain, monkeypatch):
    monkeypatch.setattr(extraction, "feature_network", brightness)
    counts = []
    for number in (3, 1, 2):
        prepare(plain, "--shard", f"{number}/3")
        counts.append(len(cached(plain)))
    assert counts == [8, 16, IMAGES]
    by_shards = cached(plain)

    damaged, missing = sorted((plain / "data" / "features").glob("*.npy"))[5:7]
    damaged.write_bytes(b"half")
    missing.unlink()
    prepare(plain)
    assert cached(plain) == by_shards


def test_shards_of_hosts_with_copies_of_the_images_are_not_made_again(plain, monkeypatch):
    """Each host has unpacked the images for itself: they have times of their own."""
    monkeypatch.setattr(extraction, "feature_network", brightness)
    for number in (1, 2):
        for path in (plain / "coco" / "train2014").iterdir():
            os.utime(path, (number, number))
        prepare(plain, "--shard", f"{number}/2")
    monkeypatch.setattr(extraction, "feature_network", no_network)
    prepare(plain)


def test_a_shard_run_again_extracts_nothing_and_leaves_prepared_data_alone(plain, monkeypatch):
    monkeypatch.setattr(extraction, "feature_network", brightness)
    prepare(plain)
    before = times(plain / "data")
    monkeypatch.setattr(extraction, "feature_network", no_network)
    prepare(plain, "--shard", "1/2")
    assert times(plain / "data") == before


def test_a_shard_of_features_made_elsewhere_does_nothing(coco, monkeypatch):
    monkeypatch.setattr(extraction, "feature_network", no_network)
    before = times(coco / "data")
    prepare(coco, "--shard", "1/2")
    assert times(coco / "data") == before
    prepare(coco)
    assert json.loads((coco / "data" / "settings.json").read_text())["network"] == MADE_ELSEWHERE


@pytest.mark.parametrize(("more", "stays"), [([], False), (["--shard", "1/2"], True)])
def test_what_another_shard_is_writing_stays(coco, more, stays):
    live, left = (coco / "data" / "features" / f"{files.TEMPORARY}{name}.npy" for name in ("live", "left"))
    live.write_bytes(b"half")
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    prepare(coco, *more)
    assert live.exists() == stays and not left.exists()


def test_a_shard_fetches_its_own_images_and_captions_by_a_file_of_its_own(plain, server, monkeypatch):
    captions_file = plain / "coco" / "annotations" / "captions_train2014.json"
    data = json.loads(captions_file.read_text())
    for image in data["images"]:
        image["coco_url"] = f"{server.url}/{image['file_name']}"
        (plain / "coco" / "train2014" / image["file_name"]).rename(server.folder / image["file_name"])
    archive = server.folder / "annotations" / "annotations_trainval2014.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("annotations/captions_train2014.json", json.dumps(data))
    server.publish(archive)
    captions_file.unlink()
    of_another = plain / "coco" / "annotations_trainval2014.zip.part"
    of_another.write_bytes(b"the beginning")

    monkeypatch.setattr(extraction, "feature_network", brightness)
    with files.locked(plain / "coco", "download", shared=True):  # as another shard does at the same time
        prepare(plain, "--shard", "2/3")
    assert len(list((plain / "coco" / "train2014").iterdir())) == 8
    assert len(cached(plain)) == 8
    assert len(server.requests) == 1 + 8
    assert of_another.read_bytes() == b"the beginning"
    assert [path.name for path in (plain / "coco").glob("*.zip*")] == [of_another.name]


def test_random_weights_need_the_same_images_in_every_shard(plain):
    for path in (plain / "coco" / "train2014").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="random weights need it in every shard"):
        prepare(plain, "--inception_weights", "random", "--shard", "1/2")


def test_a_shard_does_not_draw_over_another_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "feature_network", brightness)
    command = [*demo_options(tmp_path), "--inception_weights", "imagenet"]
    data_utils.main([*command, "--shard", "1/2"])
    assert len(list((tmp_path / "features").glob("*.npy"))) == 5
    before = {path: path.read_bytes() for path in (tmp_path / "scenes").rglob("[!.]*.*")}
    with pytest.raises(UserError, match="scenes of other settings"):
        data_utils.main([*command, "--seed", "1", "--shard", "1/2"])
    assert {path: path.read_bytes() for path in (tmp_path / "scenes").rglob("[!.]*.*")} == before


@pytest.mark.parametrize("value", ["", "2", "0/2", "3/2", "-1/2", "1/0", "a/b", "1/2/3", "1.5/2", "1 / 2", "¹/2"])
def test_what_is_no_share_is_one_line(plain, value):
    with pytest.raises(UserError, match=r"--shard takes I/N[^\n]*$"):
        prepare(plain, f"--shard={value}")


def test_the_zip_of_all_images_is_not_for_shards(plain):
    with pytest.raises(UserError, match="--image_source each"):
        prepare(plain, "--shard", "1/2", "--image_source", "zip")
