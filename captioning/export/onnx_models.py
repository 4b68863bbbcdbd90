"""TensorFlow functions as ONNX models, by tf2onnx.

tf2onnx keeps a copy of every constant for each of its dozens of passes over a graph: of InceptionV3, gigabytes. So
large weights leave the graph before, as if they were inputs, and come back as initializers afterwards.
"""

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from support.errors import UserError
from support.process import silenced_stderr

_OPSET = 18
_LARGE = 10_000  # numbers: smaller constants stay, as tf2onnx must see shapes and the vectors of batch norm
_FEW = 1024  # numbers: tensors with fewer stay float32


def write_onnx(functions, weights, folder):
    """Write <name>.onnx for each function.

    Args:
      functions: dict of name to tf.function with an input signature, which returns a dict of tensors.
      weights: "float32" or "float16", what they are kept as.
      folder: pathlib.Path

    Raises:
      UserError: tf2onnx is not installed.
    """
    try:
        import tf2onnx  # noqa: F401
    except ImportError:
        raise UserError("--format onnx needs one more package: run pip install tf2onnx") from None
    for name, function in functions.items():
        with silenced_stderr():
            model = _convert(function.get_concrete_function())
        if weights == "float16":
            _halve_weights(model.graph)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())


def _convert(function):
    """A ConcreteFunction as an ONNX ModelProto, whose inputs and outputs are named as the function's."""
    from tf2onnx.convert import from_graph_def, tensor_names_from_structed

    frozen = convert_variables_to_constants_v2(function, lower_control_flow=False, aggressive_inlining=True)
    graph = frozen.graph.as_graph_def(add_shapes=True)
    weights = _take_out_weights(graph)
    inputs, outputs = ([tensor.name for tensor in tensors] for tensors in (frozen.inputs, frozen.outputs))
    model, _ = from_graph_def(
        graph,
        input_names=[*inputs, *weights],
        output_names=outputs,
        opset=_OPSET,
        custom_op_handlers={name: (rule, []) for name, rule in _RULES.items()},
        tensors_to_rename=tensor_names_from_structed(function, inputs, outputs),
    )
    _put_in_weights(model, weights)
    return model


def _take_out_weights(graph):
    """Make placeholders of a GraphDef's large constants. Returns them as dict of tensor name to array."""
    weights = {}
    for node in graph.node:
        if node.op == "Const":
            value = node.attr["value"].tensor
            shape = [axis.size for axis in value.tensor_shape.dim]
            if np.prod(shape) > _LARGE:
                weights[f"{node.name}:0"] = tf.make_ndarray(value)
                node.op = "Placeholder"
                node.attr["shape"].shape.CopyFrom(value.tensor_shape)
                del node.attr["value"]
    return weights


def _put_in_weights(model, weights):
    """Make initializers of the inputs that `_take_out_weights` made."""
    from onnx import numpy_helper

    for value in [value for value in model.graph.input if value.name in weights]:
        model.graph.input.remove(value)
        model.graph.initializer.append(numpy_helper.from_array(weights[value.name], value.name))


def _halve_weights(graph):
    """Keep the weights of an ONNX graph as float16. The runtime makes them float32 as it loads."""
    from onnx import TensorProto, helper, numpy_helper

    for tensor in graph.initializer:
        values, name = numpy_helper.to_array(tensor), tensor.name
        large = values.dtype == np.float32 and values.size >= _FEW
        if large and np.abs(values).max() <= np.finfo(np.float16).max:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}/float16"))
            graph.node.insert(0, helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))


def _plain_gradient(graph, node, name, arguments):
    """How tf2onnx shall write the gradients of sigmoid and tanh, for which it has no rule.

    y, d_y -> d_y * (y - y * y) for the sigmoid, d_y * (1 - y * y) for tanh.
    """
    y, d_y = node.input
    minuend = y if node.type == "SigmoidGrad" else graph.make_const(f"{name}/one", np.float32(1)).output[0]
    square = graph.make_node("Mul", [y, y]).output[0]
    slope = graph.make_node("Sub", [minuend, square]).output[0]
    _replace_node(graph, node, name, "Mul", [d_y, slope])


def _one_minus_erf(graph, node, name, arguments):
    """How tf2onnx shall write erfc, which Keras's GELU has and ONNX has not."""
    erf = graph.make_node("Erf", node.input).output[0]
    one = graph.make_const(f"{name}/one", np.float32(1)).output[0]
    _replace_node(graph, node, name, "Sub", [one, erf])


def _replace_node(graph, node, name, operation, inputs):
    """Let another operation make a node's outputs."""
    shapes, types = node.output_shapes, node.output_dtypes
    graph.remove_node(node.name)
    graph.make_node(operation, inputs, outputs=node.output, name=name, shapes=shapes, dtypes=types)


_RULES = {"SigmoidGrad": _plain_gradient, "TanhGrad": _plain_gradient, "Erfc": _one_minus_erf}
