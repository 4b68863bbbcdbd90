"""A trained captioner as a SavedModel, or as a LiteRT or ONNX bundle."""
