import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

from captioning.export.onnx_models import write_onnx


@pytest.mark.slow
def test_the_gelu_of_a_cnn_is_computed_without_an_operation_that_onnx_lacks(tmp_path):
    image = keras.Input((4,))
    model = keras.Model(image, keras.layers.Activation("gelu")(image))  # ConvNeXt's

    @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, "x")])
    def compute(x):
        return {"y": model(x)}

    write_onnx({"gelu": compute}, "float32", tmp_path)
    x = np.linspace(-6, 6, 40, dtype=np.float32).reshape(-1, 4)
    (found,) = onnxruntime.InferenceSession(tmp_path / "gelu.onnx").run(["y"], {"x": x})
    np.testing.assert_allclose(found, compute(tf.constant(x))["y"], atol=1e-6)
