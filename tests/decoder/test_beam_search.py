import itertools

import numpy as np
import pytest
import tensorflow as tf

import model
from captioning.decoder.beam_search import _best_continuations, _rank_beams, beam_search
from captioning.decoder.rules import _BANNED_WORDS, DecodedCaptions, ban_words
from captioning.features.cnn import CNNS
from captioning.settings import make_config
from captioning.vocabulary import END, PAD, START, UNK
from tiny_captioner import SIZES, tiny_captioner

SMALL = make_config({"encoder_dim": 8, "embedding_dim": 12, "units": 16})
VOCABULARY = 30
LOCATIONS, CHANNELS = CNNS["InceptionV3"].feature_shape
NO_MEAN = np.zeros(CHANNELS, np.float32)


def likeliest(*args, **options):
    """The best beam of each image."""
    return DecodedCaptions(*(x[:, 0] for x in beam_search(*args, **options)))


decode = tf.function(likeliest)


@pytest.fixture(scope="module")
def captioner():
    return model.build_captioner(SMALL, VOCABULARY, NO_MEAN, feature_std=0.5)


@pytest.fixture
def biased(captioner):
    """A function that makes words of the captioner likelier until the test ends."""
    bias = captioner[1].output_layer.bias
    before = bias.numpy()
    yield lambda words, by: bias.assign(tf.reduce_sum(tf.one_hot(words, VOCABULARY, on_value=by), 0))
    bias.assign(before)


@pytest.fixture(scope="module")
def features():
    return tf.constant(np.random.default_rng(1).standard_normal((3, LOCATIONS, CHANNELS), np.float32))


def said_by(words):
    """A row of decoded words without the padding."""
    return [i for i in np.array(words).tolist() if i != PAD]


@pytest.mark.parametrize("repeat_block", [0, 2])
@pytest.mark.parametrize("seed", range(4))
def test_one_beam_is_greedy_decoding(features, seed, repeat_block):
    encoder, decoder = model.build_captioner(make_config({"units": 16, "seed": seed}), VOCABULARY, NO_MEAN)
    decoder.output_layer.kernel.assign(decoder.output_layer.kernel * 5)
    greedy = model.greedy_decode(encoder, decoder, features, 7, repeat_block)
    beams = likeliest(encoder, decoder, features, 7, 1, repeat_block=repeat_block)
    np.testing.assert_array_equal(greedy.words, beams.words)
    np.testing.assert_allclose(greedy.log_probs, beams.log_probs, rtol=1e-4, atol=1e-5)
    real = greedy.words.numpy() != PAD
    np.testing.assert_allclose(greedy.attention_weights[real], beams.attention_weights[real], atol=1e-5)


def test_one_beam_ends_where_greedy_decoding_does(captioner, features, biased):
    """Captions of the batch end at different words."""
    encoder, decoder = captioner
    for by in (0.5, 1.0, 2.0, 50.0):
        biased([END], by)
        greedy = model.greedy_decode(encoder, decoder, features, 7)
        beams = likeliest(encoder, decoder, features, 7, 1)
        np.testing.assert_array_equal(greedy.words, beams.words)
    assert greedy.words.numpy().tolist() == [[END]] * 3


def beams_by_hand(encoder, decoder, features, max_words, width, length_penalty):
    """Beam search over one image in plain Python, one prefix at a time."""
    encoded_features = encoder(features)
    beams = [(0.0, [START], decoder.initial_hidden(encoded_features))]
    for _ in range(max_words):
        candidates = [beam for beam in beams if beam[1][-1] == END]
        places = width - len(candidates)
        running = []
        for score, words, hidden in beams:
            if words[-1] == END:
                continue
            logits, hidden, _ = decoder(tf.constant([[words[-1]]]), encoded_features, hidden)
            logs = tf.nn.log_softmax(ban_words(logits))[0].numpy()
            sayable = (i for i in range(len(logs)) if i not in _BANNED_WORDS)
            running += [(score + logs[i], [*words, i], hidden) for i in sayable]
        beams = candidates + sorted(running, key=lambda beam: -beam[0])[:places]
    ended = [beam for beam in beams if beam[1][-1] == END] or beams
    score, words, _ = max(ended, key=lambda beam: beam[0] / (len(beam[1]) - 1) ** length_penalty)
    return words[1:], score


@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_beam_search_finds_what_it_finds_by_hand(captioner, features, width, length_penalty):
    encoder, decoder = captioner
    words, log_probs, attention_weights = decode(encoder, decoder, features, 7, width, length_penalty)
    assert log_probs.shape == words.shape
    for b in range(3):
        expected, score = beams_by_hand(encoder, decoder, features[b : b + 1], 7, width, length_penalty)
        said = said_by(words[b])
        assert said == expected
        np.testing.assert_allclose(np.sum(log_probs[b]), score, rtol=1e-4)
        logits, along = decoder.teacher_forcing(tf.constant([[START, *said]]), encoder(features[b : b + 1]))
        logs = tf.nn.log_softmax(ban_words(logits)).numpy()
        np.testing.assert_allclose(log_probs[b, : len(said)], logs[range(len(said)), said], rtol=1e-4)
        assert not np.any(log_probs[b, len(said) :])
        np.testing.assert_allclose(attention_weights[b, : len(said)], along[0], atol=1e-5)


@pytest.mark.parametrize(("width", "seeds"), [(7, range(5)), (3, (0, 1, 3, 4))])
def test_beam_search_finds_the_likeliest_of_all_captions_of_a_tiny_vocabulary(features, width, seeds):
    """Two words and <end>, at most 2 in a caption: 7 beams hold them all. 3 may lose the best, but not for these."""
    better_than_greedy = 0
    for seed in seeds:
        encoder, decoder = model.build_captioner(make_config({"units": 16, "seed": seed}), 6, NO_MEAN)
        decoder.output_layer.kernel.assign(decoder.output_layer.kernel * 5)
        words, log_probs, _ = likeliest(encoder, decoder, features, 2, width)
        greedy = model.greedy_decode(encoder, decoder, features, 2).words
        for b in range(3):
            scores = {}
            for caption in ((END,), (4, END), (5, END)):
                logits, _ = decoder.teacher_forcing(tf.constant([[START, *caption]]), encoder(features[b : b + 1]))
                logs = tf.nn.log_softmax(ban_words(logits)).numpy()
                scores[caption] = sum(logs[t, word] for t, word in enumerate(caption))
            best = max(scores, key=scores.get)
            assert tuple(said_by(words[b])) == best
            np.testing.assert_allclose(np.sum(log_probs[b]), scores[best], rtol=1e-4)
            better_than_greedy += best != tuple(said_by(greedy[b]))
    assert better_than_greedy


def test_special_words_are_never_said(captioner, features, biased):
    before = likeliest(*captioner, features, 6, 3)
    biased([PAD, UNK, START], 50.0)
    words, log_probs, _ = likeliest(*captioner, features, 6, 3)
    assert not np.isin(words, (UNK, START)).any()
    assert (words[:, 0].numpy() != PAD).all()
    np.testing.assert_array_equal(words, before.words)
    np.testing.assert_allclose(log_probs, before.log_probs, rtol=1e-4)  # probabilities are of what can be said


def test_captions_repeat_no_sequence(captioner, features, biased):
    """One word is made likelier than all others: it would be said over and over."""
    biased([7], 30.0)
    freely = likeliest(*captioner, features, 8, 3).words
    words = likeliest(*captioner, features, 8, 3, 0.0, 2).words
    assert (freely[:, :7] == 7).numpy().all()
    for said in words.numpy().tolist():
        pairs = [pair for pair in zip(said, said[1:], strict=False) if PAD not in pair]
        assert len(pairs) == len(set(pairs)) > 3


def test_an_ended_beam_goes_on_with_pad_alone_and_keeps_its_place():
    """Even where the running beam can say likelier words than the ended one's whole caption."""
    word_log_probs = tf.math.log([[[0.1, 0.1, 0.1, 0.1, 0.3, 0.3], [0.1, 0.1, 0.1, 0.1, 0.2, 0.4]]])  # (1, 2, V)
    scores, beam, word, gained = _best_continuations(
        tf.constant([[-9.0, -1.0]]), word_log_probs, tf.constant([[True, False]])
    )
    assert beam.numpy().tolist() == [[0, 1]]
    assert word.numpy().tolist() == [[PAD, 5]]
    np.testing.assert_allclose(scores, [[-9.0, -1.0 + np.log(0.4)]], rtol=1e-6)
    np.testing.assert_allclose(gained, [[0.0, np.log(0.4)]], rtol=1e-6)


@pytest.mark.parametrize(("length_penalty", "taken"), [(0.0, [0, 1]), (1.0, [1, 0])])
def test_the_ended_beams_are_taken_the_best_by_its_length_first(length_penalty, taken):
    words = tf.constant([[[START, 5, END, PAD], [START, 5, 6, END], [START, 5, 6, 7]]])
    scores = tf.constant([[-3.0, -4.0, -0.1]])  # the third has not ended
    best, is_caption = _rank_beams(scores, words, length_penalty, 3)
    assert best.numpy().tolist() == [[*taken, 2]] and is_caption.numpy().tolist() == [[True, True, False]]
    best, is_caption = _rank_beams(scores, words[:, :, :3], length_penalty, 2)
    assert best.numpy()[0, 0] == 0 and is_caption.numpy().tolist() == [[True, False]]
    best, is_caption = _rank_beams(scores, words[:, :, :2], 0.0, 3)  # none has ended
    assert (best.numpy().tolist(), is_caption.numpy().tolist()) == ([[2, 0, 1]], [[True, True, True]])


def every_caption(encoder, decoder, features, most):
    """All captions of one image with `most` words at most, <end> among them: list of (log-probability, words)."""
    sayable = [i for i in range(decoder.output_layer.bias.shape[0]) if i not in (*_BANNED_WORDS, END)]
    bodies = itertools.chain(*(itertools.product(sayable, repeat=count) for count in range(most)))
    captions = [(*body, END) for body in bodies]
    rows = np.array([np.pad((START, *words), (0, most - len(words))) for words in captions])
    same = tf.repeat(encoder(features), len(captions), 0)
    logits, _ = decoder.teacher_forcing(tf.constant(rows, tf.int32), same)
    logs = tf.nn.log_softmax(ban_words(logits)).numpy()
    targets = rows[:, 1:].T
    scores = np.zeros(targets.shape)
    scores[targets != PAD] = logs[range(len(logs)), targets[targets != PAD]]
    return [(score, words) for score, words in zip(scores.sum(0), captions, strict=True)]


@pytest.mark.parametrize("length_penalty", [0.0, 0.8, 1.5])
def test_the_best_beams_are_the_best_of_all_captions_of_a_tiny_vocabulary(features, length_penalty):
    """Two words and <end>, at most 3 in a caption: 15 beams hold them all, so nothing can be lost."""
    encoder, decoder = model.build_captioner(make_config({"units": 16, "seed": 2}), 6, NO_MEAN)
    decoder.output_layer.kernel.assign(decoder.output_layer.kernel * 5)
    found = beam_search(encoder, decoder, features, 3, 15, length_penalty, count=5)
    best = likeliest(encoder, decoder, features, 3, 15, length_penalty)
    for b in range(3):
        ranked = every_caption(encoder, decoder, features[b : b + 1], 3)
        assert len(ranked) == 7
        ranked.sort(key=lambda pair: -pair[0] / len(pair[1]) ** length_penalty)
        assert [tuple(said_by(row)) for row in found.words[b]] == [words for _, words in ranked[:5]]
        np.testing.assert_allclose(np.sum(found.log_probs[b], 1), [score for score, _ in ranked[:5]], rtol=1e-4)
        assert said_by(best.words[b]) == said_by(found.words[b, 0])
        for row, weights in zip(found.words[b], found.attention_weights[b], strict=True):
            said = said_by(row)
            _, along = decoder.teacher_forcing(tf.constant([[START, *said]]), encoder(features[b : b + 1]))
            np.testing.assert_allclose(weights[: len(said)], along[0], atol=1e-5)


@pytest.mark.parametrize("width", [7, 20])
def test_where_there_are_fewer_captions_the_rest_is_pad_alone(features, width):
    """Two words and <end>, at most 2 in a caption: 3 captions end. Beams that never ran are none."""
    encoder, decoder = model.build_captioner(make_config({"units": 16}), 6, NO_MEAN)
    words = beam_search(encoder, decoder, features, 2, width, count=7).words.numpy()
    for rows in words.tolist():
        assert sorted(map(said_by, rows[:3])) == [[END], [4, END], [5, END]]
        assert not np.any(rows[3:])


def test_each_beam_goes_on_with_the_hidden_state_of_the_beam_that_it_continues(features):
    """Weights so large that hidden states decide what is said, and beams that change places."""
    captioner = tiny_captioner(make_config(SIZES), features.numpy(), seed=3)
    encoder, decoder = captioner.encoder, captioner.decoder
    decoder.output_layer.kernel.assign(decoder.output_layer.kernel / 3)
    words, log_probs, _ = likeliest(encoder, decoder, features, 7, 4, 0.7)
    for b in range(3):
        expected, score = beams_by_hand(encoder, decoder, features[b : b + 1], 7, 4, 0.7)
        assert said_by(words[b]) == expected
        assert np.sum(log_probs[b]) == pytest.approx(score, rel=1e-3)
