"""Script 1 by its own entry point."""

import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow as tf

import data_utils
from captioning.features import extraction
from captioning.features.cache import feature_path, features_folder, load_data
from captioning.features.image_files import load_image
from captioning.features.manifest import MADE_ELSEWHERE
from captioning.features.network import extraction_graphs, feature_network, network_identity
from captioning.settings import naming_commands, read_settings
from captioning.vocabulary import END, START, UNK
from conftest import IMAGES, full_disk, let_time_pass, options, write_coco
from support.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


def prepare(root, *more):
    """Run the script on the data set under `root`. Returns (Config, Prepared)."""
    argv = [*options(root), *more]
    data_utils.main(argv)
    config, _ = read_settings(argv, "")
    return config, load_data(config)


def file_names(images):
    return {image.file_name for image in images}


@pytest.fixture
def stub(monkeypatch):
    """In place of InceptionV3: 0.5 everywhere. Returns the sizes of all batches computed."""
    sizes = []

    def network(pixels):
        sizes.append(len(pixels))
        return tf.fill((len(pixels), 64, 2048), 0.5)

    monkeypatch.setattr(extraction, "feature_network", lambda config, statistics, calibration: network)
    return sizes


STUBBED = ("--inception_weights", "imagenet")  # the stub writes no statistics, which random weights would need


@pytest.fixture
def own(coco, stub):
    """The root of a tiny data set whose features the script itself has made."""
    shutil.rmtree(coco / "data")
    prepare(coco, *STUBBED)
    stub.clear()
    let_time_pass(coco)
    return coco


# --- Splits and words


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
    own_words = {f"word{image.image_id}" for image in prepared.train}
    assert {word for word in prepared.vocabulary if word.startswith("word")} == own_words
    assert prepared.vocabulary[:4] == ["<pad>", "<unk>", "<start>", "<end>"]


def test_captions_become_token_ids_and_back(coco):
    _, prepared = prepare(coco)
    for image in prepared.train:
        for caption, token_ids in zip(image.captions, image.encoded_captions, strict=True):
            assert (token_ids[0], token_ids[-1]) == (START, END)
            words = "".join(letter if letter.isalpha() or letter == "'" else " " for letter in caption.lower()).split()
            assert [prepared.vocabulary[i] for i in token_ids[1:-1]] == words


def test_the_vocabulary_is_the_most_frequent_words_up_to_vocab_size(coco):
    _, prepared = prepare(coco, "--vocab_size", "10")
    assert len(prepared.vocabulary) == 10
    counts = {}
    for image in prepared.train:
        for caption in image.captions:
            for word in caption.lower().replace(".", "").replace(",", "").split():
                counts[word] = counts.get(word, 0) + 1
    least_kept = min(counts[word] for word in prepared.vocabulary[4:])
    assert all(count <= least_kept for word, count in counts.items() if word not in prepared.vocabulary)
    assert any(UNK in token_ids for image in prepared.train for token_ids in image.encoded_captions)


def test_the_draw_is_of_captions_and_fixed_by_the_seed(coco):
    def drawn(*more):
        _, prepared = prepare(coco, "--num_examples", "30", *more)
        images = prepared.train + prepared.validation
        return sorted((image.image_id, caption) for image in images for caption in image.captions), prepared

    first, prepared = drawn()
    assert len(first) == 30
    assert all(len(image.references) == 5 for image in prepared.validation)  # the metrics use them all
    assert drawn()[0] == first
    assert drawn("--seed", "1")[0] != first


def test_records_that_cannot_be_used_are_left_out(coco, capsys):
    path = coco / "coco" / "annotations" / "captions_train2014.json"
    data = json.loads(path.read_text())
    data["images"] += [{"id": 901, "file_name": "../../escape.jpg"}, {"id": 904, "file_name": "without_caption.jpg"}]
    data["annotations"] += [{"id": 1, "image_id": 999, "caption": "no such image"}, "nonsense"]
    path.write_text(json.dumps(data))
    _, prepared = prepare(coco)
    images = prepared.train + prepared.validation
    assert len(images) == IMAGES
    assert sum(len(image.captions) for image in images) == IMAGES * 5
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["not json", "[1, 2]", '{"images": []}', '{"images": [], "annotations": []}'])
def test_a_wrong_captions_file_is_one_line(coco, text):
    (coco / "coco" / "annotations" / "captions_train2014.json").write_text(text)
    with pytest.raises(UserError, match="captions_train2014.json"):
        prepare(coco)


def test_karpathys_splits_are_kept_and_only_train_is_drawn(tmp_path, stub):
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    write_coco(tmp_path / "source", count=9)
    records = []
    for number, path in enumerate(sorted((tmp_path / "source" / "train2014").iterdir())):
        shutil.copy(path, tmp_path / "images" / "val2014")
        split = ("train", "restval", "val", "test", "train", "train", "train", "val", "test")[number]
        sentences = [{"raw": f"a dog of number {number}"}, {"raw": "it's a dog"}]
        records.append({"filename": path.name, "filepath": "val2014", "cocoid": number, "split": split})
        records[-1]["sentences"] = sentences
    (tmp_path / "dataset.json").write_text(json.dumps({"images": records}))
    argv = ["--dataset", "karpathy", "--karpathy_json", str(tmp_path / "dataset.json")]
    argv += ["--images", str(tmp_path / "images"), "--data_dir", str(tmp_path / "data"), "--num_examples", "6"]
    data_utils.main(argv)
    prepared = load_data(read_settings(argv, "")[0])
    assert sum(len(image.captions) for image in prepared.train) == 6
    assert [image.image_id for image in prepared.validation] == [2, 7]
    assert [image.image_id for image in prepared.test] == [3, 8]
    assert sum(stub) == len(prepared.train) + 4


# --- Features


def test_features_made_elsewhere_are_used_and_said_to_be(coco, monkeypatch, capsys):
    monkeypatch.setattr(extraction, "feature_network", lambda *args: pytest.fail("a second network"))
    _, prepared = prepare(coco)
    assert prepared.network == MADE_ELSEWHERE
    assert (
        f"{IMAGES} of {IMAGES} are in {coco / 'data' / 'features'} already, made elsewhere" in capsys.readouterr().out
    )


def test_a_gap_in_features_made_elsewhere_is_one_line_and_what_was_prepared_stays(coco):
    config, _ = prepare(coco)
    next((coco / "data" / "features").glob("*07.npy")).unlink()
    with pytest.raises(UserError, match="1 of 24 features are missing, damaged, .*such as .*07.npy.* made elsewhere"):
        prepare(coco)
    assert (coco / "data" / "settings.json").exists()
    with (
        pytest.raises(UserError, match="07.npy is missing from the feature cache: run python data_utils.py"),
        naming_commands(config),
    ):
        load_data(config)


def test_preparing_again_remakes_damaged_features_only(own, stub):
    features = own / "data" / "features"
    paths = sorted(features.glob("*.npy"))
    damages = {
        paths[0]: b"",
        paths[1]: paths[1].read_bytes()[:-100],
        paths[2]: paths[2].read_bytes().replace(b"(64, 2048)", b"(32, 4096)"),
        paths[3]: paths[3].read_bytes().replace(b"<f2", b"<i2"),
    }
    for path, data in damages.items():
        path.write_bytes(data)
    nan = np.load(paths[4])
    nan[3, 3] = np.nan
    np.save(paths[4], nan)
    paths[5].unlink()
    (own / "data" / ".tmp-999999999-1-train.json").touch()  # of a run that was killed
    (features / ".tmp-999999999-1-a.npy").touch()
    untouched = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths[6:]}

    prepare(own, *STUBBED)
    assert sum(stub) == 6
    for path in paths[:6]:
        assert (np.load(path) == np.full((64, 2048), 0.5, np.float16)).all()
    assert not list((own / "data").rglob(".tmp*"))
    for path, (time, data) in untouched.items():
        assert (path.stat().st_mtime_ns, path.read_bytes()) == (time, data)


def test_a_full_disk_is_one_line_and_no_finished_feature_is_made_again(own, stub):
    features = own / "data" / "features"
    paths = sorted(features.glob("*.npy"))
    paths[0].unlink()
    before = {path: path.read_bytes() for path in paths[1:]}
    with full_disk(100_000), pytest.raises(UserError, match=rf"cannot write {paths[0]}: .* MB free there; make room"):
        prepare(own, *STUBBED)
    assert {path: path.read_bytes() for path in features.glob("*.npy")} == before
    prepare(own, *STUBBED)
    assert stub == [1, 1]
    assert {path: path.read_bytes() for path in paths[1:]} == before


def test_an_image_that_cannot_be_read_is_named_skipped_and_counted(own, capsys):
    bad = "COCO_train2014_000000000007.jpg"
    (own / "coco" / "train2014" / bad).write_text("not an image")
    cut = own / "coco" / "train2014" / "COCO_train2014_000000000008.jpg"
    cut.write_bytes(cut.read_bytes()[:-2])
    _, prepared = prepare(own, *STUBBED)
    assert len(prepared.train + prepared.validation) == IMAGES - 1
    assert bad not in file_names(prepared.train + prepared.validation)
    printed = capsys.readouterr()
    assert f"{bad} cannot be read" in printed.out + printed.err
    assert printed.out.splitlines()[-1].endswith("; 1 JPEG files lack their end and are used all the same")
    assert list(json.loads((own / "data" / "skipped.json").read_text())) == [bad]


def test_a_photograph_replaced_in_place_is_extracted_again(own, stub):
    images = sorted((own / "coco" / "train2014").iterdir())
    shutil.copyfile(images[0], images[1])
    prepare(own, *STUBBED)
    assert stub == [1]


def test_other_weights_on_a_full_cache_are_one_line_and_what_was_prepared_stays(own, stub):
    with pytest.raises(UserError, match=r"made by another network .*: name another --features_dir, or delete [^\n]*$"):
        prepare(own, "--inception_weights", "random")
    assert stub == []
    config, _ = read_settings([*options(own), *STUBBED], "")
    load_data(config)


def demo_options(root, *more):
    argv = ["--dataset", "demo", "--demo_images", "10", "--coco_dir", str(root / "scenes"), "--data_dir", str(root)]
    return [*argv, *more]


def read_files(folder, pattern):
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


def test_the_demo_of_another_seed_has_other_features(tmp_path, monkeypatch):
    def brightness(config, statistics, calibration):
        statistics.write_bytes(b"statistics")
        return lambda pixels: tf.tile(
            tf.reduce_mean(tf.cast(pixels, tf.float32), (1, 2, 3))[:, None, None], (1, 64, 2048)
        )

    monkeypatch.setattr(extraction, "feature_network", brightness)
    before = {}
    for seed in ("42", "1", "1", "42"):
        argv = demo_options(tmp_path, "--seed", seed)
        data_utils.main(argv)
        after = read_files(tmp_path / "features", "*.npy")
        assert len(after) == 10
        assert f"random weights of seed {seed} and calibration" in load_data(read_settings(argv, "")[0]).network
        for other, features in before.items():
            assert (features == after) == (other == seed)
            assert other == seed or all(features[name] != after[name] for name in features)
        before[seed] = after


@pytest.mark.slow
def test_the_demo_of_another_seed_has_the_features_of_a_fresh_cache(tmp_path):
    """With InceptionV3 itself."""
    data_utils.main(demo_options(tmp_path / "both"))
    first = read_files(tmp_path / "both" / "features", "*.npy")
    data_utils.main(demo_options(tmp_path / "both", "--seed", "1"))
    data_utils.main(demo_options(tmp_path / "fresh", "--seed", "1"))
    both, fresh = (read_files(tmp_path / name / "features", "*.np?") for name in ("both", "fresh"))
    assert both == fresh
    assert all(first[name] != both[name] for name in first)


@pytest.mark.slow
def test_inception_end_to_end_with_random_weights(coco):
    """Images in, (64, 2048) out, in range; the same network again for new images; another one is refused."""
    features = coco / "data" / "features"
    shutil.rmtree(features)
    config, prepared = prepare(coco)
    paths = sorted(features.glob("*.npy"))
    assert len(paths) == IMAGES
    first = np.load(paths[0])
    assert first.shape == (64, 2048)
    assert first.dtype == np.float16
    assert 0.05 < first.astype(float).std() < 20  # the activations neither vanish nor explode
    sample = np.stack([np.load(feature_path(image, features_folder(config))) for image in prepared.train]).astype(float)
    np.testing.assert_allclose(prepared.feature_mean, sample.mean((0, 1)), atol=1e-3)
    assert prepared.feature_std == pytest.approx(np.std(sample - sample.mean((0, 1))), rel=1e-3)
    assert prepared.network == network_identity(config, features / "random_statistics.npz")

    statistics = (features / "random_statistics.npz").rename(coco / "kept.npz")
    network = feature_network(config, statistics, expected_identity=prepared.network)
    pixels = load_image(coco / "coco" / "train2014" / f"{paths[0].stem}.jpg", 299)
    with extraction_graphs(config):
        again = network(tf.constant(pixels[np.newaxis]))[0].numpy()
    assert np.abs(again - first).mean() < 0.05 * first.astype(float).std()

    with pytest.raises(UserError, match="made by another network"):
        prepare(coco, "--seed", "1")


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared: ready features")
def test_ready_features_are_used_as_a_whole(tmp_path, capsys):
    features = tmp_path / "features"
    command = [sys.executable, str(SHARED / "expand_features.py"), str(features), "float16", "coco_mini"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    argv = ["--coco_dir", str(SHARED / "coco_mini"), "--coco_split", "train2017", "--features_dir", str(features)]
    argv += ["--data_dir", str(tmp_path / "data"), "--num_examples", "none"]
    for _ in range(2):
        data_utils.main(argv)
        assert "features: 80 of 80 are in" in capsys.readouterr().out
    assert load_data(read_settings(argv, "")[0]).network == MADE_ELSEWHERE
    with pytest.raises(UserError, match="79 of 79 features are missing, damaged.*made elsewhere"):
        data_utils.main([*argv, "--coco_split", "val2017", "--data_dir", str(tmp_path / "other")])


# --- Downloads, from a server on this machine


def test_only_the_images_needed_are_fetched_and_only_once(coco, server, stub):
    """The captions file and the images are absent: the archive gives the one, coco_url the others."""
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
    shutil.rmtree(coco / "data")
    _, prepared = prepare(coco, "--num_examples", "12", *STUBBED)
    images = prepared.train + prepared.validation
    fetched = {path.name for path in (coco / "coco" / "train2014").iterdir()}
    drawn = file_names(images) | set(json.loads((coco / "data" / "skipped.json").read_text()))
    assert fetched == file_names(images)
    assert len(drawn) <= 12
    assert sum(len(image.captions) for image in images) >= 12 - 5

    before = len(server.requests)
    prepare(coco, "--num_examples", "12", *STUBBED)
    assert [path for path in server.requests[before:] if path != "/missing.jpg"] == []


@pytest.mark.parametrize("split", ["train2014", "val2014", "val2017"])
def test_the_zip_of_all_images_is_the_other_way(coco, server, stub, split):
    captions_file = coco / "coco" / "annotations" / "captions_train2014.json"
    captions_file.rename(captions_file.with_name(f"captions_{split}.json"))
    archive = server.folder / "zips" / f"{split}.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for path in (coco / "coco" / "train2014").iterdir():
            file.write(path, f"{split}/{path.name}")
            path.unlink()
    server.publish(archive)
    shutil.rmtree(coco / "data")
    _, prepared = prepare(coco, "--image_source", "zip", "--coco_split", split, *STUBBED)
    assert len(prepared.train + prepared.validation) == IMAGES
    assert len(list((coco / "coco" / split).iterdir())) == IMAGES


def test_a_split_without_captions_is_one_line(coco):
    with pytest.raises(UserError, match="COCO has no captions for --coco_split test2014"):
        prepare(coco, "--coco_split", "test2014")
