"""Where a word was seen: attention weights, times how much of the word each location shows.

Attention weights alone are half of it. They are chosen before the word is known, and a location counts by its weight,
by what is there (Kobayashi et al., 2020, arXiv 2004.10102, show it for Transformers), and by whether that is the word.
With a the attention weights, x the features and s(w) the detector's sightings of a word w (captioning/grounding.py),

  evidence_p ~ a_p * s_p(w) * |x_p|   which sums to 1 over the locations

|x_p| knows nothing of the word: features are large on things. Letters of shapes as in model.py.
"""

import tensorflow as tf

from captioning.grounding import word_maps
from captioning.vocabulary import START


@tf.function(reduce_retracing=True)
def explain_captions(encoder, decoder, features, words):
    """Attention weights and evidence while the decoder is made to say given captions.

    Args:
      encoder, decoder: as model.build_captioner returns them.
      features: float (B, P, F)
      words: int (B, L), each caption's words with <end>, then <pad>.

    Returns:
      attention_weights: float (B, L, P)
      evidence: float (B, L, P), of no meaning behind <end>
      feature_norms: float (B, P)
    """
    features = tf.cast(features, tf.float32)
    encoded_features = encoder(features)  # (B, P, D)
    keys = decoder.attention.key_layer(encoded_features)  # (B, P, U)
    feature_norms = tf.norm(features, axis=2)  # (B, P)
    previous = tf.concat((tf.fill((tf.shape(words)[0], 1), START), words[:, :-1]), 1)  # (B, L)
    word_gates = decoder.word_gates(decoder.embedding(tf.transpose(previous)))  # (L, B, 3U)
    hidden = decoder.initial_hidden(encoded_features)  # (B, U)
    _, weights = decoder.unroll(word_gates, None, hidden, encoded_features, keys)  # (L, B, P)
    weights = tf.transpose(weights, (1, 0, 2))  # (B, L, P)
    all_words, _ = tf.unique(tf.reshape(words, (-1,)))  # (W,)
    maps = word_maps(decoder.detector(encoded_features, all_words), all_words, words)  # (B, L, P)
    evidence = weights * maps * feature_norms[:, tf.newaxis]  # (B, L, P)
    return weights, tf.math.divide_no_nan(evidence, tf.reduce_sum(evidence, 2, keepdims=True)), feature_norms
