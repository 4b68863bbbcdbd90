"""What stands outside of model.py follows its edits, or says in one line that it cannot."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import model
from captioning import captioner as captioning_captioner
from captioning.attention.evidence import explain_captions
from captioning.captioner import Captioner, caption_batch
from captioning.decoder.basic_layers import in_training
from captioning.decoder.beam_search import beam_search
from captioning.decoder.edited_model import following_model
from captioning.decoder.nucleus_sampling import sample_decode
from captioning.decoder.rules import DecodedCaptions
from captioning.export.bundle import bundle_functions
from captioning.features.cache import ImageToCaption
from captioning.settings import make_config
from captioning.training.optimizer import SummedAdam
from captioning.training.sampling import sample_captions
from captioning.training.state import TrainingState
from captioning.vocabulary import END, PAD
from support.errors import UserError

V, F, MOST = 20, 16, 5
CONFIG = make_config({"encoder_dim": 8, "embedding_dim": 6, "units": 12, "samples_per_image": 2, "max_words": MOST})
WORDS = tf.constant([[5, 9, 6, END], [7, END, PAD, PAD]])


class _TwoStates(model.RNN_Decoder):
    """As a student gives the decoder an LSTM's second state, as a tuple, and normalises what the output layer gets."""

    def initial_hidden(self, encoded_features):
        hidden = super().initial_hidden(encoded_features)
        return hidden, tf.zeros_like(hidden)

    def call(self, words, encoded_features, hidden, keys=None):
        state, cell = hidden
        _, new, attention_weights = super().call(words, encoded_features, state, keys)
        cell = cell + new
        return self.output_layer(tf.tanh(cell)), (new, cell), attention_weights


class _JoinedStates(_TwoStates):
    """The same with one tensor for both states."""

    def initial_hidden(self, encoded_features):
        return tf.concat(super().initial_hidden(encoded_features), 1)

    def call(self, words, encoded_features, hidden, keys=None):
        logits, hidden, attention_weights = super().call(words, encoded_features, tf.split(hidden, 2, 1), keys)
        return logits, tf.concat(hidden, 1), attention_weights


@pytest.fixture(scope="module")
def features():
    return tf.constant(np.random.default_rng(1).standard_normal((2, 4, F), np.float32))


def build(decoder_class):
    before, model.RNN_Decoder = model.RNN_Decoder, decoder_class
    try:
        encoder, decoder = model.build_captioner(CONFIG, V, np.zeros(F, np.float32))
    finally:
        model.RNN_Decoder = before
    decoder.output_layer.kernel.assign(10 * decoder.output_layer.kernel)
    return encoder, decoder


def beams(encoder, decoder, features):
    return beam_search(encoder, decoder, features, MOST, 3, count=2)


def samples(encoder, decoder, features):
    chances = np.random.default_rng(0).random((2, 2, MOST), np.float32)
    return sample_decode(encoder, decoder, features, tf.constant(chances))


def evidence(encoder, decoder, features):
    return explain_captions(encoder, decoder, features, WORDS)


def self_critical_samples(encoder, decoder, features):
    adam = SummedAdam(1e-3, global_clipnorm=5.0)
    state = TrainingState(encoder, decoder, adam)
    adam.build(state.trainable_variables)
    return [sample_captions(state, features, np.arange(2), CONFIG)]


@pytest.mark.parametrize("follow", [beams, samples, evidence, self_critical_samples], ids=lambda each: each.__name__)
def test_a_state_of_several_tensors_is_as_good_as_one(features, follow):
    two, joined, plain = (follow(*build(kind), features) for kind in (_TwoStates, _JoinedStates, model.RNN_Decoder))
    for first, second in zip(two, joined, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-4)
    assert any(np.shape(a) != np.shape(b) or np.abs(a - b).max() > 1e-3 for a, b in zip(two, plain, strict=True))


def test_a_bundle_says_that_it_takes_one_tensor_as_state():
    encoder, decoder = build(_TwoStates)
    cnn = types.SimpleNamespace(feature_shape=(4, F), image_size=8)
    with pytest.raises(UserError, match=r"take one tensor \(B, n\) as the decoder's state.* join its parts"):
        bundle_functions(Captioner(encoder, decoder, ["word"] * V, ""), None, cnn)


def test_what_cannot_follow_is_one_line_with_the_place_and_what_to_do(tmp_path, features, monkeypatch):
    """An attention layer without key_layer, as one of several heads has none."""
    encoder, decoder = build(model.RNN_Decoder)
    decoder.attention = types.SimpleNamespace()
    images = [ImageToCaption(tmp_path / f"{i}.jpg", f"{i}.jpg") for i in range(2)]
    decoded = DecodedCaptions(WORDS, tf.zeros((2, 4)), tf.zeros((2, 4, 4)))
    monkeypatch.setattr(captioning_captioner, "_greedy_graph", lambda *_: decoded)
    captioner = Captioner(encoder, decoder, [f"word{i}" for i in range(V)], "")
    several = make_config({"max_words": MOST, "beam_width": 3, "captions_per_image": 2})
    drawn = make_config({"max_words": MOST, "sample": "yes"})
    no_keys = r"cannot follow model.py \(line \d+ of {}\.py: AttributeError: .*\): change it there, or caption "
    with pytest.raises(UserError, match=f"^beam search {no_keys.format('beam_search')}with --beam_width 1"):
        caption_batch(captioner, images, features, several)
    with pytest.raises(UserError, match=f"^--sample {no_keys.format('nucleus_sampling')}without it"):
        caption_batch(captioner, images, features, drawn)
    with pytest.raises(UserError, match=f"^evidence {no_keys.format('evidence')}without it by --figures 0"):
        caption_batch(captioner, images, features, CONFIG, with_evidence=True)


def test_the_line_names_the_place_in_model_py(features):
    @following_model("beam search", "or do without")
    def fail(function):
        function()

    encoder, decoder = build(model.RNN_Decoder)
    broken = tf.function(lambda: decoder(WORDS[:, :1], encoder(features), tf.zeros((2, 7))))
    with pytest.raises(UserError, match=r"\(line \d+ of model\.py: ValueError: .*\): change it there, or do without$"):
        fail(broken)
    for kept in (UserError("no a"), OSError("no b"), KeyboardInterrupt()):
        with pytest.raises(type(kept)):
            fail(lambda kept=kept: (_ for _ in ()).throw(kept))


def test_keras_layers_learn_that_this_is_training():
    dropout, x = keras.layers.Dropout(0.5, seed=0), tf.ones((3, 40))
    assert (dropout(x).numpy() == 1).all()
    assert set(np.unique(in_training(lambda x: 2 * dropout(x), x))) == {0, 4}
    assert (dropout(x).numpy() == 1).all()


def test_the_detectors_weights_are_the_last_wherever_it_is_made():
    class GateBehind(model.RNN_Decoder):
        def __init__(self, *args):
            super().__init__(*args)
            self.gate = keras.layers.Dense(3)
            self.gate.build((None, 3))

    encoder, decoder = build(GateBehind)
    weights = TrainingState(encoder, decoder, SummedAdam(1e-3)).trainable_variables
    assert [weight.path for weight in weights[-2:]] == [w.path for w in decoder.detector.trainable_variables]
    assert len({id(w) for w in weights}) == len(encoder.trainable_variables) + len(decoder.trainable_variables)
