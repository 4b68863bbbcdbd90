import pytest

from captioning.evaluation.metrics import CaptionForm, describe_form


def test_captions_are_counted_by_their_form():
    captions = ["a man on a", "a man on a horse", "a man on a horse", "two dogs run through", ""]
    assert describe_form(captions) == CaptionForm(captions=5, distinct=4, mean_length=18 / 5, broken_endings=3)
    assert str(describe_form(captions)) == "4 of 5 captions differ; 3.6 words each; 3 break off"


@pytest.mark.parametrize("caption", ["a dog", "the boat is red", "a cat sits", "a band"])
def test_a_caption_that_ends_in_another_word_is_whole(caption):
    assert describe_form([caption]).broken_endings == 0


@pytest.mark.parametrize("word", ["a", "the", "of", "with", "and", "while"])
def test_a_caption_that_ends_in_an_open_word_is_broken(word):
    assert describe_form([f"a dog {word}"]).broken_endings == 1


def test_no_captions_have_a_form_too():
    assert describe_form([]) == CaptionForm(0, 0, 0.0, 0)
