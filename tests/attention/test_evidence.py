import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from captioning.attention.evidence import explain_captions
from captioning.captioner import caption_batch, explain_references
from captioning.decoder.rules import ban_words
from captioning.export.bundle import _word_evidence
from captioning.features.cache import ImageToCaption
from captioning.settings import make_config
from captioning.vocabulary import END, PAD, START, UNK
from tiny_captioner import VOCABULARY, tiny_captioner

CONFIG = make_config({"encoder_dim": 16, "embedding_dim": 12, "units": 32, "max_words": 6})
WORDS = np.array([[5, 9, 6, END], [7, END, PAD, PAD], [10, 11, END, PAD]], np.int32)


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(1).standard_normal((3, 64, 2048)).astype(np.float32)


@pytest.fixture(scope="module")
def captioner(features):
    return tiny_captioner(CONFIG, features)


def test_the_weights_are_those_of_teacher_forcing(captioner, features):
    weights, evidence, norms = explain_captions(captioner.encoder, captioner.decoder, features, WORDS)
    assert weights.shape == evidence.shape == (3, 4, 64)
    assert norms.shape == (3, 64)
    captions = tf.concat((tf.fill((3, 1), START), WORDS), 1)  # (B, L + 1)
    _, expected = captioner.decoder.teacher_forcing(captions, captioner.encoder(features))
    for row, length in enumerate((4, 2, 3)):
        np.testing.assert_allclose(weights[row, :length], expected[row, :length], atol=1e-5)
    np.testing.assert_allclose(tf.reduce_sum(evidence, 2), 1, atol=1e-4)
    np.testing.assert_allclose(norms, np.linalg.norm(features, axis=2), rtol=1e-5)


def test_evidence_is_weights_times_what_each_location_says_and_shows_of_the_word(captioner, features):
    """The first word's, with the gradient taken by small steps of the context vector."""
    decoder = captioner.decoder
    weights, evidence, norms = explain_captions(captioner.encoder, decoder, features, WORDS)
    encoded = captioner.encoder(features)
    keys, hidden = decoder.attention.key_layer(encoded), decoder.initial_hidden(encoded)
    gates = decoder.word_gates(decoder.embedding(tf.fill((3,), START)))
    context, _ = decoder.attention(encoded, keys, hidden)

    def log_prob(context):
        logits = decoder.output_layer(decoder.gru(gates, context, hidden))
        return tf.gather(tf.nn.log_softmax(ban_words(logits)), WORDS[:, 0], batch_dims=1).numpy()

    step = 1e-2 * np.eye(16, dtype=np.float32)
    gradient = np.stack([(log_prob(context + d) - log_prob(context - d)) / 2e-2 for d in step], axis=1)  # (B, D)
    sightings = np.stack([decoder.detector(encoded, WORDS[row : row + 1, 0])[row, :, 0] for row in range(3)])  # (B, P)
    expected = weights[:, 0] * np.exp(np.einsum("bpd,bd->bp", encoded, gradient)) * norms * sightings
    expected /= expected.numpy().sum(1, keepdims=True)
    np.testing.assert_allclose(evidence[:, 0], expected, atol=0.02)
    assert np.abs(evidence[:, 0] - weights[:, 0]).max() > 0.05


@pytest.mark.parametrize("bundled", [False, True])
def test_words_that_do_not_depend_on_the_image_have_evidence_of_weights_and_detector(features, bundled):
    """As where a student hard-codes the context vector."""
    captioner = tiny_captioner(CONFIG, features)
    encoder, decoder = captioner.encoder, captioner.decoder
    gru = decoder.gru
    decoder.gru = lambda words, context_vector, hidden: gru(words, tf.zeros_like(context_vector), hidden)
    encoded = encoder(features[:1])
    keys, hidden = decoder.attention.key_layer(encoded), tf.zeros((1, 32))
    decoder.initial_hidden = lambda encoded_features: tf.zeros((len(encoded_features), 32))
    norms = np.linalg.norm(features[:1], axis=2)
    if bundled:
        state = tf.constant([[START]]), WORDS[:1, :1], hidden, encoded, keys, norms
        found = _word_evidence(decoder, *state)
        weights, evidence = found["attention_weights"][0], found["evidence"][0]
    else:
        explain = explain_captions.python_function
        weights, evidence = (each[0, 0] for each in explain(encoder, decoder, features[:1], WORDS[:1, :2])[:2])
    expected = weights * decoder.detector(encoded, WORDS[0, :1])[0, :, 0] * norms[0]
    np.testing.assert_allclose(evidence, expected / tf.reduce_sum(expected), rtol=0.02)


@pytest.mark.parametrize("bundled", [False, True])
def test_evidence_is_of_probabilities_of_what_can_be_said(captioner, features, bundled):
    """However likely <unk> is, which is never said."""
    encoder, decoder = captioner.encoder, captioner.decoder

    def evidence():
        if not bundled:
            return explain_captions(encoder, decoder, features, WORDS)[1][0, 0].numpy()
        encoded = encoder(features[:1])
        state = decoder.initial_hidden(encoded), encoded, decoder.attention.key_layer(encoded)
        norms = np.linalg.norm(features[:1], axis=2)
        return _word_evidence(decoder, tf.constant([[START]]), WORDS[:1, :1], *state, norms)["evidence"][0].numpy()

    bias = decoder.output_layer.bias
    before, expected = bias.numpy(), evidence()
    bias.assign_add(tf.one_hot(UNK, len(VOCABULARY), on_value=30.0))
    found = evidence()
    bias.assign(before)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_predictions_get_their_own_evidence(captioner, features, tmp_path):
    images = [ImageToCaption(tmp_path / f"{n}.jpg", f"{n}.jpg", n) for n in range(3)]
    plain = caption_batch(captioner, images, features, CONFIG)
    explained = caption_batch(captioner, images, features, CONFIG, with_evidence=True)
    for before, after in zip(plain, explained, strict=True):
        assert before.evidence is None
        assert after.words == before.words
        np.testing.assert_allclose(after.attention_weights, before.attention_weights, atol=1e-4)
        assert after.evidence.shape == (len(after.words), 64)


def test_references_are_said_word_by_word(captioner, features, tmp_path):
    images = []
    for number, references in enumerate((["Word3, word5!"], ["word1 nothing", "a word2"], ["word4"])):
        np.save(tmp_path / f"{number}.npy", features[number])
        path = tmp_path / f"{number}.npy"
        images.append(ImageToCaption(tmp_path / f"{number}.jpg", f"{number}.jpg", number, references, path))
    config = dataclasses.replace(CONFIG, decode_batch=2, feature_dtype="float32")  # exactly the features of below
    found = explain_references(captioner, images, config)
    said = sorted((caption.image_id, caption.words) for caption in found)
    assert said == [(0, ["word3", "word5"]), (1, ["a", "word2"]), (1, ["word1", "nothing"]), (2, ["word4"])]
    for caption in found:
        assert caption.attention_weights.shape == caption.evidence.shape == (len(caption.words), 64)
        np.testing.assert_allclose(caption.feature_norms, np.linalg.norm(features[caption.image_id], axis=1), rtol=1e-4)
    (first,) = (caption for caption in found if caption.image_id == 0)
    ids = np.array([[VOCABULARY.index("word3"), VOCABULARY.index("word5"), END]], np.int32)
    weights, _, _ = explain_captions(captioner.encoder, captioner.decoder, features[:1], ids)
    np.testing.assert_allclose(first.attention_weights, weights[0, :2], atol=1e-4)


def test_a_location_of_large_features_has_more_evidence_by_as_much_as_they_are_larger(captioner, features):
    """Half of the channels are made to say nothing to the encoder. There two locations get large numbers."""
    dense = captioner.encoder.dense.kernel
    before = dense.numpy()
    dense.assign(tf.concat((before[:1024], tf.zeros_like(before[1024:])), 0))
    large = features.copy()
    large[:, 7, 1024:] *= 3
    large[:, 20, 1024:] *= 10
    (weights, plain, norms), (same_weights, found, larger) = (
        explain_captions(captioner.encoder, captioner.decoder, each, WORDS) for each in (features, large)
    )
    dense.assign(before)
    np.testing.assert_allclose(same_weights, weights, atol=1e-6)
    expected = plain * (larger / norms)[:, tf.newaxis]  # (B, L, P)
    expected /= tf.reduce_sum(expected, axis=2, keepdims=True)
    for row, length in enumerate((4, 2, 3)):
        np.testing.assert_allclose(found[row, :length], expected[row, :length], atol=1e-5)
    assert np.max(np.abs(found - plain)[:, 0]) > 0.01
