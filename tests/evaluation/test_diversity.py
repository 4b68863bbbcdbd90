import pytest

from captioning.evaluation.diversity import describe_diversity


def test_div_counts_different_words_and_pairs_for_each_word():
    """6 words of which 4 differ, and 3 different pairs among 4; then 2 words of which 1 differs."""
    found = describe_diversity([["a dog runs", "a dog sleeps"], ["cat", "cat"]])
    assert found.div_1 == pytest.approx((4 / 6 + 1 / 2) / 2)
    assert found.div_2 == pytest.approx((3 / 6 + 0 / 2) / 2)
    assert (found.captions, found.distinct) == (4, 0.75)


def test_mbleu_is_100_for_the_same_captions_and_near_0_for_others():
    same, other = "a dog runs on the beach", "two cats sleep under my table"
    assert describe_diversity([[same] * 3, [other] * 3]).mbleu_4 == pytest.approx(100, abs=1e-3)
    assert describe_diversity([[same, other]]).mbleu_4 < 0.1
    half = describe_diversity([[same, "a dog runs on the sofa"]]).mbleu_4
    assert half == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25, rel=1e-3)  # precisions of n-grams


def test_an_image_with_one_caption_has_no_mbleu_and_spoils_none():
    assert describe_diversity([["a dog"], ["a cat"]]).mbleu_4 is None
    same = "a dog runs on the beach"
    found = describe_diversity([[same, same, same], [same, same], ["a cat"], [""]])
    assert found.mbleu_4 == pytest.approx(100, abs=1e-3)
    assert str(found).startswith("Div-1 0.") and str(found).endswith("mBLEU-4 100.0; 42.9 % of 7 captions differ")
    assert "mBLEU-4 -" in str(describe_diversity([["a dog"]]))
