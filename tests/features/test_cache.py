import dataclasses
import io
import pathlib
import tempfile

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from captioning.data.captioned_images import CaptionedImage
from captioning.features import feature_files
from captioning.features.cache import _check_features, cached_network, feature_path, features_folder, random_statistics
from captioning.features.feature_files import (
    check_feature_file,
    parallel_map,
    read_feature,
    reading_features,
    write_features,
)
from captioning.features.manifest import open_journal, read_manifest, scan_features
from captioning.settings import make_config
from conftest import full_disk, let_time_pass
from support.errors import UserError
from support.file_states import FileState, read_state

IMAGE = FileState(1, 2, 3)
SHAPE = (64, 2048)


def noise(count=1):
    return np.random.default_rng(0).standard_normal((count, 64, 2048)).astype(np.float32)


def save_version(path, array, version):
    with open(path, "wb") as file:
        np.lib.format.write_array(file, array, version)


# --- Files


def test_files_are_named_after_images(tmp_path):
    image = CaptionedImage(1, "a.b.jpg", folder="val2014")
    config = make_config({"data_dir": "data"})
    assert feature_path(image, features_folder(config)) == pathlib.Path("data/features/a.b.npy")
    assert random_statistics(features_folder(config)) == pathlib.Path("data/features/random_statistics.npz")
    config = dataclasses.replace(config, features_dir=str(tmp_path))
    assert features_folder(config) == tmp_path


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_written_features_have_lines_that_fit_them(tmp_path, dtype):
    features = noise(2)
    paths = [tmp_path / "a.npy", tmp_path / "b.c.npy"]
    images = [IMAGE, FileState(4, 5, 6)]
    with open_journal(tmp_path, "a network") as journal:
        write_features(paths, tf.constant(features), dtype, journal, images)
    for path, feature in zip(paths, features, strict=True):
        np.testing.assert_array_equal(np.load(path), feature.astype(dtype))
    entries = read_manifest(tmp_path, scan_features(tmp_path)).entries
    assert {stem: entry.feature for stem, entry in entries.items()} == {p.stem: read_state(p) for p in paths}
    assert [entries[path.stem].image for path in paths] == images


def test_features_can_be_written_without_a_journal(tmp_path):
    write_features([tmp_path / "a.npy"], noise(), "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_features_that_are_not_finite_on_disk_are_one_line(tmp_path, value):
    features = noise(2)
    features[1, 5, 6] = value
    with pytest.raises(UserError, match=r"features of b are not finite .*--feature_dtype float32[^\n]*$"):
        write_features([tmp_path / "a.npy", tmp_path / "b.npy"], features, "float16")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_half_feature(tmp_path):
    with open_journal(tmp_path, "a network") as journal, full_disk(100_000):
        with pytest.raises(UserError, match=rf"cannot write {tmp_path / 'a.npy'}: .* MB free there; make room"):
            write_features([tmp_path / "a.npy"], noise(), "float16", journal, [IMAGE])
    assert not list(tmp_path.glob("*.npy"))


# --- Reading in a graph


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_are_read_in_the_graph_as_numpy_reads_them(tmp_path, dtype, version):
    features = noise()[0].astype(dtype)
    path = tmp_path / "a.npy"
    save_version(path, features, version)
    read = tf.function(read_feature)(str(path), SHAPE, "float32")
    assert read.shape == (64, 2048)
    np.testing.assert_array_equal(read, features.astype(np.float32))
    assert check_feature_file(path, SHAPE) == read_state(path)


def test_a_header_of_another_length_is_read_right(tmp_path):
    """As older NumPy and other programs write it."""
    path = tmp_path / "a.npy"
    features = noise()[0].astype(np.float16)
    header = b"{'descr': '<f2', 'fortran_order': False, 'shape': (64, 2048), }"
    for padding in (6, 7, 500):
        text = header + b" " * padding + b"\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + features.tobytes())
        assert check_feature_file(path, SHAPE)
        np.testing.assert_array_equal(read_feature(str(path), SHAPE, tf.float16), features)


def read_all(paths):
    dataset = parallel_map(lambda path: read_feature(path, SHAPE, dtype="float16"), [str(path) for path in paths])
    dataset = dataset.batch(2).prefetch(1)
    with reading_features():
        return sum(len(batch) for batch in dataset)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_truncated_feature_is_one_line_while_training_reads(tmp_path, dtype):
    paths = [tmp_path / f"{name} (1) [x].npy" for name in "abc"]
    for path in paths:
        np.save(path, noise()[0].astype(dtype))
    assert read_all(paths) == 3
    paths[1].write_bytes(paths[1].read_bytes()[:-4096])
    with pytest.raises(UserError) as raised:
        read_all(paths)
    assert str(raised.value) == f"{paths[1]} is damaged"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_no_truncated_feature_passes_for_a_whole_one(tmp_path, dtype):
    path = tmp_path / "a.npy"
    np.save(path, noise()[0].astype(dtype))
    read, data = tf.function(read_feature), path.read_bytes()
    for kept in (0, 3, 9, 128, 128 + 4096, 100_000, 262_143, 262_144, 262_272 - 16, -4096, -16, -1):
        path.write_bytes(data[:kept])
        with pytest.raises(UserError, match=rf"^{path} is damaged$"), reading_features():
            read(tf.constant(str(path)), SHAPE, "float32")


def test_a_feature_that_is_gone_is_one_line_while_training_reads(tmp_path):
    paths = [tmp_path / "a.npy", tmp_path / "gone away.npy"]
    np.save(paths[0], noise()[0])
    with pytest.raises(UserError) as raised:
        read_all(paths)
    assert str(raised.value) == f"{paths[1]} cannot be read (No such file or directory)"


def test_other_errors_pass_as_they_are():
    with pytest.raises(tf.errors.InvalidArgumentError), reading_features():
        tf.debugging.assert_equal(1, 2)
    with pytest.raises(ZeroDivisionError), reading_features():
        print(1 / 0)


def test_pipelines_keep_the_order_and_do_without_the_tuning_thread():
    for workers in (None, 1, 5):
        dataset = parallel_map(lambda i: 2 * i, np.arange(100), workers).batch(50).prefetch(1)
        assert dataset.options().autotune.enabled is False
        assert [i for batch in dataset for i in batch.numpy()] == list(range(0, 200, 2))


def test_pipelines_use_the_cores_that_the_process_may_use(monkeypatch):
    used = []
    monkeypatch.setattr(feature_files, "usable_cores", lambda: 3)
    original = tf.data.Dataset.map
    monkeypatch.setattr(
        tf.data.Dataset, "map", lambda *args, **kwargs: used.append(kwargs) or original(*args, **kwargs)
    )
    parallel_map(lambda i: i, np.arange(3))
    assert used == [{"num_parallel_calls": 3}]


# --- Features made elsewhere


def bad(change):
    """A function that writes the noise features, changed."""
    return lambda path: np.save(path, change(noise()[0]))


def rewritten(change):
    """A function that writes the noise features as a file whose bytes are changed."""

    def write(path):
        np.save(path, noise()[0].astype(np.float16))
        path.write_bytes(change(path.read_bytes()))

    return write


@pytest.mark.parametrize(
    "write",
    [
        bad(lambda array: array[:32]),
        bad(lambda array: array.reshape(2048, 64)),
        bad(lambda array: array.astype(np.float64)),
        bad(lambda array: array.astype(np.int32)),
        bad(lambda array: array.astype(">f4")),
        bad(np.asfortranarray),
        bad(lambda array: np.where(array > 4, np.nan, array)),
        bad(lambda array: np.where(array > 4, np.inf, array)),
        rewritten(lambda data: b""),
        rewritten(lambda data: data[:-1]),
        rewritten(lambda data: data + b"\0"),
        rewritten(lambda data: b"\x94" + data[1:]),
        rewritten(lambda data: data.replace(b"descr", b"\xff\xff\xff\xff\xff")),
        rewritten(lambda data: data.replace(b"(64, 2048)", b"(64, 204 )")),
        rewritten(lambda data: data.replace(b"<f2", b"|O ")),
        lambda path: np.savez(open(path, "wb"), noise()[0]),
    ],
)
def test_a_file_that_is_not_whole_features_is_found(tmp_path, write):
    path = tmp_path / "a.npy"
    write(path)
    assert check_feature_file(path, SHAPE) is None


def test_pickles_are_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], object), allow_pickle=True)
    assert check_feature_file(tmp_path / "a.npy", SHAPE) is None


HEADER = len(b"\x93NUMPY\x01\x00vv") + 118  # of a .npy file that NumPy writes


@st.composite
def damaged_headers(draw):
    """The header of a feature file in which some bytes were overwritten, cut out or put in."""
    data = io.BytesIO()
    np.save(data, np.zeros((64, 2048), draw(st.sampled_from([np.float16, np.float32]))))
    header = bytearray(data.getvalue()[:HEADER])
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(header)))
        header[start : start + draw(st.integers(0, 3))] = draw(st.binary(max_size=3) | st.sampled_from(SNIPPETS))
    return bytes(header)


SNIPPETS = [b"4", b"8", b"(", b"'", b"\\", b"\n", b"True", b"64L", b"\x02", b"\x03"]


@pytest.mark.slow
@given(damaged_headers(), st.sampled_from([2, 4]))
def test_a_feature_file_that_passes_is_read_as_numpy_reads_it(header, itemsize):
    numbers = noise()[0].astype(f"<f{itemsize}")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "a.npy")
        path.write_bytes(header + numbers.tobytes())
        if check_feature_file(path, SHAPE):
            np.testing.assert_array_equal(read_feature(str(path), SHAPE, "float32"), np.load(path).astype(np.float32))


# --- Features of prepared images

IMAGES = [CaptionedImage(number, f"{number}.jpg") for number in range(3)]


@pytest.fixture
def config(tmp_path):
    """The Config of a cache with the features of IMAGES."""
    config = make_config({"features_dir": str(tmp_path)})
    with open_journal(tmp_path, "a network") as journal:
        write_features(
            [feature_path(image, features_folder(config)) for image in IMAGES],
            noise(3),
            "float16",
            journal,
            [IMAGE] * 3,
        )
    return config


def test_prepared_features_are_checked_without_reading_them(config, monkeypatch):
    monkeypatch.setattr("support.file_states.read_state", None)
    _check_features(IMAGES, features_folder(config), "a network")
    assert cached_network(features_folder(config)) == "a network"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "is missing from the feature cache"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "is damaged, or changed since it was prepared"),
        (lambda path: np.save(path, noise()[0] + 1), "is damaged, or changed since it was prepared"),
        (lambda path: np.save(path, 2 * np.load(path)), "is damaged, or changed since it was prepared"),
    ],
)
def test_features_that_are_missing_or_changed_are_one_line(config, damage, problem):
    let_time_pass(features_folder(config))
    damage(feature_path(IMAGES[1], features_folder(config)))
    with pytest.raises(UserError, match=rf"{feature_path(IMAGES[1], features_folder(config))} {problem}$"):
        _check_features(IMAGES, features_folder(config), "a network")
    damage(feature_path(IMAGES[2], features_folder(config)))
    with pytest.raises(UserError, match=rf"{problem}, and 1 others are too$"):
        _check_features(IMAGES, features_folder(config), "a network")
    _check_features(IMAGES[:1], features_folder(config), "a network")


def test_features_of_another_network_are_one_line(config):
    with pytest.raises(UserError, match=r"another network \(a network\) than those .* \(another\)$"):
        _check_features(IMAGES, features_folder(config), "another")


@pytest.mark.parametrize(("failures", "is_good"), [(2, True), (10**6, False)])
def test_a_header_that_the_parser_fails_at_is_read_again_and_not_for_ever(tmp_path, monkeypatch, failures, is_good):
    np.save(tmp_path / "a.npy", np.ones(SHAPE, np.float16))
    read, failed = np.lib.format.read_array, []

    def read_array(*given, **options):
        if len(failed) < failures:
            failed.append(1)
            raise SystemError("AST constructor recursion depth mismatch")
        return read(*given, **options)

    monkeypatch.setattr(feature_files.np.lib.format, "read_array", read_array)
    assert (feature_files.check_feature_file(tmp_path / "a.npy", SHAPE) is not None) == is_good
