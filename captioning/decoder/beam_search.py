"""Beam search: likelier captions than greedy decoding finds, and several of each image.

Letters of shapes as in model.py; K is the beam width.
"""

import tensorflow as tf

from captioning.decoder.rules import DecodedCaptions, has_ended, next_word_log_probs
from captioning.vocabulary import PAD, START

_NO_BEAM = -1e6  # log-probability of a beam that does not run yet; no caption's is so low


def beam_search(encoder, decoder, features, max_words, beam_width, length_penalty=0.0, repeat_block=0, count=1):
    """The likeliest captions of those that `beam_width` beams keep in view, as one graph over the batch.

    A beam that says <end> keeps its place to the last. The others go on until they end or have `max_words` words. Of
    an image's ended beams (of all, where none has ended) those of the highest log-probability divided by
    length ** length_penalty are taken, the best first. No two are alike.

    Args:
      features: float (B, P, F)
      max_words: int, the most words of a caption.
      beam_width: int, K.
      length_penalty: float; 0 ranks by plain log-probabilities, which favour short captions, 1 by their mean per word.
      repeat_block: int, no sequence of so many words is said twice; 0 for no such rule.
      count: int, N, captions of each image; K at most. Where an image has fewer, the last ones are <pad> alone.

    Returns:
      DecodedCaptions of (B, N, L), (B, N, L) and (B, N, L, P), L being the longest beam's length
    """
    encoded_features = encoder(features)  # (B, P, D)
    keys, hidden = decoder.attention.key_layer(encoded_features), decoder.initial_hidden(encoded_features)
    # The hidden state is a tensor, or what tensors model.py makes it of.
    state = tf.nest.map_structure(lambda x: tf.repeat(x, beam_width, 0), (encoded_features, keys, hidden))
    encoded_features, keys, hidden = state  # (BK, P, D), (BK, P, U), (BK, U)

    def one_word(scores, hidden, words, log_probs, attention_weights):
        said = tf.reshape(words, (-1, tf.shape(words)[2]))  # (BK, t + 1)
        logits, hidden, weights = decoder(said[:, -1:], encoded_features, hidden, keys)
        word_log_probs = next_word_log_probs(logits, said, repeat_block)  # (BK, V)
        word_log_probs = tf.reshape(word_log_probs, (-1, beam_width, logits.shape[-1]))  # (B, K, V)
        scores, beam, word, word_log_probs = _best_continuations(scores, word_log_probs, has_ended(words))  # (B, K)
        weights = tf.reshape(weights, (-1, beam_width, 1, weights.shape[1]))  # (B, K, 1, P)
        follow = lambda x: tf.gather(x, beam, batch_dims=1)  # noqa: E731
        hidden = tf.nest.map_structure(lambda x: _follow_rows(x, beam), hidden)  # (BK, U)
        words = tf.concat((follow(words), word[:, :, tf.newaxis]), 2)  # (B, K, t + 2)
        log_probs = tf.concat((follow(log_probs), word_log_probs[:, :, tf.newaxis]), 2)  # (B, K, t + 1)
        attention_weights = follow(tf.concat((attention_weights, weights), 2))  # (B, K, t + 1, P)
        return scores, hidden, words, log_probs, attention_weights

    batch, locations = tf.shape(features)[0], features.shape[1]
    state = (
        tf.tile([[0.0] + [_NO_BEAM] * (beam_width - 1)], (batch, 1)),  # (B, K); all are alike, so only one begins
        hidden,
        tf.fill((batch, beam_width, 1), START),
        tf.zeros((batch, beam_width, 0)),
        tf.zeros((batch, beam_width, 0, locations)),
    )
    rows = tf.nest.map_structure(lambda x: tf.TensorShape((None, *x.shape[1:])), hidden)
    growing = [tf.TensorShape((None, beam_width, *sizes)) for sizes in ((), (None,), (None,), (None, locations))]
    scores, _, words, log_probs, attention_weights = tf.while_loop(
        lambda scores, hidden, words, *_: ~tf.reduce_all(has_ended(words)),
        one_word,
        state,
        shape_invariants=(growing[0], rows, *growing[1:]),
        maximum_iterations=max_words,
    )
    best, is_caption = _rank_beams(scores, words, length_penalty, count)  # (B, N) each
    words, log_probs, attention_weights = (
        tf.gather(x, best, batch_dims=1) for x in (words[:, :, 1:], log_probs, attention_weights)
    )  # (B, N, L), (B, N, L), (B, N, L, P)
    return DecodedCaptions(tf.where(is_caption[:, :, tf.newaxis], words, PAD), log_probs, attention_weights)


def _follow_rows(x, beam):
    """The rows of the beams that are continued, whatever their shape. (BK, ...), int (B, K) -> (BK, ...)."""
    x = tf.reshape(x, (-1, beam.shape[1], *x.shape[1:]))  # (B, K, ...)
    return tf.reshape(tf.gather(x, beam, batch_dims=1), (-1, *x.shape[2:]))  # (BK, ...)


def _best_continuations(scores, word_log_probs, ended):
    """The K best continuations of an image's K beams by one word.

    Args:
      scores: float (B, K), log-probability of each beam.
      word_log_probs: float (B, K, V), of the next word.
      ended: bool (B, K)

    Returns: (B, K) each
      scores of the continued beams, the beams that they continue, the words, and the log-probabilities of these
    """
    beam_width, vocab_size = word_log_probs.shape[1:]
    flat = lambda x: tf.reshape(x, (-1, beam_width * vocab_size))  # noqa: E731
    ended = ended[:, :, tf.newaxis]  # (B, K, 1)
    word_log_probs = tf.where(ended, 0.0, word_log_probs)  # (B, K, V)
    candidates = scores[:, :, tf.newaxis] + word_log_probs  # (B, K, V)
    # An ended beam goes on with <pad> alone, and that ranks above all that running beams can say (at most 0).
    is_pad = tf.range(vocab_size) == PAD  # (V,)
    ranks = tf.where(ended, tf.where(is_pad, 1.0, -tf.float32.max), candidates)  # (B, K, V)
    best = tf.math.top_k(flat(ranks), beam_width).indices  # (B, K)
    scores, word_log_probs = (tf.gather(flat(x), best, batch_dims=1) for x in (candidates, word_log_probs))  # (B, K)
    return scores, best // vocab_size, best % vocab_size, word_log_probs


def _rank_beams(scores, words, length_penalty, count):
    """The beams taken at the end, the best first.

    Args:
      scores: float (B, K), log-probability of each beam.
      words: int (B, K, L + 1), from <start> on.
      length_penalty, count: as `beam_search` takes them.

    Returns:
      best: int (B, N)
      is_caption: bool (B, N), False for beams that broke off while others ended, and for those that never ran
    """
    ended = has_ended(words)  # (B, K)
    eligible = ended | ~tf.reduce_any(ended, axis=1, keepdims=True)  # (B, K)
    lengths = tf.reduce_sum(tf.cast(words[:, :, 1:] != PAD, tf.float32), axis=2)  # (B, K)
    ranks = tf.where(eligible, scores / lengths**length_penalty, -tf.float32.max)  # (B, K)
    best = tf.math.top_k(ranks, count).indices  # (B, N)
    return best, tf.gather(eligible & (scores > _NO_BEAM / 2), best, batch_dims=1)  # (B, N) each
