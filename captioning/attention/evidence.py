"""Which locations made the model say a word: attention weights, times how much each location speaks for the word.

It is not what the model attended to: the attention weights are, which say little on photographs. A location counts by
its weight, by what is there, and by whether that speaks for the word (Kobayashi et al., 2020, arXiv 2004.10102, show
the second for Transformers). With a the attention weights, v the encoded features, x the features and c the context
vector at a word w,

  g = d log p(w) / d c                            how the context vector should change to make the word likelier
  s_p                                             the share of location p in what the detector sees of w
  evidence_p ~ a_p * exp(v_p . g) * s_p * |x_p|   which sums to 1 over the locations

The first two factors are, to first order, the probability that location p was looked at, given that w was said. They
are the decoder's. The other two know nothing of the decoder: s_p depends only on image and word (word_detector.py in
captioning/decoder/), |x_p| only on the image; features are large on things. Letters of shapes as in model.py.
"""

import tensorflow as tf

from captioning.decoder.basic_layers import softmax_cross_entropy
from captioning.decoder.rules import ban_words
from captioning.decoder.word_detector import word_maps
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
    maps = word_maps(decoder.detector, words, encoded_features) * feature_norms[:, tf.newaxis]  # (B, L, P)

    def one_word(state, inputs):
        (hidden, *_), (before, word, word_map) = state, inputs
        with tf.GradientTape() as tape:
            tape.watch(encoded_features)  # and not the keys: attention stays as it is
            logits, hidden, attention_weights = decoder(before[:, tf.newaxis], encoded_features, hidden, keys)
            log_probs = -softmax_cross_entropy(ban_words(logits), word)  # (B,)
        weights = attention_weights[:, :, 0]  # (B, P)
        # The gradient by v_p is a_p g. Taken by v_p, it follows any step that model.py has. It is 0 where no word
        # depends on the image.
        gradient = tape.gradient(log_probs, encoded_features, unconnected_gradients="zero")  # (B, P, D)
        gains = tf.math.divide_no_nan(tf.reduce_sum(encoded_features * gradient, axis=2), weights)  # (B, P)
        logs = tf.math.log(weights + 1e-30) + gains + tf.math.log(word_map + 1e-30)  # (B, P)
        return hidden, weights, tf.nn.softmax(logs)

    first = decoder.initial_hidden(encoded_features), feature_norms, feature_norms  # the last two only tell the shape
    inputs = tf.transpose(previous), tf.transpose(words), tf.transpose(maps, (1, 0, 2))  # (L, B, ...)
    _, weights, evidence = tf.scan(one_word, inputs, first)  # (L, B, ...)
    return tf.transpose(weights, (1, 0, 2)), tf.transpose(evidence, (1, 0, 2)), feature_norms
