"""The trained captioner as one TensorFlow SavedModel, from the bytes of image files to captions, without this code.

caption = tensorflow.saved_model.load(folder).signatures["serving_default"]
caption(images=tensorflow.constant([open("image.jpg", "rb").read()]))["captions"]
"""

import contextlib
import glob
import os
import pathlib
import secrets
import shutil

import tensorflow as tf

from captioning.decoder.beam_search import beam_search
from captioning.decoder.edited_model import following_model
from captioning.decoder.rules import DecodedCaptions
from captioning.export.graph_images import OK, read_images
from captioning.features.cnn import CNNS
from captioning.vocabulary import END, PAD
from captioning.words import is_character
from model import greedy_decode
from support.errors import UserError
from support.files import TEMPORARY, free_space, is_pattern, locked


def export_captioner(captioner, network, config, folder):
    """Write the captioner to a folder, which is whole afterwards or not there.

    Args:
      captioner: Captioner
      network: function of uint8 (B, side, side, 3) -> float32 (B, P, F), as feature_network returns.
      config: Config; its max_words, beam_width, length_penalty and repeat_block are the export's.
      folder: where to; may be there if it is empty.

    Raises:
      UserError: the folder holds something, cannot be written, or could not be read by TensorFlow.
    """
    if is_pattern(folder):
        raise UserError(f"TensorFlow cannot read a model in {folder}, for the [ or \\ in it: give another --export")
    with new_folder(folder) as temporary, following_model("the SavedModel", "or take another --format"):
        _write_saved_model(captioner, network, config, temporary)


@contextlib.contextmanager
def new_folder(folder):
    """Give the block a temporary folder beside `folder`, and rename it to `folder` when the block ends.

    If the block raises an error, nothing is left but the empty file of the lock, which keeps out another export to the
    same folder.

    Raises:
      UserError: the folder holds something or cannot be written, or another process is exporting to it.
    """
    target = pathlib.Path(folder).resolve()
    try:
        name = os.fsencode(target.name).decode()
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):  # an empty folder is nothing
            raise UserError(f"{target} is there already: name another folder behind --export, or delete it")
        with locked(target.parent, f"{name}.export"):
            for left in target.parent.glob(f"{TEMPORARY}*-{glob.escape(name)}.export"):  # of an export that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{name}.export")
            try:
                temporary.mkdir()
                yield temporary
                os.replace(temporary, target)  # fails where the folder holds something by now
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except UnicodeError:
        raise UserError(f"{folder} is no UTF-8: name another folder behind --export") from None
    except (OSError, tf.errors.OpError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot write {folder}: {reason} ({free_space(target.parent)})") from error


def decode_captions(encoder, decoder, features, config):
    """The likeliest caption of each image, greedy or of the best beam. float (B, P, F), Config -> DecodedCaptions."""
    if config.beam_width == 1:
        return greedy_decode(encoder, decoder, features, config.max_words, config.repeat_block)
    how = config.max_words, config.beam_width, config.length_penalty, config.repeat_block
    found = beam_search(encoder, decoder, features, *how)
    return DecodedCaptions(*(x[:, 0] for x in found))  # (B, L), (B, L), (B, L, P)


def _write_saved_model(captioner, network, config, folder):
    """Write decoding of images, CNN, encoder, decoder and vocabulary as a SavedModel.

    Its signature `serving_default` takes
      images: string (B,), files as bytes: JPEG, PNG, WebP, GIF (of which the first image counts) or BMP
    and returns
      captions: string (B,)
      log_probabilities: float32 (B,), natural
      attention_weights: float32 (B, L, P), of a caption's words, then of <end> and of padding to the longest's
      statuses: string (B,), "ok", "unreadable", "too large" or "not sRGB" (convert such an image, or caption it by
        script 3); where it is not "ok" the others are empty or 0
    The signature `one` takes `image`, string (), and returns caption (), log_probability (), attention_weights (L, P)
    and status ().

    All is computed in float32, so a caption may differ where the scripts use bfloat16. Args: as of `export_captioner`,
    but the folder is there.
    """
    words = ["" if i in (PAD, END) else word for i, word in enumerate(captioner.vocabulary)]  # (V,)
    joined = [not word or is_character(word) for word in words]  # (V,), without a blank on either side

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="images")])
    def caption_many(images):
        pixels, statuses = read_images(images, CNNS[config.cnn].image_size)  # (B, side, side, 3), (B,)
        decoded = decode_captions(captioner.encoder, captioner.decoder, network(pixels), config)
        alone = ~tf.gather(joined, decoded.words)  # (B, L)
        blanks = tf.where(alone[:, :-1] & alone[:, 1:], " ", "")  # (B, L - 1), before all words but the first
        pieces = tf.strings.join((tf.pad(blanks, ((0, 0), (1, 0))), tf.gather(words, decoded.words)))  # (B, L)
        usable = statuses == OK  # (B,)
        return {
            "captions": tf.where(usable, tf.strings.reduce_join(pieces, axis=1), ""),
            "log_probabilities": tf.where(usable, tf.reduce_sum(decoded.log_probs, axis=1), 0.0),  # (B,)
            "attention_weights": tf.where(usable[:, tf.newaxis, tf.newaxis], decoded.attention_weights, 0.0),
            "statuses": statuses,
        }

    @tf.function(input_signature=[tf.TensorSpec((), tf.string, name="image")])
    def caption_one(image):
        answers = {name: values[0] for name, values in caption_many(image[tf.newaxis]).items()}
        return {
            "caption": answers["captions"],
            "log_probability": answers["log_probabilities"],
            "attention_weights": answers["attention_weights"],  # (L, P)
            "status": answers["statuses"],
        }

    model = tf.Module()
    model.weights = [weight.value for weight in captioner.encoder.weights + captioner.decoder.weights]
    tf.saved_model.save(model, str(folder), signatures={"serving_default": caption_many, "one": caption_one})
