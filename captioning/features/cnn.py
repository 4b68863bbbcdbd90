"""The networks of keras.applications that images can go through: what each takes, and the grid of features it gives."""

import dataclasses

import keras


@dataclasses.dataclass(frozen=True)
class CNN:
    """A network of keras.applications, cut off where its features still have places.

    Attributes:
      name: str, its constructor's in keras.applications.
      image_size: int, pixels: it takes squares with sides of this length, which is Keras's usual one.
      grid_size: int, locations on a side of its last grid.
      channels: int, F.
      imagenet_digest: str, MD5 or SHA-256 of Keras's file of its ImageNet weights without the top.
      preprocessing: str, mode of Keras's preprocess_input. "" for a network that does this itself: it takes 0 to 255.
      grid_layer: str, the layer whose output is the grid; "" for the last.
      keeps_captions_in_bfloat16: bool, as measured in docs/measurements.md. Others compute in float32 unless asked.
    """

    name: str
    image_size: int
    grid_size: int
    channels: int
    imagenet_digest: str
    preprocessing: str = ""
    grid_layer: str = ""
    keeps_captions_in_bfloat16: bool = False

    @property
    def feature_shape(self):
        """(P, F) of an image's features; the P locations are row by row."""
        return self.grid_size**2, self.channels


_TABLE = (
    # Szegedy et al., arXiv 1512.00567
    CNN("InceptionV3", 299, 8, 2048, "bcbd6486424b2319ff4ef7d526e38f63", "tf", keeps_captions_in_bfloat16=True),
    CNN("MobileNetV3Large", 224, 7, 960, "07fb09a5933dd0c8eaafa16978110389"),
    CNN("EfficientNetV2B0", 224, 7, 1280, "893217f2bb855e2983157299931e43ff"),
    CNN("EfficientNetV2B1", 240, 8, 1280, "0e80663031ca32d657f9caa404b6ec37"),
    CNN("EfficientNetV2B2", 260, 9, 1408, "1dfe2e7a5d45b6632553a8961ea609eb"),
    CNN("EfficientNetV2B3", 300, 10, 1536, "f6abf7b5849ac99a89b50dd3fd532856"),
    CNN("EfficientNetV2S", 384, 12, 1280, "af0682fb74e8c54910f2d4393339c070"),
    CNN("ResNet50V2", 224, 7, 2048, "fac2f116257151a9d068a22e544a4917", "tf"),
    CNN("ResNet101V2", 224, 7, 2048, "c0ed64b8031c3730f411d2eb4eea35b5", "tf"),
    CNN("DenseNet121", 224, 7, 1024, "30ee3e1110167f948a6b9946edeeb738", "torch"),
    # The paper's annotation vectors (section 4.3): 14x14x512, from before the last pooling.
    CNN("VGG16", 224, 14, 512, "6d6bbae143d832006294945121d1f1fc", "caffe", grid_layer="block5_conv3"),
    CNN("ConvNeXtTiny", 224, 7, 768, "d547c096cabd03329d7be5562c5e14798aa39ed24b474157cef5e85ab9e49ef1"),
    CNN("ConvNeXtSmall", 224, 7, 768, "6fc8009faa2f00c1c1dfce59feea9b0745eb260a7dd11bee65c8e20843da6eab"),
    CNN("ConvNeXtBase", 224, 7, 1024, "40a20c5548a5e9202f69735ecc06c990e6b7c9d2de39f0361e27baeb24cb7c45"),
)
CNNS = {cnn.name: cnn for cnn in _TABLE}


def preprocess(pixels, cnn):
    """What a CNN takes in place of pixels. float (B, height, width, 3), 0 to 255 -> the same shape."""
    modes = keras.applications.imagenet_utils
    return modes.preprocess_input(pixels, mode=cnn.preprocessing) if cnn.preprocessing else pixels
