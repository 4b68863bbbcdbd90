import hashlib
import json
import os
import threading
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_network import WEIGHTS, TinyInception, photographs, random_config

from captioning.features import frozen_graph
from captioning.features.frozen_graph import _GRAPH, _NOTE, kept_network
from captioning.features.manifest import MADE_ELSEWHERE
from captioning.features.network import extraction_graphs, feature_network, network_identity
from captioning.settings import make_config
from conftest import full_disk
from support.errors import UserError
from support.process import release_memory

PIXELS = np.random.default_rng(1).integers(0, 256, (5, 299, 299, 3), np.uint8)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(frozen_graph, "release_memory", lambda: None)  # which takes longer than all else
    return TinyInception(monkeypatch)


def keep(folder, config=None, expected=None):
    config = config or make_config()
    statistics = folder / "random_statistics.npz"
    return kept_network(folder, config, statistics, expected or network_identity(config, statistics))


def features(network, pixels=PIXELS):
    return network(tf.constant(pixels)).numpy()


def plain_features(config, pixels=PIXELS, statistics=None):
    with extraction_graphs(config):
        computed = features(feature_network(config, statistics), pixels)
    frozen_graph.release_memory()
    return computed


def write_statistics(folder, config):
    """The statistics of random weights, measured on a few images that other tests need not have."""
    Image.fromarray(PIXELS[0]).save(folder / "calibration.png")
    feature_network(config, folder / "random_statistics.npz", [folder / "calibration.png"])


# --- The same features, whichever way -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_kept_network_gives_the_features_of_one_made_anew(tiny, tmp_path, precision, batch):
    config = random_config(extract_precision=precision)
    write_statistics(tmp_path, config)
    wanted = plain_features(config, PIXELS[:batch], tmp_path / "random_statistics.npz")
    made = len(tiny.policies)
    first = features(keep(tmp_path, config), PIXELS[:batch])
    second = features(keep(tmp_path, config), PIXELS[:batch])
    assert first.shape == (batch, 64, 2048)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, wanted)
    np.testing.assert_array_equal(second, wanted)
    assert len(tiny.policies) == made + 1  # the second was built by nobody


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs ../shared: real photographs and pretrained weights")
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_the_real_network_gives_the_same_features_bit_by_bit(tmp_path, precision):
    config = make_config({"inception_weights": str(WEIGHTS), "extract_precision": precision})
    pixels = photographs(4)
    wanted = plain_features(config, pixels)
    for _ in ("made", "read"):
        np.testing.assert_array_equal(features(keep(tmp_path, config), pixels), wanted)
        release_memory()


def test_threads_may_share_a_kept_network(tiny, tmp_path):
    config = make_config()
    network = keep(tmp_path, config)
    wanted, found = features(network), {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: features(network)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for each in found.values():
        np.testing.assert_array_equal(each, wanted)


def test_kerass_model_is_gone_before_its_graph_is_rewritten(tiny, tmp_path, monkeypatch):
    """Rewriting holds a dozen copies of the weights for a while."""
    models, left = [], []
    rewrite = frozen_graph._rewrite_graph

    def build(**given):
        model = tiny.build(**given)
        models.append(weakref.ref(model))
        return model

    def count_models(*given):
        left.extend(model() for model in models)
        return rewrite(*given)

    monkeypatch.setattr(frozen_graph, "release_memory", release_memory)
    monkeypatch.setattr(keras.applications, "InceptionV3", build)
    monkeypatch.setattr(frozen_graph, "_rewrite_graph", count_models)
    keep(tmp_path)
    assert left == [None]


# --- Nothing stale, damaged or foreign is trusted ---------------------------------------------------------------------


def cut(folder):
    (folder / _GRAPH).write_bytes((folder / _GRAPH).read_bytes()[:-1000])


def turn_a_bit(folder):
    data = bytearray((folder / _GRAPH).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / _GRAPH).write_bytes(data)


def change_note(name, value):
    def damage(folder):
        note = json.loads((folder / _NOTE).read_text())
        assert name in note
        (folder / _NOTE).write_text(json.dumps({**note, name: value}))

    return damage


def add_a_harmful_node(folder):
    """As somebody would who wants a run folder to write files."""
    graph = tf.compat.v1.GraphDef.FromString((folder / _GRAPH).read_bytes())
    graph.node.add(name="harm", op="WriteFile")
    (folder / _GRAPH).write_bytes(graph.SerializeToString())
    change_note("graph", hashlib.sha256(graph.SerializeToString()).hexdigest())(folder)


def add_a_function(folder):
    graph = tf.compat.v1.GraphDef.FromString((folder / _GRAPH).read_bytes())
    graph.library.function.add().signature.name = "harm"
    (folder / _GRAPH).write_bytes(graph.SerializeToString())
    change_note("graph", hashlib.sha256(graph.SerializeToString()).hexdigest())(folder)


DAMAGES = {
    "no graph": lambda folder: (folder / _GRAPH).unlink(),
    "no note": lambda folder: (folder / _NOTE).unlink(),
    "empty graph": lambda folder: (folder / _GRAPH).write_bytes(b""),
    "graph cut": cut,
    "a bit turned": turn_a_bit,
    "note is no JSON": lambda folder: (folder / _NOTE).write_text("{"),
    "note is a list": lambda folder: (folder / _NOTE).write_text("[]"),
    "other TensorFlow": change_note("libraries", "TensorFlow 2.20.0, Keras 3.15.1"),
    "other machine": change_note("machine", "aarch64, fast bfloat16: False"),
    "other code": change_note("code", "0" * 64),
    "other weights": change_note("network", "InceptionV3, weights of SHA-256 0123456789abcdef"),
    "another graph's digest": change_note("graph", "0" * 64),
    "operation that is no arithmetic": add_a_harmful_node,
    "a function in the graph": add_a_function,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_does_not_fit_is_made_anew(tiny, tmp_path, damage):
    config = random_config()
    write_statistics(tmp_path, config)
    wanted = features(keep(tmp_path, config))
    good = (tmp_path / _NOTE).read_bytes()
    made = len(tiny.policies)
    damage(tmp_path)
    np.testing.assert_array_equal(features(keep(tmp_path, config)), wanted)
    assert len(tiny.policies) == made + 1
    assert json.loads((tmp_path / _NOTE).read_bytes()).keys() == json.loads(good).keys()
    keep(tmp_path, config)
    assert len(tiny.policies) == made + 1


def test_what_the_graph_depends_on_makes_it_anew(tiny, tmp_path, monkeypatch):
    config = random_config(extract_precision="float32")
    write_statistics(tmp_path, config)
    exact = features(keep(tmp_path, config))
    made = len(tiny.policies)

    rounded = random_config(extract_precision="bfloat16")
    keep(tmp_path, rounded)  # where the processor has no bfloat16, it computes the same
    assert len(tiny.policies) == made + 1
    np.testing.assert_array_equal(features(keep(tmp_path, config)), exact)
    assert len(tiny.policies) == made + 2

    with np.load(tmp_path / "random_statistics.npz") as saved:
        values = dict(saved)
    values["arr_1"] = 4 * values["arr_1"]
    np.savez(tmp_path / "random_statistics.npz", **values)
    assert not np.array_equal(features(keep(tmp_path, config)), exact)
    assert len(tiny.policies) == made + 3

    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1" if os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0" else "0")
    keep(tmp_path, config)
    assert len(tiny.policies) == made + 4


def test_lost_statistics_of_random_weights_are_an_error_as_ever(tiny, tmp_path):
    config = random_config()
    write_statistics(tmp_path, config)
    keep(tmp_path, config)
    (tmp_path / "random_statistics.npz").unlink()
    with pytest.raises(UserError, match="random_statistics.npz is missing"):
        keep(tmp_path, config)


def test_another_network_than_the_models_is_an_error_though_its_graph_is_there(tiny, tmp_path):
    keep(tmp_path)
    with pytest.raises(UserError, match="another network"):
        keep(tmp_path, expected="InceptionV3, random weights of seed 7")
    with pytest.raises(UserError, match="another program"):
        keep(tmp_path, expected=MADE_ELSEWHERE)


def test_where_the_graph_cannot_be_kept_a_line_says_so_and_the_network_works(tiny, tmp_path, capsys):
    config = random_config()
    write_statistics(tmp_path, config)
    with full_disk(1000):
        found = features(keep(tmp_path, config))
    assert "note: the next start will take as long as this one: cannot write" in capsys.readouterr().out
    assert not (tmp_path / _NOTE).exists()
    assert not list(tmp_path.glob(".tmp*"))
    np.testing.assert_array_equal(features(keep(tmp_path, config)), found)
    assert "later starts are faster" in capsys.readouterr().out
    keep(tmp_path, config)
    assert capsys.readouterr().out == ""
