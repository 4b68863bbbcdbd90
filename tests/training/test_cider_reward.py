import math

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from captioning.evaluation.metrics import cider_by_image
from captioning.training.cider_reward import CiderReward
from captioning.vocabulary import END, PAD, SPECIAL_WORDS

WORDS = "a dog cat boat red blue runs sits on the grass water".split()
VOCABULARY = [*SPECIAL_WORDS, *WORDS]


def draw_texts(rng, count, longest):
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest + 1))) for _ in range(count)]


def encode(text, padding=0):
    return [*(VOCABULARY.index(word) for word in text.split()), END, *[PAD] * padding]


@pytest.fixture(scope="module")
def drawn():
    """References of 40 images, 1 to 5 of each, and 3 captions of each image."""
    rng = np.random.default_rng(0)
    references = [draw_texts(rng, rng.integers(1, 6), 12) for _ in range(40)]
    captions = [draw_texts(rng, 3, 14) for _ in references]
    captions[3][0], captions[4][0] = references[3][0], "a a a a a"
    return references, captions


def test_it_is_pycocoevalcaps_cider_with_end_as_a_word(drawn):
    references, captions = drawn
    reward = CiderReward(references, VOCABULARY)
    scores = np.array(reward.score(range(40), [[encode(text, 2) for text in group] for group in captions]))
    ended = {number: [f"{text} <end>" for text in group] for number, group in enumerate(references)}
    for sample in range(3):
        said = {number: [f"{group[sample]} <end>"] for number, group in enumerate(captions)}
        _, expected = Cider().compute_score(ended, said)
        np.testing.assert_allclose(scores[:, sample], expected, rtol=1e-9)
    assert scores.max() > 1 and len(np.unique(scores)) > 60


def test_without_end_it_is_the_cider_of_validation(drawn):
    references, captions = drawn
    encoded = [[encode(text, 2) for text in group] for group in captions]
    scores = np.array(CiderReward(references, VOCABULARY).score(range(40), encoded, with_end=False))
    for sample in range(3):
        said = {number: group[sample] for number, group in enumerate(captions)}
        expected = np.mean(list(cider_by_image(said, dict(enumerate(references))).values()))
        assert scores[:, sample].mean() == pytest.approx(expected, rel=1e-9)


def test_a_image_is_scored_by_its_position_whatever_else_is_scored(drawn):
    references, captions = drawn
    reward = CiderReward(references, VOCABULARY)
    encoded = [[encode(text) for text in group] for group in captions]
    whole = reward.score(range(40), encoded)
    assert reward.score([7, 3], [encoded[7], encoded[3]]) == [whole[7], whole[3]]
    assert reward.score([], []) == []


def test_references_are_read_as_the_vocabulary_writes_words():
    tidy = CiderReward([["a red dog"], ["the cat sits"]], VOCABULARY)
    untidy = CiderReward([["A Red  dog."], ["The cat, sits!"]], VOCABULARY)
    captions = [[encode("a red dog")], [encode("the cat")]]
    assert tidy.score([0, 1], captions) == untidy.score([0, 1], captions)
    assert tidy.score([0], captions[:1])[0][0] == pytest.approx(10)


def test_a_caption_that_does_not_end_is_worth_less():
    reward = CiderReward([["a red dog"], ["the cat sits"]], VOCABULARY)
    ended = encode("a red dog")
    ((whole, broken),) = reward.score([0], [[ended, ended[:-1]]])
    assert whole == pytest.approx(10) and broken < whole
    assert reward.score([0], [[[END]]])[0][0] < broken
    assert reward.score([0], [[[PAD]]]) == [[0]]


def test_words_that_all_images_share_are_worth_nothing():
    reward = CiderReward([["a dog"], ["a cat"]], VOCABULARY)
    ((score,),) = reward.score([0], [[encode("a")]])
    # Only "<end>" and "a" are shared, and both are in all references; so are neither of the longer n-grams.
    assert score == 0


def test_a_word_outside_the_vocabulary_cannot_be_matched():
    reward = CiderReward([["a zebra"], ["a cat"], ["the boat"]], VOCABULARY)
    ((score,),) = reward.score([0], [[encode("a <unk>")]])
    assert 0 <= score < 10 / math.e
