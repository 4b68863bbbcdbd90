"""The trained captioner: restored from its run, it turns features into captions."""

import dataclasses
import itertools
import os
import zlib

import keras
import numpy as np
import tensorflow as tf

from captioning.attention.evidence import explain_captions
from captioning.decoder.beam_search import beam_search
from captioning.decoder.edited_model import following_model
from captioning.decoder.generated_caption import GeneratedCaption
from captioning.decoder.nucleus_sampling import sample_decode
from captioning.decoder.rules import DecodedCaptions
from captioning.features.cache import cached_batches
from captioning.vocabulary import END, PAD, encode_captions
from captioning.words import split_words
from model import greedy_decode
from support.errors import UserError

_DRAWS = 5  # captions drawn at most for each one wanted, as none is to come twice

_greedy_graph = tf.function(greedy_decode, reduce_retracing=True)
_beam_graph = tf.function(beam_search, reduce_retracing=True)
_sample_graph = tf.function(sample_decode, reduce_retracing=True)


@dataclasses.dataclass(frozen=True)
class Captioner:
    """A trained model and its words.

    Attributes:
      encoder, decoder: as model.build_captioner returns them.
      vocabulary: list of V words.
      checkpoint: str, which checkpoint the weights are from, such as best/ckpt-5.
      identity: str, a digest that no other checkpoint has; "" where nobody asks for it.
      network: str, identity of the network that made the features; "" where nobody asks for it.
    """

    encoder: keras.Model
    decoder: keras.Model
    vocabulary: list[str]
    checkpoint: str
    identity: str = ""
    network: str = ""


def greedy_settings(config):
    """The settings with which an image gets one caption, the greedy one."""
    return dataclasses.replace(config, beam_width=1, captions_per_image=1, sample="no")


def sampling_settings(config):
    """What drawn captions depend on besides the other settings of decoding, dict of script 3's option to value."""
    return {"temperature": config.temperature, "top_p": config.top_p, "seed": config.sample_seed}


def decoding_settings(given, config):
    """The settings with as many beams as captions are wanted, and a line where there were fewer.

    Args:
      given: dict of setting to value, from the command line.
      config: Config

    Raises:
      UserError: settings of sampling are given without it, or beams with it.
    """
    if config.sample == "no" and (unused := [name for name in ("temperature", "top_p") if name in given]):
        raise UserError(f"--{unused[0]} says how captions are drawn: give --sample too")
    if config.sample == "yes" and given.get("beam_width", 1) > 1:
        raise UserError("--sample draws captions and --beam_width searches for them: give one of the two")
    count = config.captions_per_image
    if config.sample == "yes" or config.beam_width >= count:
        return config
    print(f"--beam_width {count} is taken instead of {config.beam_width}, to find as many captions")
    return dataclasses.replace(config, beam_width=count)


def caption_batch(captioner, images, features, config, with_evidence=False):
    """Caption images from their features.

    Args:
      captioner: Captioner
      images: list of B ImageToCaption.
      features: float (B, P, F)
      config: Config, the settings of decoding, with as many beams as `decoding_settings` gives.
      with_evidence: bool, whether the predictions get their evidence, which takes about as long as the captions.

    Returns:
      list of B GeneratedCaptions, the other captions of an image in their `others`. An image has fewer than
      `captions_per_image` where no more were found.
    """
    features = tf.convert_to_tensor(features)
    if config.sample == "yes":
        rows = _sample_rows(captioner, images, features, config)
    elif config.beam_width > 1:
        rows = _best_rows(captioner, features, config)
    else:
        how = config.max_words, config.repeat_block
        with following_model("greedy_decode"):
            decoded = _greedy_graph(captioner.encoder, captioner.decoder, features, *how)
        rows = [[row] for row in _unstack(decoded)]
    said = [
        [(_generated_caption(image, row, captioner.vocabulary), row.words) for row in of_image]
        for image, of_image in zip(images, rows, strict=True)
    ]
    captions = _explain(captioner, features, said) if with_evidence else [[each for each, _ in group] for group in said]
    return [dataclasses.replace(first, others=others) for first, *others in captions]


def caption_cached(captioner, images, config, with_evidence=False):
    """Yields what `caption_batch` returns, image by image, of ImageToCaptions with cached features."""
    for batch, features in cached_batches(images, config):
        yield from caption_batch(captioner, batch, features, config, with_evidence)


@following_model("evidence", "or caption without it by --figures 0 (--evaluate needs it)")
def _explain(captioner, features, said):
    """Captions with attention weights, evidence and feature norms, from making the model say them.

    Args:
      features: float (B, P, F)
      said: list of B lists of (GeneratedCaption, array of its token ids with <end> and maybe <pad>).

    Returns:
      list of B lists of GeneratedCaptions
    """
    found = [[] for _ in said]
    # One caption of each image at a time, as each takes the memory of its image's features.
    for number in range(max(map(len, said), default=0)):
        have = [i for i, group in enumerate(said) if number < len(group)]
        captions, words = zip(*(said[i][number] for i in have), strict=True)
        longest = max(map(len, words))
        padded = np.stack([np.pad(row, (0, longest - len(row)), constant_values=PAD) for row in words])  # (b, L)
        those = tf.gather(features, have)  # (b, P, F)
        explained = explain_captions(captioner.encoder, captioner.decoder, those, tf.constant(padded, tf.int32))
        for i, caption, *maps, norms in zip(have, captions, *(part.numpy() for part in explained), strict=True):
            weights, evidence = (part[: len(caption.words)] for part in maps)  # (words, P)
            changes = {"attention_weights": weights, "evidence": evidence, "feature_norms": norms}
            found[i].append(dataclasses.replace(caption, **changes))
    return found


def explain_references(captioner, images, config):
    """What the model looks at while it is made to say the images' reference captions.

    Returns:
      list of GeneratedCaptions with evidence, one for each reference; words that the model does not know are <unk>.
      They have no log_probs.
    """
    captions = []
    for batch, features in cached_batches(images, config):
        said = []
        for image in batch:
            encoded = encode_captions(image.references, captioner.vocabulary)
            nothing = {"log_probs": np.zeros(0), "attention_weights": np.zeros(0), "image_id": image.image_id}
            blank = [
                GeneratedCaption(image.path, image.name, split_words(text), **nothing) for text in image.references
            ]
            said.append([(each, token_ids[1:]) for each, token_ids in zip(blank, encoded, strict=True)])  # no <start>
        by_number = itertools.zip_longest(*_explain(captioner, features, said))  # the first of each image, and so on
        captions += [caption for group in by_number for caption in group if caption]
    return captions


@following_model("beam search", "or caption with --beam_width 1 (--evaluate needs beams)")
def _best_rows(captioner, features, config):
    """The captions of each image by its best beams. float (B, P, F) -> list of B lists as `_unstack` gives them."""
    how = config.max_words, config.beam_width, config.length_penalty, config.repeat_block, config.captions_per_image
    found = _beam_graph(captioner.encoder, captioner.decoder, features, *how)  # (B, N, ...)
    return [[row for row in _unstack(of_image) if row.words.any()] for of_image in _unstack(found)]


@following_model("--sample", "or caption without it")
def _sample_rows(captioner, images, features, config):
    """Captions of each image that are drawn, in the order of the draws, none twice.

    list of B ImageToCaption, float (B, P, F) -> list of B lists as `_unstack` gives them
    """
    count = config.captions_per_image
    chances = np.stack([sample_chances(image.path.name, config) for image in images])  # (B, draws, max_words)
    found = [{} for _ in images]
    for start in range(0, chances.shape[1], count):
        few = [i for i, rows in enumerate(found) if len(rows) < count]
        if not few:
            break
        drawn = _sample_graph(
            captioner.encoder,
            captioner.decoder,
            tf.gather(features, few),
            tf.constant(chances[few, start : start + count]),
            config.temperature,
            config.top_p,
            config.repeat_block,
        )  # (b, N, ...)
        for i, of_image in zip(few, _unstack(drawn), strict=True):
            for row in _unstack(of_image):
                if len(found[i]) < count:
                    found[i].setdefault(tuple(word for word in row.words if word not in (PAD, END)), row)
    return [list(rows.values()) for rows in found]


def sample_chances(file_name, config):
    """What an image's captions are drawn by: numbers that depend on the seed and on the file's name alone.

    So an image gets the same captions in any batch and in any folder, and more captions begin with the same ones.

    Returns:
      float32 (_DRAWS * captions_per_image, max_words), uniform from 0 to 1, a row for each draw
    """
    generator = np.random.default_rng((config.sample_seed, zlib.crc32(os.fsencode(file_name))))
    return generator.random((_DRAWS * config.captions_per_image, config.max_words), np.float32)


def _unstack(decoded):
    """The parts of DecodedCaptions along their first axis, as a list of DecodedCaptions of NumPy arrays."""
    return [DecodedCaptions(*row) for row in zip(*map(np.asarray, decoded), strict=True)]


def _generated_caption(image, row, vocabulary):
    """The GeneratedCaption of one image's decoded words."""
    words = [vocabulary[i] for i in row.words if i not in (PAD, END)]
    count = int(np.count_nonzero(row.words != PAD))  # with <end>
    return GeneratedCaption(
        path=image.path,
        name=image.name,
        words=words,
        log_probs=row.log_probs[:count],
        attention_weights=row.attention_weights[: len(words)],
        image_id=image.image_id,
        references=image.references,
    )
