"""InceptionV3 on ready batches: this project's graph against ONNX Runtime and OpenVINO, images a second.

PYTHONPATH=. python tests/benchmarks/engine_speed.py --write FILE.onnx [--weights FILE]
PYTHONPATH=. python tests/benchmarks/engine_speed.py --engine tensorflow [--weights FILE]
PYTHONPATH=. python tests/benchmarks/engine_speed.py --engine onnxruntime|openvino --onnx FILE.onnx

The first command writes Keras's InceptionV3 as ONNX (needs tf2onnx and 8 GB of memory). The others measure one engine,
in a process of its own and, but for `tensorflow`, without TensorFlow. Run the engines in turn. The mean of the features
is printed too: it must be the same for all.
"""

import argparse
import contextlib
import statistics
import time

import numpy as np

SIZE = 299


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", metavar="FILE")
    parser.add_argument("--engine", choices=["tensorflow", "onnxruntime", "openvino"])
    parser.add_argument("--onnx", metavar="FILE")
    parser.add_argument("--weights", default="imagenet", help="as --inception_weights (default: imagenet)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.write:
        write_onnx(options)
        return
    makers = {"tensorflow": tensorflow_network, "onnxruntime": onnxruntime_network, "openvino": openvino_network}
    network = makers[options.engine](options)
    pixels = np.random.default_rng(0).integers(0, 256, (options.batch, SIZE, SIZE, 3), np.uint8)
    times = []
    for _ in range(options.batches + 2):  # the first two warm up
        start = time.perf_counter()
        features = network(pixels)
        times.append(time.perf_counter() - start)
    rate = options.batch / statistics.median(times[2:])
    print(f"{options.engine}, {options.precision}, batch {options.batch}: {rate:.1f} images/s", end="")
    print(f"; features {features.shape}, mean {features.mean():.5f}")


def write_onnx(options):
    import support.before_tensorflow  # noqa: F401, I001  must come first
    import tensorflow as tf
    import tf2onnx

    from captioning.features.cnn import CNNS
    from captioning.features.network import load_cnn

    inception = load_cnn(CNNS["InceptionV3"], options.weights, "float32")

    @tf.function(input_signature=[tf.TensorSpec((None, SIZE, SIZE, 3), tf.float32, name="pixels")])
    def network(pixels):
        return tf.reshape(inception(pixels / 127.5 - 1.0, training=False), (-1, 64, 2048))  # (B, P, F)

    tf2onnx.convert.from_function(network, network.input_signature, opset=17, output_path=options.write)


def tensorflow_network(options):
    """The graph that script 1 computes features with."""
    import support.before_tensorflow  # noqa: F401, I001  must come first
    import tensorflow as tf

    from captioning.features.network import extraction_graphs, feature_network
    from captioning.settings import make_config

    config = make_config({"inception_weights": options.weights, "extract_precision": options.precision})
    contextlib.ExitStack().enter_context(extraction_graphs(config))
    compute = feature_network(config)
    return lambda pixels: compute(tf.constant(pixels)).numpy()


def onnxruntime_network(options):
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(options.onnx, settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: session.run(None, {name: pixels.astype(np.float32)})[0]


def openvino_network(options):
    import openvino

    core = openvino.Core()
    hint = {"float32": "f32", "bfloat16": "bf16"}[options.precision]
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": options.threads, "NUM_STREAMS": 1}
    compiled = core.compile_model(core.read_model(options.onnx), "CPU", settings)
    return lambda pixels: compiled(pixels.astype(np.float32))[0]


if __name__ == "__main__":
    main()
