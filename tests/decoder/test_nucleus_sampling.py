import itertools

import numpy as np
import pytest
import tensorflow as tf

from captioning.decoder.nucleus_sampling import draw_words, keep_nucleus, sample_decode
from captioning.decoder.rules import _BANNED_WORDS, ban_words
from captioning.settings import make_config
from captioning.vocabulary import END, PAD, START
from tiny_captioner import SIZES, VOCABULARY, tiny_captioner

DRAWS = 4_000
sample = tf.function(sample_decode)


@pytest.fixture(scope="module")
def features():
    return tf.constant(np.random.default_rng(5).standard_normal((3, 64, 2048), np.float32))


@pytest.fixture(scope="module")
def captioner(features):
    """(encoder, decoder) that is sure of no word."""
    tiny = tiny_captioner(make_config(SIZES), features.numpy())
    tiny.decoder.output_layer.kernel.assign(tiny.decoder.output_layer.kernel / 5)
    return tiny.encoder, tiny.decoder


def chances(*shape):
    return np.random.default_rng(1).random(shape, np.float32)


# --- Words --------------------------------------------------------------------------------------------------------


def test_a_word_is_drawn_where_the_probabilities_pass_the_chance():
    probabilities = tf.constant([[0.0, 0.25, 0.0, 0.5, 0.25]] * 6)  # (N, V)
    words = draw_words(probabilities, tf.constant([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-24]))
    assert words.numpy().tolist() == [1, 1, 3, 3, 4, 4]
    assert words.shape == (6,)


def test_words_are_drawn_as_often_as_their_probability():
    chances = tf.constant((np.arange(10_000) + 0.5) / 10_000, tf.float32)
    probabilities = np.random.default_rng(1).dirichlet(np.ones(30)).astype(np.float32)
    words = draw_words(tf.constant([probabilities] * 10_000), chances)
    np.testing.assert_allclose(np.bincount(words, minlength=30) / 10_000, probabilities, atol=2e-4)


def test_rounding_never_draws_a_word_outside_of_the_nucleus():
    """The last words are outside, and the chance is the highest that there is."""
    sums = np.random.default_rng(0).random((2_000, 1), np.float32)
    probabilities = tf.constant(sums * np.float32([[0.3, 0.6, 0.1, 0.0, 0.0]]))  # (N, V)
    assert set(draw_words(probabilities, tf.fill((2_000,), tf.constant(1 - 2**-24))).numpy()) == {2}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.1, [1]), (0.4, [1]), (0.41, [1, 4]), (0.7, [1, 4]), (0.71, [0, 1, 4]), (0.95, [0, 1, 3, 4]), (1.0, range(5))],
)
def test_the_nucleus_is_the_fewest_words_that_reach_top_p(top_p, kept):
    probabilities = np.float32([0.2, 0.4, 0.02, 0.08, 0.3])
    expected = [value if word in kept else 0 for word, value in enumerate(probabilities)]
    np.testing.assert_array_equal(keep_nucleus(tf.constant([probabilities]), top_p)[0], expected)


def test_a_nucleus_of_many_words_is_whole(monkeypatch):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(50), 3).astype(np.float32)
    whole = keep_nucleus(tf.constant(probabilities), 0.9).numpy()
    assert ((whole > 0).sum(1) > 20).all() and (whole.sum(1) >= 0.9).all()
    monkeypatch.setattr("captioning.decoder.nucleus_sampling._USUAL_NUCLEUS", 4)
    np.testing.assert_array_equal(keep_nucleus(tf.constant(probabilities), 0.9), whole)


# --- Captions -----------------------------------------------------------------------------------------------------


def nucleus_by_hand(log_probs, temperature, top_p):
    """Probabilities of the words that are drawn. (V,) -> (V,), float64."""
    probabilities = np.exp(np.float64(log_probs) / temperature)
    probabilities /= probabilities.sum()
    kept, mass = [], 0.0
    for word in np.argsort(-probabilities):
        if mass < top_p:
            kept.append(word)
            mass += probabilities[word]
    return np.where(np.isin(range(len(probabilities)), kept), probabilities, 0) / mass


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.8), (0.5, 0.9), (1.7, 0.6)])
def test_words_are_drawn_as_often_as_the_nucleus_has_them(captioner, features, temperature, top_p):
    """Chi-square of the first words of many samples, and of the second ones behind the most frequent of these."""
    encoder, decoder = captioner
    words, log_probs, _ = sample_decode(encoder, decoder, features[:1], chances(1, DRAWS, 2), temperature, top_p)
    words, log_probs = words[0].numpy(), log_probs[0].numpy()
    first = np.bincount(words[words[:, 0] != END, 0]).argmax()
    for before, rows in (([START], words[:, 0]), ([START, first], words[words[:, 0] == first, 1])):
        target = tf.constant([[*before, END]])  # whose last logits are of the word behind `before`
        logits = decoder.teacher_forcing(target, encoder(features[:1]))[0][-1:]
        model = tf.nn.log_softmax(ban_words(logits))[0].numpy()
        expected = nucleus_by_hand(model, temperature, top_p)
        counts = np.bincount(rows, minlength=len(VOCABULARY))
        inside = expected > 0
        assert not counts[~inside].any() and inside.sum() > 1 and len(rows) > 300
        wanted = expected[inside] * len(rows)
        chi_square, freedom = ((counts[inside] - wanted) ** 2 / wanted).sum(), inside.sum() - 1
        assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # as good as always, if the frequencies are right
        said = log_probs[:, len(before) - 1] if before == [START] else log_probs[words[:, 0] == first, 1]
        np.testing.assert_allclose(said, model[rows], atol=1e-4)  # of all words, at temperature 1


def test_samples_are_captions_and_say_what_they_looked_at(captioner, features):
    encoder, decoder = captioner
    words, log_probs, attention_weights = (x.numpy() for x in sample(encoder, decoder, features, chances(3, 50, 9)))
    assert words.shape == log_probs.shape == attention_weights.shape[:3]
    assert (log_probs[words == PAD] == 0).all() and (log_probs[words != PAD] < 0).all()
    lengths = set()
    for image, draw in itertools.product(range(3), range(50)):
        said = words[image, draw][words[image, draw] != PAD]
        lengths.add(len(said))
        assert not np.isin(said, _BANNED_WORDS).any() and END not in said[:-1]
        assert said[-1] == END or len(said) == 9
    assert len(lengths) > 3
    said = words[2, 7][words[2, 7] != PAD]
    _, along = decoder.teacher_forcing(tf.constant([[START, *said]]), encoder(features[2:]))
    np.testing.assert_allclose(attention_weights[2, 7, : len(said)], along[0], atol=1e-5)


def test_a_draw_depends_on_its_own_chances_alone(captioner, features):
    drawn = chances(3, 6, 9)
    together = sample(*captioner, features, drawn).words.numpy()
    alone = sample(*captioner, features[1:2], drawn[1:2, 3:4]).words.numpy()[0, 0]
    np.testing.assert_array_equal(together[1, 3, : len(alone)], alone)
    assert not together[1, 3, len(alone) :].any()


def test_no_banned_word_is_drawn_and_no_sequence_twice(captioner, features):
    encoder, decoder = captioner
    bias = decoder.output_layer.bias
    before = bias.numpy()
    try:
        bias.assign(50 * np.isin(range(len(VOCABULARY)), (*_BANNED_WORDS, 7, 8)) + before)
        freely, blocked = (sample_decode(encoder, decoder, features, chances(3, 9, 9), 1.0, 1.0, n) for n in (0, 2))
    finally:
        bias.assign(before)
    assert not np.isin(freely.words, (*_BANNED_WORDS, END)).any()  # what is as likely as 7 and 8 would be drawn
    pairs = lambda row: [pair for pair in itertools.pairwise(row) if PAD not in pair]  # noqa: E731
    said = lambda found: [pairs(row) for row in found.words.numpy().reshape(27, -1).tolist()]  # noqa: E731
    assert any(len(set(row)) < len(row) for row in said(freely))
    assert all(len(set(row)) == len(row) for row in said(blocked))
