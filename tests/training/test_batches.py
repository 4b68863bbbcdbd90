import math
import time

import numpy as np
import pytest
import tensorflow as tf

from captioning.data.captioned_images import CaptionedImage
from captioning.features.cache import feature_path, features_folder
from captioning.settings import make_config
from captioning.training import batches
from captioning.training.batches import (
    _count_tokens,
    _parallel_batches,
    bucket_by_length,
    caption_batches,
    collect_captions,
)
from captioning.vocabulary import END, START

IMAGES = 19


def make_images(count=IMAGES, captions_each=5, seed=0):
    """Images whose captions have 3 to 8 token ids."""
    rng = np.random.default_rng(seed)
    encoded = lambda: [START, *rng.integers(4, 20, rng.integers(1, 7)).tolist(), END]  # noqa: E731
    return [
        CaptionedImage(number, f"{number}.jpg", encoded_captions=[encoded() for _ in range(captions_each)])
        for number in range(count)
    ]


@pytest.fixture(scope="module", params=["float16", "float32"])
def config(request, tmp_path_factory):
    """Settings with a feature cache, in each of which every number is the image's."""
    folder = tmp_path_factory.mktemp("features")
    config = make_config({"features_dir": str(folder), "feature_dtype": request.param, "batch_size": 16})
    for image in make_images():
        np.save(feature_path(image, features_folder(config)), np.full((64, 2048), image.image_id, request.param))
    return config


@pytest.mark.parametrize("batch_size", [64, 7, 1])
def test_every_caption_once_an_epoch_in_batches_of_two_lengths(batch_size):
    lengths = np.random.default_rng(0).integers(3, 40, 1000)
    order = bucket_by_length(lengths, batch_size, np.random.default_rng((42, 0)))
    assert sorted(order) == list(range(1000))
    by_batch = lengths[order[: 1000 // batch_size * batch_size]].reshape(-1, batch_size)
    longer, shorter = np.split(by_batch, [(batch_size + 1) // 2], axis=1)
    for rows in (longer, shorter)[:batch_size]:
        assert np.mean(np.ptp(rows, axis=1)) < 3 < np.ptp(lengths) / 8
        assert rows[:, 0].tolist() != sorted(rows[:, 0])  # in random order
    if batch_size > 1:
        assert longer.min() >= shorter.max()
        assert abs(np.corrcoef(longer[:, 0], shorter[:, 0])[0, 1]) < 0.5  # any with any
    assert (order == bucket_by_length(lengths, batch_size, np.random.default_rng((42, 0)))).all()
    assert (order != bucket_by_length(lengths, batch_size, np.random.default_rng((42, 1)))).any()


def test_fewer_captions_than_a_batch_are_one():
    assert sorted(bucket_by_length(np.array([5, 4, 6]), 64, np.random.default_rng(0))) == [0, 1, 2]


def test_batches_hold_each_captions_own_features_and_words(config):
    images = make_images()
    captions = collect_captions(images, features_folder(config))
    order = bucket_by_length(captions.lengths, 16, np.random.default_rng(0))
    expected = [(image.image_id, caption) for image in images for caption in image.encoded_captions]
    pipeline = caption_batches(captions, order, config)
    assert pipeline.options().autotune.enabled is False
    seen = 0
    for features, words in pipeline:
        assert features.dtype == config.feature_dtype and words.dtype == tf.int32
        assert features.shape == (16, 64, 2048)
        assert words.shape == (16, max(np.count_nonzero(words, axis=1)))
        for row in range(min(16, len(expected) - seen)):
            number, caption = expected[order[seen]]
            assert (features[row].numpy() == number).all()
            assert [i for i in words[row].numpy() if i] == caption
            seen += 1
        assert not np.any(words[row + 1 :])
    assert row < 15  # the last batch was filled up
    assert seen == len(expected) == IMAGES * 5


def test_words_to_be_said_are_counted_by_batch(config):
    captions = collect_captions(make_images(), features_folder(config))
    order = bucket_by_length(captions.lengths, 16, np.random.default_rng(0))
    counts = [np.count_nonzero(words[:, 1:]) for _, words in caption_batches(captions, order, config)]
    assert _count_tokens(captions, order, config.batch_size).tolist() == counts
    assert len(counts) == math.ceil(IMAGES * 5 / 16)


def test_what_is_left_of_an_epoch_has_the_batches_it_would_have_had(config):
    captions = collect_captions(make_images(), features_folder(config))
    order = bucket_by_length(captions.lengths, 16, np.random.default_rng(0))
    whole = [words.numpy().tolist() for _, words in caption_batches(captions, order, config)]
    rest = [words.numpy().tolist() for _, words in caption_batches(captions, order[48:], config)]
    assert rest == whole[3:]


# --- Reading ahead ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "batch_size", "dtype", "parallel"),
    [
        (2, 64, "float16", 2),
        (2, 8192, "float32", 1),  # one batch may well be larger
        (224, 256, "float16", 14),  # were 15 GB
        (224, 256, "float32", 7),
        (1, 1, "float16", 1),
    ],
)
def test_batches_read_ahead_are_bounded_by_cores_and_by_memory(monkeypatch, cores, batch_size, dtype, parallel):
    monkeypatch.setattr(batches, "usable_cores", lambda: cores)
    config = make_config({"batch_size": batch_size, "feature_dtype": dtype})
    assert _parallel_batches(config.batch_size, config) == parallel
    assert parallel == 1 or parallel * batch_size * 64 * 2048 * np.dtype(dtype).itemsize <= batches._READ_AHEAD


def test_no_more_than_that_is_read_before_it_is_needed(config, monkeypatch):
    """A machine of 224 cores reads no further ahead than the memory allows: here 4 batches, and 2 that wait."""
    read = []
    real = batches.read_feature

    def counted(path, shape, dtype):
        with tf.control_dependencies([tf.py_function(lambda: read.append(1), [], [])]):
            return real(path, shape, dtype)

    monkeypatch.setattr(batches, "usable_cores", lambda: 224)
    monkeypatch.setattr(batches, "_READ_AHEAD", 4 * 2 * 64 * 2048 * np.dtype(config.feature_dtype).itemsize)
    monkeypatch.setattr(batches, "read_feature", counted)
    small = make_config({"features_dir": config.features_dir, "feature_dtype": config.feature_dtype, "batch_size": 2})
    captions = collect_captions(make_images(), features_folder(small))
    pipeline = iter(caption_batches(captions, np.arange(IMAGES * 5), small))
    next(pipeline)
    limit, before = time.monotonic() + 30, 0
    while time.monotonic() < limit and not 2 * 2 <= before == len(read):  # until nothing more is read
        before = len(read)
        time.sleep(0.05)
    assert 2 * 2 <= len(read) <= 2 * (1 + 4 + 2 + 1)  # the one taken, in work, waiting, and one handed over
