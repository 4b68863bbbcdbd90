"""The trained captioner as one TensorFlow SavedModel, from the bytes of image files to captions, without this code.

    model = tensorflow.saved_model.load(folder).signatures["serving_default"]
    model(images=tensorflow.constant([open("image.jpg", "rb").read()]))["captions"]
"""

import os
import pathlib
import shutil

from command_line import UserError
from data_utils import END, IMAGE_SIZE, PAD
from files import free_space
from model import decode_captions

import tensorflow as tf


def export_captioner(captioner, network, config, folder):
    """Write decoding of images, InceptionV3, encoder, decoder and vocabulary as a SavedModel that serves

      images: string (B,), the bytes of JPEG, PNG, GIF (first frame), BMP or WebP files

    Returns (of the signature `serving_default`):
      captions: string (B,)
      log_probabilities: float32 (B,), natural
      attention_weights: float32 (B, L, P), L the longest caption's words and <end>; row t is a caption's word t

    A photograph is taken as it is stored, as TensorFlow cannot read which side EXIF says is up. All is computed in
    float32, so a caption can differ from the scripts' where these use bfloat16 or Pillow scales a large JPEG file.

    Args:
      captioner: has encoder, decoder and vocabulary, as inference_image_caption.load_captioner returns.
      network: function of uint8 (B, 299, 299, 3) -> float32 (B, P, F), as feature_network returns.
      config: Config; `max_words`, and the beam's settings where it has them.
      folder: the SavedModel's path; a folder that is there must be empty.

    Raises:
      UserError: the folder holds something already, or cannot be written.
    """
    target = pathlib.Path(folder).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{folder} is there already: name another folder behind --export, or delete it")
    beam = getattr(config, "beam_width", 1), getattr(config, "length_penalty", 0.0)
    said = tf.constant(["" if i in (PAD, END) else word for i, word in enumerate(captioner.vocabulary)])  # (V,)

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="images")])
    def caption(images):
        pixels = tf.map_fn(decode_image, images, tf.TensorSpec((IMAGE_SIZE, IMAGE_SIZE, 3), tf.uint8))
        words, log_probabilities, attention_weights = decode_captions(
            captioner.encoder, captioner.decoder, network(pixels), config.max_words, *beam
        )
        return {
            "captions": tf.strings.strip(tf.strings.reduce_join(tf.gather(said, words), axis=1, separator=" ")),
            "log_probabilities": log_probabilities,
            "attention_weights": attention_weights,
        }

    module = tf.Module()  # what it holds is saved
    module.encoder, module.decoder, module.said = captioner.encoder, captioner.decoder, said
    temporary = target.with_name(f".{target.name}.export")
    shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
    try:
        temporary.mkdir(parents=True)
        tf.saved_model.save(module, str(temporary), signatures=caption)
        os.replace(temporary, target)
    except (OSError, tf.errors.OpError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot write {folder}: {reason} ({free_space(target.parent)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def decode_image(data):
    """What data_utils.load_image does, but for EXIF, in a graph. Bytes, string () -> uint8 (299, 299, 3)."""
    rgb = tf.case(
        [
            (
                tf.strings.substr(data, 0, 2) == b"\xff\xd8",
                lambda: tf.io.decode_jpeg(data, 3, dct_method="INTEGER_ACCURATE"),  # as Pillow
            ),
            (tf.strings.substr(data, 0, 4) == b"\x89PNG", lambda: on_white(tf.io.decode_png(data, 4))),
        ],
        default=lambda: tf.io.decode_image(data, 3, expand_animations=False),
    )
    scaled = tf.image.resize(rgb, (IMAGE_SIZE, IMAGE_SIZE), antialias=True)
    return tf.cast(tf.round(scaled), tf.uint8)


def on_white(rgba):
    """Transparent parts white. uint8 (height, width, 4) -> uint8 (height, width, 3)."""
    rgba = tf.cast(rgba, tf.float32)
    opaque = rgba[:, :, 3:] / 255  # (height, width, 1)
    return tf.cast(tf.round(opaque * rgba[:, :, :3] + (1 - opaque) * 255), tf.uint8)
