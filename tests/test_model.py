import contextlib
import dataclasses
import io

import keras
import numpy as np
import pytest
import tensorflow as tf

import model
from captioning.attention.evidence import explain_captions
from captioning.decoder.dropout import channel_dropout, variational_dropout
from captioning.decoder.rules import _BANNED_WORDS, ban_words
from captioning.features.cnn import CNNS
from captioning.settings import make_config
from captioning.vocabulary import END, PAD, START, UNK
from config import Config

SMALL = make_config({"encoder_dim": 8, "embedding_dim": 12, "units": 16, "dropout": 0.4})
VOCABULARY = 30
LOCATIONS, CHANNELS = CNNS["InceptionV3"].feature_shape
NO_MEAN = np.zeros(CHANNELS, np.float32)
CAPTIONS = tf.constant([[START, 5, 6, 7, END], [START, 8, END, PAD, PAD], [START, 9, 10, END, PAD]])


@pytest.fixture(scope="module")
def captioner():
    return model.build_captioner(SMALL, VOCABULARY, NO_MEAN, feature_std=0.5)


@pytest.fixture(scope="module")
def features():
    return tf.constant(np.random.default_rng(1).standard_normal((3, LOCATIONS, CHANNELS), np.float32))


@contextlib.contextmanager
def output_bias(decoder, bias):
    """Let the decoder say other words inside the block."""
    before = decoder.output_layer.bias.numpy()
    decoder.output_layer.bias.assign(bias)
    try:
        yield
    finally:
        decoder.output_layer.bias.assign(before)


def test_shapes_at_the_defaults():
    config = Config()
    encoder, decoder = model.build_captioner(config, config.vocab_size, NO_MEAN)
    encoded_features = encoder(tf.zeros((16, 64, 2048)))
    assert encoded_features.shape == (16, 64, 256)
    logits, hidden, attention_weights = decoder(tf.ones((16, 1), tf.int32), encoded_features, tf.zeros((16, 512)))
    assert logits.shape == (16, config.vocab_size)
    assert hidden.shape == (16, 512)
    assert attention_weights.shape == (16, 64, 1)


def test_the_shapes_are_printed():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        model.print_shapes()
    for line in (
        "in   features (16, 64, 2048)",
        "out  encoded_features (16, 64, 256)",
        "in   words (16, 1), encoded_features (16, 64, 256), hidden (16, 512)",
        "out  logits (16, 5000), hidden (16, 512), attention_weights (16, 64, 1)",
    ):
        assert line in printed.getvalue()


def test_the_output_layer_is_as_large_as_the_vocabulary(captioner):
    assert captioner[1].output_layer.kernel.shape == (SMALL.units, VOCABULARY)


def test_teacher_forcing_and_single_steps_agree(captioner, features):
    encoder, decoder = captioner
    encoded_features = encoder(features)
    for captions in (CAPTIONS, CAPTIONS[::-1], CAPTIONS[1:], CAPTIONS[1:2]):
        compare_with_single_steps(decoder, captions, encoded_features[: len(captions)])


def dot_product(self, encoded_features, keys, hidden):
    score = tf.matmul(keys, self.query_layer(hidden)[:, :, tf.newaxis])  # (B, P, 1)
    attention_weights = tf.nn.softmax(score, axis=1)  # (B, P, 1)
    return tf.reduce_sum(attention_weights * encoded_features, axis=1), attention_weights


def minimal_gated_unit(self, word_gates, context_vector, hidden):
    x_update, _, x_new = tf.split(word_gates + self.context_gates(context_vector), 3, axis=1)  # (B, U) each
    h_update, _, h_new = tf.split(self.hidden_gates(hidden), 3, axis=1)  # (B, U) each
    update = tf.sigmoid(x_update + h_update)
    return (1 - update) * hidden + update * tf.tanh(x_new + update * h_new)


def residual_step(self, word_gates, hidden, encoded_features, keys):
    context_vector, attention_weights = self.attention(encoded_features, keys, hidden)
    return hidden + self.gru(word_gates, context_vector, hidden), attention_weights


EDITS = [
    (model.BahdanauAttention, "call", dot_product),
    (model.RNN_Decoder, "gru", minimal_gated_unit),
    (model.RNN_Decoder, "step", residual_step),
]


@pytest.mark.parametrize(("owner", "name", "edited"), EDITS, ids=[name for _, name, _ in EDITS])
def test_whatever_is_edited_in_the_model_is_what_trains(captioner, features, monkeypatch, owner, name, edited):
    """Training, validation, single steps and evidence follow a reader's first edits of this file."""
    encoder, decoder = captioner
    encoded_features = encoder(features)
    before = decoder.teacher_forcing(CAPTIONS, encoded_features)[0]
    monkeypatch.setattr(owner, name, edited)
    after = decoder.teacher_forcing(CAPTIONS, encoded_features)[0]
    assert np.abs(after - before).max() > 1e-3
    compare_with_single_steps(decoder, CAPTIONS, encoded_features)
    weights, _, _ = explain_captions.python_function(encoder, decoder, features, CAPTIONS[:, 1:])
    expected = decoder.teacher_forcing(CAPTIONS, encoded_features)[1]
    for row, length in enumerate((4, 2, 3)):
        np.testing.assert_allclose(weights[row, :length], expected[row, :length], atol=1e-5)


def compare_with_single_steps(decoder, captions, encoded_features):
    all_logits, all_weights = decoder.teacher_forcing(captions, encoded_features)
    is_target = tf.transpose(captions[:, 1:]) != PAD
    assert all_logits.shape == (np.count_nonzero(is_target), VOCABULARY)
    assert all_weights.shape == (len(captions), 4, LOCATIONS)
    all_logits = tf.scatter_nd(tf.where(is_target), all_logits, (4, len(captions), VOCABULARY))
    hidden = decoder.initial_hidden(encoded_features)
    for t in range(4):
        logits, hidden, weights = decoder(captions[:, t : t + 1], encoded_features, hidden)
        real = is_target[t]
        np.testing.assert_allclose(logits[real], all_logits[t][real], atol=1e-5)
        np.testing.assert_allclose(weights[real][:, :, 0], all_weights[:, t][real], atol=1e-5)
        np.testing.assert_allclose(tf.reduce_sum(weights, axis=1), 1.0, atol=1e-5)


def test_teacher_forcing_and_single_steps_have_the_same_gradients(captioner, features):
    encoder, decoder = captioner
    apart = {weight.path for weight in decoder.detector.weights}  # no step uses them
    weights = [
        weight for weight in encoder.trainable_variables + decoder.trainable_variables if weight.path not in apart
    ]

    def at_once():
        return decoder.teacher_forcing(CAPTIONS, encoder(features))

    def step_by_step():
        encoded_features = encoder(features)
        hidden, steps = decoder.initial_hidden(encoded_features), []
        for t in range(4):
            logits, hidden, attention_weights = decoder(CAPTIONS[:, t : t + 1], encoded_features, hidden)
            steps.append((logits, attention_weights[:, :, 0]))
        all_logits, all_weights = zip(*steps, strict=True)
        return tf.stack(all_logits)[tf.transpose(CAPTIONS[:, 1:]) != PAD], tf.stack(all_weights, 1)

    gradients = []
    for compute in (at_once, step_by_step):
        with tf.GradientTape() as tape:
            logits, attention_weights = compute()
            loss = model.caption_loss(CAPTIONS, logits) + model.attention_loss(CAPTIONS, attention_weights)
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

    context_vector, _ = decoder.attention(encoded_features, decoder.attention.key_layer(encoded_features), hidden)
    expected, _ = cell(tf.concat((decoder.embedding(words[:, 0]), context_vector), -1), [hidden])
    _, stepped, _ = decoder(words, encoded_features, hidden)
    np.testing.assert_allclose(stepped, expected, atol=1e-5)
    assert np.abs(stepped - decoder(words, encoded_features, tf.zeros_like(hidden))[1]).max() > 0.1


def test_mean_and_scale_of_the_features_do_not_matter(features):
    mean = np.random.default_rng(5).standard_normal(CHANNELS).astype(np.float32)
    plain, _ = model.build_captioner(SMALL, VOCABULARY, NO_MEAN)
    normalising, _ = model.build_captioner(SMALL, VOCABULARY, mean, feature_std=10.0)
    assert plain(features).numpy().std() > 0.1
    np.testing.assert_allclose(plain(features), normalising(features * 10 + mean), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_weights_are_float32_and_the_same_in_every_precision(precision, captioner):
    encoder, decoder = model.build_captioner(SMALL, VOCABULARY, NO_MEAN, feature_std=0.5, precision=precision)
    fresh = model.build_captioner(SMALL, VOCABULARY, NO_MEAN, feature_std=0.5)
    for mine, theirs in zip(encoder.weights + decoder.weights, fresh[0].weights + fresh[1].weights, strict=True):
        assert mine.dtype == "float32"
        np.testing.assert_array_equal(mine, theirs, err_msg=mine.path)


def test_what_training_leaves_alone_is_in_the_checkpoint(captioner):
    encoder, _ = captioner
    constants = {weight.name: weight.numpy() for weight in encoder.non_trainable_weights}
    assert constants.keys() == {"feature_mean", "feature_std"}
    assert constants["feature_std"] == 0.5 and constants["feature_mean"].shape == (CHANNELS,)


def test_dropout_depends_on_its_seed_alone(captioner, features):
    encoder, decoder = captioner
    encoded_features = encoder(features)
    seeds = (tf.constant((7, n)) for n in (1, 1, 2))
    first, again, other = (decoder.teacher_forcing(CAPTIONS, encoded_features, seed)[0] for seed in seeds)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    without, _ = decoder.teacher_forcing(CAPTIONS, encoded_features)
    assert np.abs(first - without).max() > 1e-3


def test_dropped_channels_are_what_they_are_on_average_at_all_locations_of_an_image(captioner, features):
    mean = np.linspace(-1, 1, CHANNELS, dtype=np.float32)
    encoder = model.CNN_Encoder(8, mean, 0.5, dropout=0.5)
    seed = tf.constant((7, 3))
    dropped = channel_dropout(features, mean, 0.5, seed).numpy()
    is_mean = np.isclose(dropped, mean, atol=1e-6).all(axis=1)  # (B, F)
    assert 0.3 < is_mean.mean() < 0.7 and len(np.unique(is_mean, axis=0)) == len(features)
    doubled = mean + 2 * (np.asarray(features) - mean)  # (B, P, F)
    np.testing.assert_allclose(dropped, np.where(is_mean[:, np.newaxis], mean, doubled), atol=1e-5)
    encoder(features)
    np.testing.assert_array_equal(encoder(features, dropout_seed=seed), encoder(tf.constant(dropped)))
    other = encoder(features, dropout_seed=tf.constant((7, 4)))
    assert np.abs(encoder(features, dropout_seed=seed) - other).max() > 1e-3
    plain, _ = captioner
    np.testing.assert_array_equal(plain(features, dropout_seed=seed), plain(features))


def test_the_loss_counts_real_tokens_only():
    targets = [5, 8, 9, 6, END, 10, 7, END, END]
    assert model.target_words(CAPTIONS).numpy().tolist() == targets
    logits = np.random.default_rng(3).standard_normal((9, VOCABULARY)).astype(np.float32)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean([logs[n, word] for n, word in enumerate(targets)])
    np.testing.assert_allclose(model.caption_loss(CAPTIONS, tf.constant(logits)), expected, rtol=1e-5)
    assert model.caption_loss(CAPTIONS * 0, tf.zeros((0, VOCABULARY))) == 0


def test_the_attention_term_is_zero_where_every_location_gets_as_much_attention_as_others():
    steps = np.array([4, 2, 3], np.float32)  # real steps of each caption
    even = np.ones((3, 4, LOCATIONS), np.float32) / steps[:, None, None]
    np.testing.assert_allclose(model.attention_loss(CAPTIONS, tf.constant(even)), 0.0, atol=1e-9)
    np.testing.assert_allclose(model.attention_loss(CAPTIONS, tf.constant(even * 0)), 1.0)
    with_empty = tf.concat((CAPTIONS, tf.zeros((2, 5), tf.int32)), 0)  # of a batch that was filled up
    weights = tf.constant(np.concatenate((even / 2, np.ones((2, 4, LOCATIONS), np.float32))))
    np.testing.assert_allclose(model.attention_loss(with_empty, weights), 0.25)


@pytest.mark.parametrize("in_graph", [True, False])
def test_greedy_decoding_says_what_single_steps_say(captioner, features, in_graph):
    encoder, decoder = captioner
    decode = tf.function(model.greedy_decode) if in_graph else model.greedy_decode
    words, log_probs, attention_weights = decode(encoder, decoder, features, 6)
    assert words.shape[1] <= 6
    assert log_probs.shape == words.shape
    assert attention_weights.shape == (3, words.shape[1], LOCATIONS)
    for b in range(3):
        encoded_features = encoder(features[b : b + 1])
        hidden, word = decoder.initial_hidden(encoded_features), START
        for t in range(words.shape[1]):
            logits, hidden, weights = decoder(tf.constant([[word]]), encoded_features, hidden)
            logs = tf.nn.log_softmax(ban_words(logits))[0].numpy()
            word = max((i for i in range(VOCABULARY) if i not in _BANNED_WORDS), key=lambda i: logs[i])
            assert words[b, t] == word
            np.testing.assert_allclose(attention_weights[b, t], weights[0, :, 0], atol=1e-5)
            np.testing.assert_allclose(log_probs[b, t], logs[word], rtol=1e-4)
            if word == END:
                break
        assert (words[b, t + 1 :].numpy() == PAD).all()
        assert (log_probs[b, t + 1 :].numpy() == 0).all()


def test_one_graph_of_greedy_decoding_serves_batches_of_all_sizes(captioner, features):
    encoder, decoder = captioner
    graph = tf.function(lambda x: model.greedy_decode(encoder, decoder, x, 6, 2))
    decode = graph.get_concrete_function(tf.TensorSpec((None, LOCATIONS, CHANNELS)))
    for rows in (1, 3):
        expected = model.greedy_decode(encoder, decoder, features[:rows], 6, 2)
        for decoded in (decode(features[:rows]), graph(features[:rows])):  # the second is traced for this size
            np.testing.assert_array_equal(decoded.words, expected.words)
            np.testing.assert_allclose(decoded.attention_weights, expected.attention_weights, atol=1e-5)


def test_greedy_decoding_stops_at_end(captioner, features):
    encoder, decoder = captioner
    with output_bias(decoder, tf.one_hot(END, VOCABULARY, on_value=50.0)):
        words, log_probs, attention_weights = model.greedy_decode(encoder, decoder, features, 6)
    assert words.numpy().tolist() == [[END]] * 3
    assert log_probs.shape == (3, 1) and attention_weights.shape == (3, 1, LOCATIONS)


def test_special_words_are_never_said(captioner, features):
    encoder, decoder = captioner
    with output_bias(decoder, tf.zeros(VOCABULARY)):
        before = model.greedy_decode(encoder, decoder, features, 6)
    with output_bias(decoder, tf.reduce_sum(tf.one_hot((PAD, UNK, START), VOCABULARY, on_value=50.0), 0)):
        words, log_probs, _ = model.greedy_decode(encoder, decoder, features, 6)
    assert not np.isin(words, (UNK, START)).any()
    assert (words[:, 0].numpy() != PAD).all()
    np.testing.assert_array_equal(words, before.words)
    np.testing.assert_allclose(log_probs, before.log_probs, rtol=1e-4)  # probabilities are of what can be said


def test_captions_repeat_no_sequence(captioner, features):
    """One word is made likelier than all others: it would be said over and over."""
    encoder, decoder = captioner
    with output_bias(decoder, tf.one_hot(7, VOCABULARY, on_value=30.0)):
        freely = model.greedy_decode(encoder, decoder, features, 8).words
        words = model.greedy_decode(encoder, decoder, features, 8, 2).words
    assert (freely[:, :7] == 7).numpy().all()
    for said in words.numpy().tolist():
        pairs = [pair for pair in zip(said, said[1:], strict=False) if PAD not in pair]
        assert len(pairs) == len(set(pairs)) > 3


def test_dropout_is_of_embeddings_and_of_what_the_output_layer_gets_and_of_nothing_else(captioner, features):
    encoder, decoder = captioner
    seed, encoded_features = tf.constant((7, 3)), encoder(features)
    logits, attention_weights = decoder.teacher_forcing(CAPTIONS, encoded_features, seed)
    words = tf.transpose(CAPTIONS)  # (T, B)
    embedded = variational_dropout(decoder.embedding(words[:-1]), SMALL.dropout, seed, layer=0)  # (T-1, B, E)
    keys, hidden = decoder.attention.key_layer(encoded_features), decoder.initial_hidden(encoded_features)
    all_hidden = []
    for t in range(4):
        hidden, weights = decoder.step(decoder.word_gates(embedded[t]), hidden, encoded_features, keys)
        all_hidden.append(hidden)
        real = words[t + 1] != PAD
        np.testing.assert_allclose(attention_weights[:, t][real], weights[:, :, 0][real], atol=1e-5)
    dropped = variational_dropout(tf.stack(all_hidden), SMALL.dropout, seed, layer=1)  # (T-1, B, U)
    np.testing.assert_allclose(logits, decoder.output_layer(dropped[words[1:] != PAD]), atol=1e-5)


def test_the_seed_of_the_settings_draws_all_weights():
    drawn = []
    for seed in (3, 4):
        encoder, decoder = model.build_captioner(dataclasses.replace(SMALL, seed=seed), VOCABULARY, NO_MEAN)
        drawn.append([*encoder.trainable_weights, *decoder.trainable_weights])
    kernels = 0
    for weight, other in zip(*drawn, strict=True):
        if np.ptp(weight) > 0:  # not biases and the detector, which begin with one number
            kernels += 1
            assert np.abs(weight - other.numpy()).max() > 1e-3, weight.path
    assert kernels == 10


def test_the_encoder_is_normalisation_dense_and_relu(features):
    rng = np.random.default_rng(6)
    mean = rng.standard_normal(CHANNELS).astype(np.float32)
    encoder, _ = model.build_captioner(SMALL, VOCABULARY, mean, feature_std=1.5)
    encoder.bias.assign(rng.standard_normal(SMALL.encoder_dim))
    dense = (features.numpy() - mean) / 1.5 @ encoder.dense.kernel.numpy() + encoder.bias.numpy()  # (B, P, D)
    assert 0.2 < (dense < 0).mean() < 0.8
    np.testing.assert_allclose(encoder(features), np.maximum(dense, 0), atol=1e-3)
