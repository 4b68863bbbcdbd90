"""The trained captioner: restored from its run, it turns features into captions."""

import dataclasses

import numpy as np
import tensorflow as tf

from captioning.attention.evidence import explain_captions
from captioning.decoder.beam_search import beam_search
from captioning.decoder.generated_caption import GeneratedCaption
from captioning.decoder.rules import DecodedCaptions, has_ended
from captioning.features.cache import cached_batches
from captioning.vocabulary import END, PAD, encode_captions
from captioning.words import split_words
from model import CNN_Encoder, RNN_Decoder, greedy_decode

_USUAL_WORDS = 20  # most captions have fewer

_greedy_graph = tf.function(greedy_decode, reduce_retracing=True)
_beam_graph = tf.function(beam_search, reduce_retracing=True)


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

    encoder: CNN_Encoder
    decoder: RNN_Decoder
    vocabulary: list[str]
    checkpoint: str
    identity: str = ""
    network: str = ""


def decode_captions(encoder, decoder, features, config, max_words=None, graphs=(greedy_decode, beam_search)):
    """Greedy decoding or beam search, as the settings say.

    Args:
      features: float (B, P, F)
      config: Config; its max_words, beam_width, length_penalty and repeat_block.
      max_words: int, maybe as a tensor, instead of the config's.
      graphs: the two functions, or what compiles them.

    Returns:
      DecodedCaptions
    """
    greedy, beams = graphs
    most = config.max_words if max_words is None else max_words
    if config.beam_width == 1:
        return greedy(encoder, decoder, features, most, config.repeat_block)
    return beams(encoder, decoder, features, most, config.beam_width, config.length_penalty, config.repeat_block)


def caption_batch(captioner, images, features, config, with_evidence=False):
    """Caption images from their features.

    Args:
      captioner: Captioner
      images: list of B ImageToCaption.
      features: float (B, P, F)
      with_evidence: bool, whether the predictions get their evidence, which takes about as long as the captions.

    Returns:
      list of B GeneratedCaptions
    """
    features = tf.convert_to_tensor(features)
    # Greedily, few captions are long, and the others need not wait for them. With beams a longer one may yet win.
    most = min(_USUAL_WORDS, config.max_words) if config.beam_width == 1 else config.max_words
    decoded = _decode_rows(captioner, features, most, config)
    unfinished = [i for i, row in enumerate(decoded) if not has_ended(row.words)]
    if unfinished and most < config.max_words:
        longer = _decode_rows(captioner, tf.gather(features, unfinished), config.max_words, config)
        for i, row in zip(unfinished, longer, strict=True):
            decoded[i] = row
    predictions = [_generated_caption(*pair, captioner.vocabulary) for pair in zip(images, decoded, strict=True)]
    if with_evidence:
        return _add_evidence(captioner, predictions, features, [row.words for row in decoded])
    return predictions


def _add_evidence(captioner, predictions, features, words):
    """Predictions with attention weights, evidence and feature norms, from making the model say the words.

    Args:
      predictions: list of B GeneratedCaptions.
      features: float (B, P, F)
      words: list of B arrays of word ids, with <end> and maybe <pad>.
    """
    longest = max(len(row) for row in words)
    padded = np.stack([np.pad(row, (0, longest - len(row)), constant_values=PAD) for row in words])  # (B, L)
    encoder, decoder = captioner.encoder, captioner.decoder
    explained = explain_captions(encoder, decoder, features, tf.constant(padded, tf.int32))
    found = []
    for prediction, *maps, norms in zip(predictions, *(part.numpy() for part in explained), strict=True):
        weights, evidence = (part[: len(prediction.words)] for part in maps)  # (words, P)
        changes = {"attention_weights": weights, "evidence": evidence, "feature_norms": norms}
        found.append(dataclasses.replace(prediction, **changes))
    return found


def explain_references(captioner, images, config):
    """What the model looks at while it is made to say the images' reference captions.

    Returns:
      list of GeneratedCaptions with evidence, one for each reference; words that the model does not know are <unk>.
      They have no log_probs.
    """
    predictions = []
    for batch, features in cached_batches(images, config):
        for number in range(max(len(image.references) for image in batch)):
            rows = [i for i, image in enumerate(batch) if number < len(image.references)]
            encoded = encode_captions([batch[i].references[number] for i in rows], captioner.vocabulary)
            blank = [
                GeneratedCaption(
                    path=batch[i].path,
                    name=batch[i].name,
                    words=split_words(batch[i].references[number]),
                    log_probs=np.zeros(0),
                    attention_weights=np.zeros(0),
                    image_id=batch[i].image_id,
                )
                for i in rows
            ]
            words = [np.array(token_ids[1:], np.int32) for token_ids in encoded]  # without <start>
            predictions += _add_evidence(captioner, blank, tf.gather(features, rows), words)
    return predictions


def _decode_rows(captioner, features, max_words, config):
    """list of B DecodedCaptions of NumPy arrays, one for each image: (L,), (L,) and (L, P)."""
    graphs = _greedy_graph, _beam_graph
    most = tf.constant(max_words)  # a tensor, as another number would be another graph
    decoded = decode_captions(captioner.encoder, captioner.decoder, features, config, most, graphs)
    return [DecodedCaptions(*row) for row in zip(*(part.numpy() for part in decoded), strict=True)]


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
