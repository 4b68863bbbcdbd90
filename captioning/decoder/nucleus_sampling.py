"""Sampling: captions whose words are drawn by their probabilities, so that an image gets captions of many kinds.

Unlikely words, of which there are thousands, spoil a caption where one of them is drawn. So words are drawn from the
nucleus alone, the fewest words that together have a probability of top_p (Holtzman et al., 2020, arXiv 1904.09751).
Letters of shapes as in model.py; S samples are drawn of each image, and L is the length of the longest.
"""

import tensorflow as tf

from captioning.decoder.rules import DecodedCaptions, has_ended, next_word_log_probs
from captioning.vocabulary import PAD, START

_USUAL_NUCLEUS = 256  # words; most nuclei have fewer, and finding these takes a small part of the time of sorting all


def sample_decode(encoder, decoder, features, chances, temperature=1.0, top_p=1.0, repeat_block=0):
    """Draw each word from the nucleus of its probabilities, until <end> or as many words as there are chances.

    Args:
      features: float (B, P, F)
      chances: float (B, S, M), uniform from 0 to 1, what each of M words is drawn by.
      temperature: float above 0, by which log-probabilities are divided; below 1 likely words become likelier.
      top_p: float, 0 to 1, probability of the nucleus at that temperature; 1 for all words.
      repeat_block: int, no sequence of so many words is said twice; 0 for no such rule.

    Returns:
      DecodedCaptions of (B, S, L), (B, S, L) and (B, S, L, P). Their log_probs are the model's, at temperature 1 and of
      all words, as for greedy decoding.
    """
    B, S, P = tf.shape(features)[0], tf.shape(chances)[1], features.shape[1]
    encoded_features = encoder(features)  # (B, P, D)
    state = encoded_features, decoder.attention.key_layer(encoded_features), decoder.initial_hidden(encoded_features)
    state = tf.nest.map_structure(lambda x: tf.repeat(x, S, 0), state)
    encoded_features, keys, hidden = state  # (BS, P, D), (BS, P, U), (BS, U)
    chances = tf.reshape(chances, (B * S, -1))  # (BS, M)

    def one_word(words, log_probs, attention_weights, hidden):
        logits, hidden, weights = decoder(words[:, -1:], encoded_features, hidden, keys)
        candidates = next_word_log_probs(logits, words, repeat_block)  # (BS, V)
        probabilities = keep_nucleus(tf.nn.softmax(candidates / temperature), top_p)  # (BS, V)
        ended = has_ended(words)  # (BS,)
        word = tf.where(ended, PAD, draw_words(probabilities, chances[:, tf.shape(words)[1] - 1]))  # (BS,)
        log_prob = tf.where(ended, 0.0, tf.gather(candidates, word, batch_dims=1))  # (BS,)
        words = tf.concat((words, word[:, tf.newaxis]), 1)  # (BS, t + 2)
        log_probs = tf.concat((log_probs, log_prob[:, tf.newaxis]), 1)  # (BS, t + 1)
        return words, log_probs, tf.concat((attention_weights, tf.transpose(weights, (0, 2, 1))), 1), hidden

    state = tf.fill((B * S, 1), START), tf.zeros((B * S, 0)), tf.zeros((B * S, 0, P)), hidden
    shapes = tuple(map(tf.TensorShape, ((None, None), (None, None), (None, None, P))))
    shapes += (tf.nest.map_structure(lambda x: tf.TensorShape((None, *x.shape[1:])), hidden),)
    running = lambda words, *_: ~tf.reduce_all(has_ended(words))  # noqa: E731
    words, *found, _ = tf.while_loop(running, one_word, state, shapes, maximum_iterations=tf.shape(chances)[1])
    apart = lambda x: tf.reshape(x, tf.concat(((B, S), tf.shape(x)[1:]), 0))  # noqa: E731
    return DecodedCaptions(*map(apart, (words[:, 1:], *found)))  # (B, S, L), (B, S, L), (B, S, L, P)


def keep_nucleus(probabilities, top_p):
    """Probabilities without the words outside of the nucleus. Words as likely as its least likely one are in it.

    float (N, V) -> float (N, V), which no longer sums to 1.
    """
    if top_p >= 1:
        return probabilities
    falling = tf.math.top_k(probabilities, min(_USUAL_NUCLEUS, probabilities.shape[1])).values  # (N, 256)
    is_enough = tf.reduce_all(tf.reduce_sum(falling, axis=1) >= top_p)
    all_sorted = lambda: tf.sort(probabilities, direction="DESCENDING")  # noqa: E731
    falling = tf.cond(is_enough, lambda: falling, all_sorted)  # (N, at most V)
    is_kept = tf.cumsum(falling, axis=1, exclusive=True) < top_p  # (N, at most V)
    least = tf.reduce_min(tf.where(is_kept, falling, 1.0), axis=1, keepdims=True)  # (N, 1)
    return tf.where(probabilities >= least, probabilities, 0.0)  # (N, V)


def draw_words(probabilities, chances):
    """The word at which the probabilities, added up, pass the chance's share of their sum.

    float (N, V), (N,) -> int (N,)
    """
    cumulative = tf.cumsum(probabilities, axis=1)  # (N, V)
    # A share that rounding makes the whole sum would draw the last word, whatever its probability.
    thresholds = tf.minimum(chances, 1 - 2**-23) * cumulative[:, -1]  # (N,)
    words = tf.reduce_sum(tf.cast(cumulative <= thresholds[:, tf.newaxis], tf.int32), axis=1)  # (N,)
    return tf.minimum(words, tf.shape(probabilities)[1] - 1)  # (N,)
