import hashlib
import pathlib
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from captioning.features import network as networks
from captioning.features.image_files import load_image
from captioning.features.manifest import MADE_ELSEWHERE
from captioning.features.network import extraction_graphs, extraction_precision, feature_network, network_identity
from captioning.settings import make_config
from support.errors import UserError
from support.process import release_memory

SHARED = pathlib.Path(__file__).parent.parent.parent.parent / "shared"
WEIGHTS = SHARED / "weights" / "inception_v3_notop.weights.h5"


def random_config(**settings):
    return make_config({"inception_weights": "random", **settings})


@pytest.fixture
def images(tmp_path):
    """Smooth noise, as photographs mostly are: (paths, pixels)."""
    coarse = np.random.default_rng(1).integers(0, 256, (6, 5, 5, 3), np.uint8)
    paths = []
    for number, image in enumerate(coarse):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(image).resize((299, 299), Image.Resampling.BICUBIC).save(paths[-1])
    return paths, np.stack([np.asarray(Image.open(path)) for path in paths])


class TinyInception:
    """In place of InceptionV3: two kernels of random weights, which are quick to build and to run."""

    def __init__(self, monkeypatch):
        self.policies = []
        monkeypatch.setattr(keras.applications, "InceptionV3", self.build)

    def build(self, include_top, weights, input_shape):
        self.policies.append(keras.config.dtype_policy().name)
        assert not include_top and input_shape == (299, 299, 3)
        if weights not in (None, "imagenet"):
            raise ValueError(f"no weights\nin {weights}")
        image = keras.Input(input_shape)
        hidden = image
        for width, stride in ((4, 38), (2048, 1)):
            hidden = keras.layers.Conv2D(width, 1, stride, use_bias=False)(hidden)
            hidden = keras.layers.BatchNormalization(scale=False)(hidden)
            hidden = keras.layers.ReLU()(hidden)
        return keras.Model(image, hidden)


@pytest.fixture
def tiny(monkeypatch):
    return TinyInception(monkeypatch)


def compute(config, pixels, *args, **kwargs):
    network = feature_network(config, *args, **kwargs)
    with extraction_graphs(config):
        return network(tf.constant(pixels)).numpy()


def compute_alone(*given):
    """As `compute`, for InceptionV3, of which two are not to be in memory."""
    computed = compute(*given)
    release_memory()
    return computed


# --- Identity


def test_networks_of_other_weights_have_other_names(tmp_path):
    file = tmp_path / "a.h5"
    file.write_bytes(b"weights")
    names = [
        network_identity(make_config({"inception_weights": "imagenet"})),
        network_identity(make_config({"inception_weights": str(file)})),
        network_identity(random_config()),
        network_identity(random_config(seed=1)),
    ]
    assert len(set(names)) == 4
    assert hashlib.sha256(b"weights").hexdigest()[:16] in names[1]
    assert names[3] == "InceptionV3, random weights of seed 1"

    moved = file.rename(tmp_path / "b.h5")
    assert network_identity(make_config({"inception_weights": str(moved)})) == names[1]
    assert network_identity(make_config({"seed": 1})) == names[0]  # which only random weights depend on
    moved.write_bytes(b"others")
    assert network_identity(make_config({"inception_weights": str(moved)})) != names[1]


@pytest.mark.parametrize("weights", ["nowhere.h5", "."])
def test_missing_weights_are_one_line(weights):
    with pytest.raises(UserError, match=rf"--inception_weights {weights} is not a file: name one, or take[^\n]*$"):
        feature_network(make_config({"inception_weights": weights}))


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"text", b"\x89HDF\r\n\x1a\n broken"])
def test_unfit_weights_are_one_line(tmp_path, content):
    path = tmp_path / "bad.weights.h5"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^InceptionV3 cannot take the weights .*--inception_weights$"):
        feature_network(make_config({"inception_weights": str(path)}))


def test_weights_that_keras_refuses_are_one_line(tiny, tmp_path):
    path = tmp_path / "bad.weights.h5"
    path.touch()
    with pytest.raises(UserError, match=rf"^InceptionV3 cannot take the weights {path} \(no weights\): .*_weights$"):
        feature_network(make_config({"inception_weights": str(path)}))
    assert keras.config.dtype_policy().name == "float32"


def test_a_model_is_not_used_with_another_network_than_its_own(tiny):
    config = make_config()
    feature_network(config, expected_identity=network_identity(config))
    with pytest.raises(UserError, match=r"another network \(InceptionV3, random .*\) than .* \(.* imagenet\)"):
        feature_network(config, expected_identity=network_identity(random_config()))
    with pytest.raises(UserError, match="features made by another program, and only that program's network can read"):
        feature_network(config, expected_identity=MADE_ELSEWHERE)


# --- Random weights


def test_random_weights_are_calibrated_once_and_stand_on_their_file(tiny, tmp_path, images):
    paths, pixels = images
    statistics = tmp_path / "kept" / "random_statistics.npz"
    config = random_config()
    features = compute(config, pixels, statistics, paths)
    assert features.shape == (6, 64, 2048)
    assert features.dtype == np.float32
    assert 0.1 < features.std() < 10  # the activations neither vanish nor explode
    with np.load(statistics) as saved:
        means, variances = ([saved[f"arr_{number}"] for number in pair] for pair in ((0, 2), (1, 3)))
    assert all(mean.any() for mean in means) and all((variance != 1).any() for variance in variances)
    written = statistics.read_bytes()

    for path in paths:
        path.unlink()
    np.testing.assert_array_equal(compute(config, pixels, statistics), features)  # as a trained run does
    np.testing.assert_array_equal(compute(config, pixels, statistics, paths), features)
    assert statistics.read_bytes() == written


def test_images_that_cannot_be_read_do_not_calibrate(tiny, tmp_path, images):
    paths, pixels = images
    features = compute(random_config(), pixels, tmp_path / "a.npz", paths)
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    others = [tmp_path / "broken.jpg", *paths, tmp_path / "missing.jpg"]
    np.testing.assert_array_equal(compute(random_config(), pixels, tmp_path / "b.npz", others), features)
    with pytest.raises(UserError, match="no training image can be read"):
        feature_network(random_config(), tmp_path / "c.npz", [tmp_path / "broken.jpg"])
    assert not (tmp_path / "c.npz").exists()


def test_other_calibrations_of_a_seed_are_other_networks(tiny, tmp_path, images):
    paths, config, places = images[0], random_config(), [tmp_path / f"{name}.npz" for name in "abc"]
    for place, calibration in zip(places, (paths[:3], paths[3:], paths[:3]), strict=True):
        feature_network(config, place, calibration)
    names = [network_identity(config, place) for place in places]
    assert names[0] == names[2] != names[1]
    assert network_identity(make_config(), places[0]) == network_identity(make_config())
    feature_network(config, places[2], expected_identity=names[0])
    with pytest.raises(UserError, match=r"another network \(.*seed 42 and calibration .*\) than .*seed 42 and calib"):
        feature_network(config, places[1], expected_identity=names[0])


def test_a_shard_takes_the_calibration_of_one_that_was_quicker(tiny, tmp_path, images, monkeypatch):
    paths, place = images[0], tmp_path / "a.npz"
    calibrate = networks.calibrate

    def calibrate_slowly(network, cnn, calibration):
        values = calibrate(network, cnn, calibration)
        networks.write_statistics(place, [2 * value for value in values], network_identity(random_config()))
        return values

    monkeypatch.setattr(networks, "calibrate", calibrate_slowly)
    feature_network(random_config(), place, paths)
    first = network_identity(random_config(), place)
    feature_network(random_config(), place, paths, expected_identity=first)


def test_statistics_of_another_seed_are_one_line(tiny, tmp_path, images):
    statistics = tmp_path / "a.npz"
    feature_network(random_config(), statistics, images[0])
    with pytest.raises(UserError, match=r"belongs to another network \(.* seed 42\) than .* \(.* seed 7\)[^\n]*$"):
        feature_network(random_config(seed=7), statistics, images[0])


def other_shape(values):
    return values | {"arr_0": values["arr_0"][:-1]}


def not_finite(values):
    return values | {"arr_1": values["arr_1"] * np.nan}


def one_less(values):
    return {name: value for name, value in values.items() if name != "arr_3"}


def without_identity(values):
    return {name: value for name, value in values.items() if name != "identity"}


@pytest.mark.parametrize("damage", [other_shape, not_finite, one_less, without_identity, b"", b"PK\3\4", None])
def test_missing_and_damaged_statistics_are_one_line(tiny, tmp_path, images, damage):
    statistics = tmp_path / "a.npz"
    feature_network(random_config(), statistics, images[0])
    if callable(damage):
        np.savez(statistics, **damage(dict(np.load(statistics))))
    elif damage is None:
        statistics.unlink()
    else:
        statistics.write_bytes(damage)
    with pytest.raises(UserError, match=r"a.npz is missing or damaged \(.*run python data_utils.py[^\n]*$"):
        feature_network(random_config(), statistics)


# --- Number types


def rewriting():
    options = tf.config.optimizer.get_experimental_options()
    return options["auto_mixed_precision_onednn_bfloat16"], options["arithmetic_optimization"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_extraction_leaves_the_rewriting_of_other_graphs_as_it_was(precision):
    config = make_config({"extract_precision": precision})
    with pytest.raises(KeyboardInterrupt), extraction_graphs(config):
        assert rewriting() == (precision == "bfloat16", False)
        raise KeyboardInterrupt
    assert rewriting() == (False, True)


class Gpu:
    name = "/physical_device:GPU:0"


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends that there is a GPU of some compute capability. Computations stay on the CPU."""

    def pretend(capability):
        details = {"compute_capability": capability} if capability else {}
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [Gpu] if kind == "GPU" else [])
        monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: details)

    return pretend


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "bfloat16"), ((9, 0), "bfloat16"), ((7, 5), "float16"), ((6, 1), "float32"), (None, "float32")],
)
def test_a_gpu_computes_in_the_type_that_is_fast_there(gpu, tiny, capability, expected):
    gpu(capability)
    config = make_config()
    assert extraction_precision(config) == expected
    assert extraction_precision(make_config({"extract_precision": "float32"})) == "float32"
    feature_network(config)
    assert tiny.policies == ["float32" if expected == "float32" else f"mixed_{expected}"]
    assert keras.config.dtype_policy().name == "float32"
    with extraction_graphs(config):
        assert rewriting() == (False, False)  # which is for CPUs


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_computes_in_the_type_that_is_fast_there(tiny, monkeypatch, fast):
    monkeypatch.setattr(networks, "has_fast_bfloat16", lambda: fast)
    assert extraction_precision(make_config()) == ("bfloat16" if fast else "float32")
    assert extraction_precision(make_config({"cnn": "EfficientNetV2B0"})) == "float32"
    assert extraction_precision(make_config({"cnn": "VGG16", "extract_precision": "bfloat16"})) == "bfloat16"
    feature_network(make_config())
    assert tiny.policies == ["float32"]  # TensorFlow rewrites the graph


@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
def test_a_gpus_type_gives_float32s_features_up_to_rounding(gpu, tiny, tmp_path, images, capability):
    paths, pixels = images
    wanted = compute(random_config(extract_precision="float32"), pixels, tmp_path / "a.npz", paths)
    gpu(capability)
    found = compute(random_config(), pixels, tmp_path / "a.npz")
    assert found.dtype == np.float32
    assert 0 < error(found, wanted) < 0.01


def photographs(count):
    paths = sorted((SHARED / "coco_mini" / "val2017").glob("*.jpg"))[:count]
    return np.stack([load_image(path, 299) for path in paths])


def error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs ../shared: real photographs and pretrained weights")
def test_inception_in_a_gpus_type_gives_float32s_features_up_to_rounding(gpu):
    pixels, weights = photographs(4), str(WEIGHTS)
    wanted = compute_alone(make_config({"inception_weights": weights, "extract_precision": "float32"}), pixels)
    for capability, bound in (((8, 0), 0.03), ((7, 5), 0.004)):
        gpu(capability)
        found = compute_alone(make_config({"inception_weights": weights}), pixels)
        assert found.shape == (4, 64, 2048)
        assert 0 < error(found, wanted) < bound


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs ../shared: real photographs and pretrained weights")
def test_fast_features_are_float32s_up_to_rounding():
    pixels, weights = photographs(16), str(WEIGHTS)
    exact, fast = (
        compute_alone(make_config({"inception_weights": weights, "extract_precision": precision}), pixels)
        for precision in ("float32", "auto")
    )
    norms = np.linalg.norm(exact, axis=-1) * np.linalg.norm(fast, axis=-1)
    assert ((exact * fast).sum(-1) / norms).mean() > 0.999
    assert error(fast, exact) < 0.025


# --- Compiling once


def test_nobody_enters_a_graph_before_its_first_call_has_ended():
    entered, first, go_on = [], threading.Event(), threading.Event()

    def graph(pixels):
        entered.append(pixels)
        if len(entered) == 1:
            first.set()
            assert go_on.wait(60)
        return pixels

    network = networks.compiled_once(graph)
    threads = [threading.Thread(target=network, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    assert first.wait(60)
    time.sleep(0.2)
    assert len(entered) == 1
    go_on.set()
    for thread in threads:
        thread.join()
    assert sorted(entered) == [0, 1, 2]


def test_calls_after_the_first_do_not_wait_for_each_other():
    together = threading.Barrier(3, timeout=60)
    network = networks.compiled_once(lambda pixels: pixels and together.wait())
    network(0)
    threads = [threading.Thread(target=network, args=(1,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not together.broken  # all three were there at once


def test_a_first_call_that_fails_leaves_the_next_to_be_the_first():
    calls = []

    def graph(pixels):
        calls.append(pixels)
        if len(calls) == 1:
            raise ValueError("out of memory")
        return pixels

    network = networks.compiled_once(graph)
    with pytest.raises(ValueError, match="out of memory"):
        network(1)
    assert network(2) == 2
    assert network(3) == 3
