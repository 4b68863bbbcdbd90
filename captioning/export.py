"""The trained captioner as one TensorFlow SavedModel, from the bytes of image files to captions, without this code.

caption = tensorflow.saved_model.load(folder).signatures["serving_default"]
caption(images=tensorflow.constant([open("image.jpg", "rb").read()]))["captions"]
"""

import functools
import os
import pathlib
import shutil

import tensorflow as tf

from captioning.captioner import decode_captions
from captioning.image_files import IMAGE_SIZE
from captioning.vocabulary import END, PAD
from support.errors import UserError
from support.files import free_space


def export_captioner(captioner, network, config, folder):
    """Write decoding of images, InceptionV3, encoder, decoder and vocabulary as a SavedModel.

    Its signature `serving_default` takes
      images: string (B,), B at least 1, files as bytes: JPEG, PNG, WebP, BMP without a palette, or a GIF's first frame
    and returns
      captions: string (B,)
      log_probabilities: float32 (B,), natural
      attention_weights: float32 (B, L, P), of a caption's words, then of <end> and of padding to the longest's

    TensorFlow does not read EXIF, so a photograph is captioned as it is stored, not as a viewer would turn it. All is
    computed in float32, so a caption may differ where the scripts use bfloat16. One damaged file fails the whole batch.

    Args:
      captioner: Captioner
      network: function of uint8 (B, 299, 299, 3) -> float32 (B, P, F), as feature_network returns.
      config: Config; its max_words, beam_width, length_penalty and repeat_block are the exported model's.
      folder: where to; may be there if it is empty.

    Raises:
      UserError: the folder holds something, or cannot be written.
    """
    words = ["" if i in (PAD, END) else word for i, word in enumerate(captioner.vocabulary)]  # (V,)

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="images")])
    def caption(images):
        pixels = tf.map_fn(decode_image, images, fn_output_signature=tf.uint8)  # (B, 299, 299, 3)
        decoded = decode_captions(captioner.encoder, captioner.decoder, network(pixels), config)
        return {
            "captions": tf.strings.strip(
                tf.strings.reduce_join(tf.gather(words, decoded.words), axis=1, separator=" ")
            ),
            "log_probabilities": tf.reduce_sum(decoded.log_probs, axis=1),  # (B,)
            "attention_weights": decoded.attention_weights,
        }

    model = tf.Module()
    model.weights = [weight.value for weight in captioner.encoder.weights + captioner.decoder.weights]
    target = pathlib.Path(folder).resolve()
    temporary = target.with_name(f".{target.name}.export")
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UserError(f"{folder} is there already: name another folder behind --export, or delete it")
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir(parents=True)
        tf.saved_model.save(model, str(temporary), signatures=caption)
        os.replace(temporary, target)
    except (OSError, tf.errors.OpError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot write {folder}: {reason} ({free_space(target.parent)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def decode_image(data):
    """What image_files.load_image does, EXIF apart, inside a graph. string () -> uint8 (299, 299, 3)."""
    if tf.strings.substr(data, 0, 2) == b"\xff\xd8":  # JPEG
        decode = functools.partial(tf.io.decode_jpeg, data, 3, dct_method="INTEGER_ACCURATE")  # as Pillow does
        excess = tf.reduce_min(tf.io.extract_jpeg_shape(data)[:2]) // IMAGE_SIZE  # a large one at 1/2, 1/4 or 1/8
        smaller = tf.reduce_sum(tf.cast(excess >= (2, 4, 8), tf.int32))
        rgb = tf.switch_case(smaller, [functools.partial(decode, ratio=ratio) for ratio in (1, 2, 4, 8)])
    elif tf.strings.substr(data, 0, 4) == b"\x89PNG":
        rgba = tf.cast(tf.io.decode_png(data, 4), tf.float32)
        opaque = rgba[:, :, 3:] / 255  # (height, width, 1)
        rgb = tf.cast(tf.round(opaque * rgba[:, :, :3] + (1 - opaque) * 255), tf.uint8)
    else:
        rgb = tf.io.decode_image(data, 3, expand_animations=False)
    resized = tf.image.resize(rgb, (IMAGE_SIZE, IMAGE_SIZE), antialias=True)
    return tf.cast(tf.round(resized), tf.uint8)
