"""The CNN's graph, kept beside a run, as making it takes longer than all the rest of a first caption.

network_graph.pb       a TensorFlow GraphDef: batch norm folded, weights rounded, number types chosen
network_graph.json     what it was made of, and the digest of network_graph.pb

A graph that was made of anything else, or is damaged, is made anew. For CPUs only: a GPU's graph is another one.
"""

import hashlib
import os
import pathlib
import platform
import threading

import keras
import tensorflow as tf
from tensorflow.core.protobuf import rewriter_config_pb2
from tensorflow.python.grappler import tf_optimizer

from captioning.features.cnn import CNNS
from captioning.features.network import (
    check_identity,
    compiled_once,
    extraction_precision,
    feature_graph,
    network_identity,
)
from support.devices import has_fast_bfloat16
from support.errors import UserError
from support.files import read_json, write_bytes, write_json
from support.process import release_memory

_GRAPH, _NOTE = "network_graph.pb", "network_graph.json"
# A change of these files may change the graph.
_SOURCES = "cnn.py", "network.py", "random_weights.py", "frozen_graph.py"
_PIXELS, _FEATURES = "pixels:0", "Identity:0"  # as TensorFlow names what feature_graph takes and returns
# What a graph may consist of. A file that somebody else wrote could do anything else, such as write files.
_OPERATIONS = {"Placeholder", "Const", "Identity", "Cast", "Reshape", "Mul", "RealDiv", "AddV2", "Sub"}
_OPERATIONS |= {"Conv2D", "BiasAdd", "FusedBatchNormV3", "Relu", "MaxPool", "AvgPool", "ConcatV2"}
_OPERATIONS |= {"DepthwiseConv2dNative", "MatMul", "Pad", "Mean", "Relu6", "Sigmoid", "Erfc", "Neg", "Add"}
_OPERATIONS |= {"SquaredDifference", "Rsqrt", "Shape", "StridedSlice", "Pack", "Prod", "GatherV2"}


def kept_network(folder, config, statistics, expected_identity):
    """The network that is kept in a folder, or else the one that `feature_graph` makes, which is then kept there.

    Both ways the same graph computes the features.

    Args:
      folder: pathlib.Path of the run.
      config, statistics, expected_identity: as `feature_graph` takes them.

    Returns:
      function of uint8 (B, side, side, 3) -> float32 (B, P, F)

    Raises:
      UserError: as `feature_graph` does.
    """
    check_identity(config, statistics, expected_identity)
    made_of = _describe_network(config, statistics)
    graph = _read_graph(folder, made_of)
    if graph is None:
        made = feature_graph(config, statistics, expected_identity=expected_identity)
        graph = made.get_concrete_function().graph.as_graph_def()
        del made
        release_memory()  # Keras's model and its graph, before rewriting takes a dozen copies of the weights
        graph = _rewrite_graph(graph, made_of["precision"])
        _keep_graph(folder, made_of, graph, config.cnn)
        release_memory()
    network = compiled_once(_graph_function(graph))
    side = CNNS[config.cnn].image_size
    blank = tf.zeros((1, side, side, 3), tf.uint8)
    threading.Thread(target=network, args=(blank,)).start()  # compiles it while the caller goes on
    return network


def _describe_network(config, statistics):
    """All that the graph depends on. Returns a dict of name to str."""
    here = pathlib.Path(__file__)
    return {
        "network": network_identity(config, statistics),
        "precision": extraction_precision(config),
        "code": _digest(b"".join(here.with_name(name).read_bytes() for name in _SOURCES)),
        "libraries": f"TensorFlow {tf.version.VERSION}, Keras {keras.version()}",
        "machine": f"{platform.machine()}, fast bfloat16: {has_fast_bfloat16()}",
        "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", ""),
    }


def _digest(data):
    return hashlib.sha256(data).hexdigest()


def _rewrite_graph(graph, precision):
    """Do beforehand what TensorFlow does to a graph when it first runs, but for the last step, see `_graph_function`.

    Args:
      graph: GraphDef without variables, as what is returned.
      precision: "bfloat16" or "float32", what convolutions compute in.
    """
    options = tf.compat.v1.ConfigProto()
    rewriting = options.graph_options.rewrite_options
    rewriting.arithmetic_optimization = rewriter_config_pb2.RewriterConfig.OFF  # as extraction_graphs has it
    if precision == "bfloat16":
        rewriting.auto_mixed_precision_onednn_bfloat16 = rewriter_config_pb2.RewriterConfig.ON
    whole = tf.compat.v1.MetaGraphDef(graph_def=graph)
    whole.collection_def["train_op"].node_list.value.append(_FEATURES)  # what is to be computed
    rewritten = tf_optimizer.OptimizeGraph(options, whole)
    for node in rewritten.node:
        if node.op == "Const":  # bfloat16 numbers as bytes, which are read much faster
            value = node.attr["value"].tensor
            value.CopyFrom(tf.make_tensor_proto(tf.make_ndarray(value)))
    return rewritten


def _graph_function(graph):
    """What runs a graph that `_rewrite_graph` returned. It has a session of its own for the sake of its own options."""
    with tf.Graph().as_default() as owner:
        tf.graph_util.import_graph_def(graph, name="")
    options = tf.compat.v1.ConfigProto()
    rewriting = options.graph_options.rewrite_options
    rewriting.optimizers.append("remap")  # gives convolutions their biases and ReLUs, for which no file format exists
    rewriting.meta_optimizer_iterations = rewriter_config_pb2.RewriterConfig.ONE
    compute = tf.compat.v1.Session(graph=owner, config=options).make_callable(_FEATURES, [_PIXELS])
    return lambda pixels: tf.constant(compute(pixels.numpy()))  # (B, P, F)


# --- The files --------------------------------------------------------------------------------------------------


def _read_graph(folder, made_of):
    """The GraphDef that is kept in a folder, or None where it is missing, damaged or made of anything else."""
    try:
        note = read_json(folder / _NOTE)
        data = (folder / _GRAPH).read_bytes()
        if note != {**made_of, "graph": _digest(data)}:
            return None
        graph = tf.compat.v1.GraphDef.FromString(data)
    except Exception:  # whatever is wrong with the files, the graph can be made anew
        return None
    is_arithmetic = {node.op for node in graph.node} <= _OPERATIONS and not graph.library.function
    return graph if is_arithmetic else None


def _keep_graph(folder, made_of, graph, name):
    """Keep the GraphDef of a CNN for the next start. Where that fails, a line says so and all else goes on."""
    data = graph.SerializeToString()
    try:
        write_bytes(folder / _GRAPH, data)
        write_json(folder / _NOTE, {**made_of, "graph": _digest(data)}, indent=1)
    except UserError as error:
        print(f"note: the next start will take as long as this one: {error}")
        return
    print(f"{name} is kept ready in {folder / _GRAPH} ({len(data) / 1e6:.0f} MB): later starts are faster")
