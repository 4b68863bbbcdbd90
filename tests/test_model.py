import contextlib
import io

import model
from command_line import make_config
from config import Config
from data_utils import CHANNELS, END, LOCATIONS, PAD, START, UNK

import keras
import numpy as np
import pytest
import tensorflow as tf

SMALL = make_config({"encoder_dim": 8, "embedding_dim": 12, "units": 16, "dropout": 0.4})
VOCABULARY = 30
CAPTIONS = tf.constant([[START, 5, 6, 7, END], [START, 8, END, PAD, PAD], [START, 9, 10, END, PAD]])


@pytest.fixture(scope="module")
def captioner():
    return model.build_captioner(SMALL, VOCABULARY, feature_std=0.5)


@pytest.fixture(scope="module")
def features():
    return tf.constant(np.random.default_rng(1).standard_normal((3, LOCATIONS, CHANNELS), np.float32))


def test_shapes_at_the_defaults():
    config = Config()
    encoder, decoder = model.build_captioner(config, config.vocab_size)
    encoded_features = encoder(tf.zeros((16, 64, 2048)))
    assert encoded_features.shape == (16, 64, 256)
    logits, hidden, attention_weights = decoder(tf.ones((16, 1), tf.int32), encoded_features, tf.zeros((16, 512)))
    assert logits.shape == (16, config.vocab_size)
    assert hidden.shape == (16, 512)
    assert attention_weights.shape == (16, 64, 1)

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        model.print_shapes()
    for line in (
        "in   features (16, 64, 2048)",
        "out  encoded features (16, 64, 256)",
        "in   words (16, 1), encoded features (16, 64, 256), hidden (16, 512)",
        "out  logits (16, 5000), hidden (16, 512), attention_weights (16, 64, 1)",
    ):
        assert line in printed.getvalue()


def test_the_output_layer_is_as_large_as_the_vocabulary(captioner):
    assert captioner[1].make_logits.kernel.shape == (SMALL.units, VOCABULARY)


def test_teacher_forcing_and_single_steps_agree(captioner, features):
    encoder, decoder = captioner
    encoded_features = encoder(features)
    for captions in (CAPTIONS, CAPTIONS[::-1], CAPTIONS[1:], CAPTIONS[1:2]):
        compare_with_single_steps(decoder, captions, encoded_features[: len(captions)])


def compare_with_single_steps(decoder, captions, encoded_features):
    all_logits, all_weights = decoder.teach(captions, encoded_features)
    to_say = tf.transpose(captions[:, 1:]) != PAD
    assert all_logits.shape == (np.count_nonzero(to_say), VOCABULARY)
    assert all_weights.shape == (len(captions), 4, LOCATIONS)
    all_logits = tf.scatter_nd(tf.where(to_say), all_logits, (4, len(captions), VOCABULARY))
    hidden = decoder.initial_hidden(encoded_features)
    for t in range(4):
        logits, hidden, weights = decoder(captions[:, t : t + 1], encoded_features, hidden)
        real = to_say[t]
        np.testing.assert_allclose(logits[real], all_logits[t][real], atol=1e-5)
        np.testing.assert_allclose(weights[real][:, :, 0], all_weights[:, t][real], atol=1e-5)
        np.testing.assert_allclose(tf.reduce_sum(weights, axis=1), 1.0, atol=1e-5)


def test_teacher_forcing_and_single_steps_have_the_same_gradients(captioner, features):
    encoder, decoder = captioner
    weights = encoder.trainable_variables + decoder.trainable_variables

    def taught():
        return decoder.teach(CAPTIONS, encoder(features))

    def stepped():
        encoded_features = encoder(features)
        hidden, steps = decoder.initial_hidden(encoded_features), []
        for t in range(4):
            logits, hidden, looked = decoder(CAPTIONS[:, t : t + 1], encoded_features, hidden)
            steps.append((logits, looked[:, :, 0]))
        all_logits, all_weights = zip(*steps, strict=True)
        return tf.stack(all_logits)[tf.transpose(CAPTIONS[:, 1:]) != PAD], tf.stack(all_weights, 1)

    gradients = []
    for compute in (taught, stepped):
        with tf.GradientTape() as tape:
            logits, looked = compute()
            loss = model.caption_loss(CAPTIONS, logits) + model.attention_loss(CAPTIONS, looked)
        gradients.append([tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, weights)])
    for weight, ours, plain in zip(weights, *gradients, strict=True):
        assert np.abs(plain).max() > 0, weight.path
        np.testing.assert_allclose(ours, plain, atol=1e-5 * np.abs(plain).max(), err_msg=weight.path)


def test_the_recurrence_is_keras_own_gru(captioner, features):
    """Keras's cell, given the same weights and the [word, context] input, must step to the same state."""
    encoder, decoder = captioner
    encoded_features = encoder(features)
    hidden = tf.constant(np.random.default_rng(2).standard_normal((3, SMALL.units), np.float32))
    words = CAPTIONS[:, 1:2]
    cell = keras.layers.GRUCell(SMALL.units, reset_after=True)
    cell.build((3, SMALL.embedding_dim + SMALL.encoder_dim))
    kernel = tf.concat((decoder.word_gates.kernel, decoder.context_gates.kernel), 0)
    bias = tf.random.stateless_normal((2, 3 * SMALL.units), (1, 2))
    decoder.word_gates.bias.assign(bias[0])
    decoder.hidden_gates.bias.assign(bias[1])
    cell.set_weights([kernel, decoder.hidden_gates.kernel, bias])

    context_vector, _ = decoder.attention(encoded_features, decoder.attention.make_keys(encoded_features), hidden)
    expected, _ = cell(tf.concat((decoder.embedding(words[:, 0]), context_vector), -1), [hidden])
    _, stepped, _ = decoder(words, encoded_features, hidden)
    np.testing.assert_allclose(stepped, expected, atol=1e-5)
    assert np.abs(stepped - decoder(words, encoded_features, tf.zeros_like(hidden))[1]).max() > 0.1


def test_mean_and_scale_of_the_features_do_not_matter(features):
    mean = np.random.default_rng(5).standard_normal(CHANNELS).astype(np.float32)
    plain, _ = model.build_captioner(SMALL, VOCABULARY)
    normalising, _ = model.build_captioner(SMALL, VOCABULARY, mean, feature_std=10.0)
    assert plain(features).numpy().std() > 0.1
    np.testing.assert_allclose(plain(features), normalising(features * 10 + mean), rtol=1e-3, atol=1e-4)


def test_dropout_depends_on_its_seed_alone(captioner, features):
    encoder, decoder = captioner
    encoded_features = encoder(features)
    first, again, other = (decoder.teach(CAPTIONS, encoded_features, tf.constant((7, n)))[0] for n in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    without, _ = decoder.teach(CAPTIONS, encoded_features)
    assert np.abs(first - without).max() > 1e-3


def test_dropout_drops_the_same_numbers_at_all_words_of_a_caption():
    _, decoder = model.build_captioner(make_config({"units": 16, "dropout": 0.25}), VOCABULARY)
    dropped = decoder.drop(tf.ones((5, 40, 100)), tf.constant((7, 1)), 0).numpy()  # (T, B, n)
    assert dropped.shape == (5, 40, 100)
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (dropped == dropped[0]).all()
    assert np.mean(dropped[0] == 0) == pytest.approx(0.25, abs=0.03)
    assert len(np.unique(dropped[0], axis=0)) == 40
    assert np.mean(dropped[0] == decoder.drop(tf.ones((5, 40, 100)), tf.constant((7, 1)), 1)[0]) < 0.7


def test_word_losses_are_cross_entropies():
    logits = np.random.default_rng(0).standard_normal((6, VOCABULARY), np.float32)
    logits[0, :2] = 300, -300  # too unlikely for a probability in float32
    words = tf.constant([1, 0, 4, 2, 2, 1])
    losses, gradients = [], []
    for function in (model.word_losses, lambda x, w: tf.nn.sparse_softmax_cross_entropy_with_logits(w, x)):
        with tf.GradientTape() as tape:
            x = tf.constant(logits)
            tape.watch(x)
            losses.append(function(x, words))  # (6,)
        gradients.append(tape.gradient(losses[-1], x, tf.constant([1.0, 2.0, 0.0, 0.5, 1.0, 3.0])))
    assert losses[0].shape == (6,)
    assert losses[0][0] == 600
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    np.testing.assert_allclose(gradients[0], gradients[1], atol=1e-6)


def test_the_loss_counts_real_tokens_only():
    targets = [5, 8, 9, 6, END, 10, 7, END, END]
    assert model.words_to_say(CAPTIONS).numpy().tolist() == targets
    logits = np.random.default_rng(3).standard_normal((9, VOCABULARY)).astype(np.float32)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean([logs[n, word] for n, word in enumerate(targets)])
    np.testing.assert_allclose(model.caption_loss(CAPTIONS, tf.constant(logits)), expected, rtol=1e-5)
    assert model.caption_loss(CAPTIONS * 0, tf.zeros((0, VOCABULARY))) == 0


def test_the_attention_term_is_zero_where_every_location_gets_one_look_in_all():
    steps = np.array([4, 2, 3], np.float32)  # real steps of each caption
    even = np.ones((3, 4, LOCATIONS), np.float32) / steps[:, None, None]
    np.testing.assert_allclose(model.attention_loss(CAPTIONS, tf.constant(even)), 0.0, atol=1e-9)
    np.testing.assert_allclose(model.attention_loss(CAPTIONS, tf.constant(even * 0)), 1.0)


def test_greedy_decoding_says_what_single_steps_say(captioner, features):
    encoder, decoder = captioner
    decode = tf.function(model.decode_captions)
    words, log_probabilities, attention_weights = decode(encoder, decoder, features, 6)
    assert words.shape[1] <= 6
    assert attention_weights.shape == (3, words.shape[1], LOCATIONS)
    for b in range(3):
        encoded_features = encoder(features[b : b + 1])
        hidden, word, total = decoder.initial_hidden(encoded_features), START, 0.0
        for t in range(words.shape[1]):
            logits, hidden, weights = decoder(tf.constant([[word]]), encoded_features, hidden)
            logs = tf.nn.log_softmax(logits)[0].numpy()
            word = max((i for i in range(VOCABULARY) if i not in (PAD, UNK, START)), key=lambda i: logs[i])
            assert words[b, t] == word
            np.testing.assert_allclose(attention_weights[b, t], weights[0, :, 0], atol=1e-5)
            total += logs[word]
            if word == END:
                break
        assert (words[b, t + 1 :].numpy() == PAD).all()
        np.testing.assert_allclose(log_probabilities[b], total, rtol=1e-4)


def test_greedy_decoding_stops_at_end(captioner, features):
    encoder, decoder = captioner
    bias = decoder.make_logits.bias.numpy()
    decoder.make_logits.bias.assign(tf.one_hot(END, VOCABULARY, on_value=50.0))
    words, _, _ = model.decode_captions(encoder, decoder, features, 6)
    decoder.make_logits.bias.assign(bias)
    assert words.numpy().tolist() == [[END]] * 3


def beams_by_hand(encoder, decoder, features, max_words, width, length_penalty):
    """Beam search over one image in plain Python, one prefix at a time."""
    encoded_features = encoder(features)
    beams = [(0.0, [START], decoder.initial_hidden(encoded_features))]
    for _ in range(max_words):
        candidates = [beam for beam in beams if beam[1][-1] == END]
        room = width - len(candidates)
        running = []
        for total, words, hidden in beams:
            if words[-1] == END:
                continue
            logits, hidden, _ = decoder(tf.constant([[words[-1]]]), encoded_features, hidden)
            logs = tf.nn.log_softmax(logits)[0].numpy()
            sayable = (i for i in range(len(logs)) if i not in (PAD, UNK, START))
            running += [(total + logs[i], [*words, i], hidden) for i in sayable]
        beams = candidates + sorted(running, key=lambda beam: -beam[0])[:room]
    ended = [beam for beam in beams if beam[1][-1] == END] or beams
    total, words, _ = max(ended, key=lambda beam: beam[0] / (len(beam[1]) - 1) ** length_penalty)
    return words[1:], total


@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_beam_search_finds_what_it_finds_by_hand(captioner, features, width, length_penalty):
    encoder, decoder = captioner
    decode = tf.function(model.decode_captions)
    words, log_probabilities, attention_weights = decode(encoder, decoder, features, 7, width, length_penalty)
    for b in range(3):
        expected, total = beams_by_hand(encoder, decoder, features[b : b + 1], 7, width, length_penalty)
        said = [i for i in words[b].numpy().tolist() if i != PAD]
        assert said == expected
        np.testing.assert_allclose(log_probabilities[b], total, rtol=1e-4)
        captions = tf.constant([[START, *said]])
        _, along = decoder.teach(captions, encoder(features[b : b + 1]))
        np.testing.assert_allclose(attention_weights[b, : len(said)], along[0], atol=1e-5)


@pytest.mark.parametrize(("width", "seeds"), [(7, range(5)), (3, (0, 1, 3, 4))])
def test_beam_search_finds_the_likeliest_of_all_captions_of_a_tiny_vocabulary(features, width, seeds):
    """Two words and <end>, at most 2 in a caption: 7 beams hold them all. 3 may lose the best, but not for these."""
    decode = tf.function(model.decode_captions)
    better_than_greedy = 0
    for seed in seeds:
        encoder, decoder = model.build_captioner(make_config({"units": 16, "seed": seed}), 6)
        decoder.make_logits.kernel.assign(decoder.make_logits.kernel * 5)
        words, log_probabilities, _ = decode(encoder, decoder, features, 2, width)
        greedy, _, _ = decode(encoder, decoder, features, 2, 1)
        for b in range(3):
            scores = {}
            for caption in ((END,), (4, END), (5, END)):
                logits, _ = decoder.teach(tf.constant([[START, *caption]]), encoder(features[b : b + 1]))
                logs = tf.nn.log_softmax(logits).numpy()
                scores[caption] = sum(logs[t, word] for t, word in enumerate(caption))
            best = max(scores, key=scores.get)
            assert tuple(i for i in words[b].numpy() if i != PAD) == best
            np.testing.assert_allclose(log_probabilities[b], scores[best], rtol=1e-4)
            better_than_greedy += best != tuple(i for i in greedy[b].numpy() if i != PAD)
    assert better_than_greedy


def test_special_words_are_never_said(captioner, features):
    encoder, decoder = captioner
    bias = decoder.make_logits.bias.numpy()
    decoder.make_logits.bias.assign(tf.reduce_sum(tf.one_hot((PAD, UNK, START), VOCABULARY, on_value=50.0), 0))
    for width in (1, 3):
        words, _, _ = model.decode_captions(encoder, decoder, features, 6, width)
        said = words.numpy()
        assert not np.isin(said, (UNK, START)).any()
        assert (said[:, 0] != PAD).all()
    decoder.make_logits.bias.assign(bias)


@pytest.mark.parametrize(
    ("length", "said", "barred"),
    [
        (1, [START, 5, 6], {5, 6}),
        (2, [START, 5, 5], {5}),
        (2, [START, 5, 6, 7, 5], {6}),
        (2, [START, 5, 6, 5, 7, 5], {6, 7}),
        (3, [START, 5, 6, 7, 5, 6], {7}),
        (3, [START, 5, 5, 7, 5], set()),
        (3, [START], set()),
    ],
)
def test_no_sequence_is_said_twice(length, said, barred):
    gains = model.without_repeats(tf.zeros((1, VOCABULARY)), tf.constant([said]), length)[0].numpy()
    assert set(np.flatnonzero(gains < -1e8)) - {PAD, START} == barred
    assert (gains[gains > -1e8] == 0).all()


@pytest.mark.parametrize("width", [1, 3])
def test_captions_repeat_no_sequence(captioner, features, width):
    """One word is made likelier than all others: it would be said over and over."""
    encoder, decoder = captioner
    bias = decoder.make_logits.bias.numpy()
    decoder.make_logits.bias.assign(tf.one_hot(7, VOCABULARY, on_value=30.0))
    decode = tf.function(model.decode_captions)
    freely, _, _ = decode(encoder, decoder, features, 8, width)
    words, _, _ = decode(encoder, decoder, features, 8, width, 0.0, 2)
    decoder.make_logits.bias.assign(bias)
    assert (freely[:, :7] == 7).numpy().all()
    for said in words.numpy().tolist():
        pairs = [pair for pair in zip(said, said[1:], strict=False) if PAD not in pair]
        assert len(pairs) == len(set(pairs)) > 3
