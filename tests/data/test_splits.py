import copy

import pytest

from captioning.data.captioned_images import CaptionedImage
from captioning.data.splits import _draw_examples, _split_by_image
from support.errors import UserError


def image_ids(images):
    return [image.image_id for image in images]


@pytest.fixture
def images():
    captions = [[f"caption {n} {i}" for i in range(5)] for n in range(24)]
    return [CaptionedImage(n, f"{n}.jpg", captions=captions[n], references=captions[n]) for n in range(24)]


def test_the_draw_is_of_captions_and_fixed_by_the_seed(images):
    before = copy.deepcopy(images)
    drawn = _draw_examples(images, 30, seed=42)
    assert sum(len(image.captions) for image in drawn) == 30
    assert any(len(image.captions) < 5 for image in drawn)
    assert all(image.captions and image.references == before[image.image_id].references for image in drawn)
    assert all(set(image.captions) <= set(image.references) for image in drawn)
    assert image_ids(drawn) == sorted(image_ids(drawn))
    assert _draw_examples(images, 30, seed=42) == drawn
    assert _draw_examples(images, 30, seed=1) != drawn
    assert images == before


@pytest.mark.parametrize("num_examples", [None, 120, 500])
def test_a_draw_of_all_captions_changes_nothing(images, num_examples):
    assert _draw_examples(images, num_examples, seed=42) == images


def test_the_draw_is_the_same_in_every_version():
    """Runs made with an earlier version go on with the same images."""
    images = [CaptionedImage(n, f"{n}.jpg", captions=["a", "b"]) for n in range(10)]
    drawn = _draw_examples(images, 5, seed=42)
    kept = [(image.image_id, image.captions) for image in drawn]
    assert kept == [(0, ["b"]), (4, ["a"]), (5, ["b"]), (6, ["b"]), (9, ["b"])]
    train, validation = _split_by_image(images, 0.2, seed=42)
    assert (image_ids(train), image_ids(validation)) == ([5, 0, 7, 2, 9, 4, 3, 6], [8, 1])


def test_the_split_is_by_image_and_fixed_by_the_seed(images):
    train, validation = _split_by_image(images, 0.2, seed=42)
    assert sorted(image_ids(train) + image_ids(validation)) == list(range(24))
    assert len(validation) == 5  # 20 % of 24, rounded up
    assert list(_split_by_image(images, 0.2, seed=42)) == [train, validation]
    assert image_ids(_split_by_image(images, 0.2, seed=1)[1]) != image_ids(validation)


@pytest.mark.parametrize(("count", "val_fraction"), [(2, 0.9), (9, 0.9)])
def test_a_split_that_leaves_nothing_to_train_on_is_one_line(images, count, val_fraction):
    with pytest.raises(UserError, match=f"{count} images cannot be split .*: raise --num_examples or lower --val"):
        _split_by_image(images[:count], val_fraction, seed=42)


def test_one_image_cannot_be_split_whatever_the_share(images):
    with pytest.raises(UserError, match="1 images cannot be split .*: give captions of more images, or, if only a few"):
        _split_by_image(images[:1], 0.2, seed=42)


def test_the_smallest_splits(images):
    for count, val_fraction in ((2, 0.2), (2, 0.01), (10, 0.9)):
        train, validation = _split_by_image(images[:count], val_fraction, seed=42)
        assert train and validation and len(train + validation) == count
