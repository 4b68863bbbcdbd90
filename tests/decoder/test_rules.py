import numpy as np
import pytest
import tensorflow as tf

from captioning.decoder.rules import _BANNED_LOG_PROB, _block_repeated_ngrams, has_ended, next_word_log_probs
from captioning.vocabulary import END, PAD, START, UNK

VOCABULARY = 30

REPEATS = [
    (1, [START, 5, 6], {5, 6}),
    (2, [START, 5, 5], {5}),
    (2, [START, 5, 6, 7, 5], {6}),
    (2, [START, 5, 6, 5, 7, 5], {6, 7}),
    (3, [START, 5, 6, 7, 5, 6], {7}),
    (3, [START, 5, 5, 7, 5], set()),
    (3, [START], set()),
]


@pytest.mark.parametrize(("length", "said", "blocked"), REPEATS)
def test_no_sequence_is_said_twice(length, said, blocked):
    log_probs = _block_repeated_ngrams(tf.zeros((1, VOCABULARY)), tf.constant([said]), length)[0].numpy()
    assert set(np.flatnonzero(log_probs < -1e8)) - {PAD, START} == blocked
    assert (log_probs[log_probs > -1e8] == 0).all()


def test_each_caption_is_blocked_by_its_own_words():
    said = tf.constant([[START, 5, 6, 7, 5], [START, 8, 9, 8, 8]])
    log_probs = _block_repeated_ngrams(tf.zeros((2, VOCABULARY)), said, 2).numpy()
    assert [set(np.flatnonzero(row < -1e8)) - {PAD, START} for row in log_probs] == [{6}, {8, 9}]


@pytest.mark.parametrize(("length", "said", "blocked"), [(0, [START, 5, 5], set()), *REPEATS])
def test_words_that_may_be_said_keep_their_log_probabilities(length, said, blocked):
    logits = np.random.default_rng(0).standard_normal((1, VOCABULARY)).astype(np.float32)
    log_probs = next_word_log_probs(tf.constant(logits), tf.constant([said]), length)[0].numpy()
    banned = {PAD, UNK, START} | blocked
    assert set(np.flatnonzero(log_probs < _BANNED_LOG_PROB / 2)) == banned
    free = [i for i in range(VOCABULARY) if i not in banned]
    sayable = np.delete(np.arange(VOCABULARY), [PAD, UNK, START])  # blocked words keep their share
    expected = logits[0] - np.log(np.exp(logits[0, sayable]).sum())
    np.testing.assert_allclose(log_probs[free], expected[free], rtol=1e-5)


@pytest.mark.parametrize("banned", [PAD, UNK, START])
def test_probabilities_are_of_what_can_be_said_however_likely_the_rest(banned):
    logits = np.random.default_rng(0).standard_normal((1, VOCABULARY)).astype(np.float32)
    expected = next_word_log_probs(tf.constant(logits), tf.constant([[START, 5, 6]]), 0).numpy()
    logits[0, banned] += 30
    log_probs = next_word_log_probs(tf.constant(logits), tf.constant([[START, 5, 6]]), 0).numpy()
    sayable = np.delete(np.arange(VOCABULARY), [PAD, UNK, START])
    np.testing.assert_allclose(log_probs[:, sayable], expected[:, sayable], rtol=1e-5)
    assert np.exp(log_probs).sum() == pytest.approx(1, rel=1e-5)


def test_a_caption_has_ended_at_end_and_behind_it():
    words = tf.constant([[[START, 5], [5, END]], [[END, PAD], [END, 6]]])
    assert has_ended(words).numpy().tolist() == [[False, True], [True, False]]
    assert has_ended(words[0, 1].numpy()) and not has_ended(words[0, 0].numpy())  # NumPy's arrays too
