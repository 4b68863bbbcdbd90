import keras
import numpy as np
import pytest
import tensorflow as tf

import model
from captioning.settings import make_config
from captioning.training.model_check import check_model
from captioning.training.state import TrainingState
from support.errors import UserError

CONFIG = make_config({"encoder_dim": 8, "embedding_dim": 6, "units": 12})
V, P, F = 20, 4, 16


def build(precision="float32", **edits):
    """Encoder and decoder, which has these attributes and methods instead of, or besides, its own."""
    before, model.RNN_Decoder = model.RNN_Decoder, type("RNN_Decoder", (model.RNN_Decoder,), edits)
    try:
        return model.build_captioner(CONFIG, V, np.zeros(F, np.float32), precision=precision)
    finally:
        model.RNN_Decoder = before


def check(precision="float32", **edits):
    check_model(*build(precision, **edits), (P, F), V)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_nothing_is_said_of_the_model_as_it_is(capsys, precision):
    check(precision)
    assert capsys.readouterr().out == ""


def test_an_edit_of_decoding_that_training_has_not_is_told(capsys):
    own = model.RNN_Decoder.call

    def call(self, words, encoded_features, hidden, keys=None):
        logits, hidden, attention_weights = own(self, words, encoded_features, hidden, keys)
        return logits + self.output_layer(keras.ops.normalize(hidden)), hidden, attention_weights

    check(call=call)
    assert "warning: teacher_forcing and call of RNN_Decoder, in model.py, give" in capsys.readouterr().out


def test_an_edit_of_the_step_is_in_both(capsys):
    check(
        gru=lambda self, word_gates, context_vector, hidden: tf.tanh(
            hidden + self.context_gates(context_vector)[:, :12]
        )
    )
    assert "warning" not in capsys.readouterr().out


def with_attribute(make):
    """An __init__ that also sets `self.extra`."""
    own = model.RNN_Decoder.__init__

    def init(self, *args):
        own(self, *args)
        self.extra = make(self)

    return init


def test_a_weight_that_no_word_depends_on_is_told(capsys):
    check(__init__=with_attribute(lambda self: self.add_weight(shape=(2,), name="later")))
    assert "/later of model.py, and training does not change it\n" in capsys.readouterr().out


def gru(change):
    own = model.RNN_Decoder.gru
    return lambda self, *args: change(self, own(self, *args))


def test_a_variable_that_keras_does_not_train_is_refused():
    init = with_attribute(lambda self: tf.Variable(2.0, name="scale"))
    with pytest.raises(UserError, match=r"never change the variable scale:0 .*: make it by self.add_weight\(\)"):
        check(__init__=init, gru=gru(lambda self, hidden: self.extra * hidden))


def test_numbers_that_are_not_finite_are_refused_before_training():
    with pytest.raises(UserError, match="^the loss is nan before any training"):
        check(gru=gru(lambda self, hidden: tf.math.log(hidden)))
    with pytest.raises(UserError, match="^the gradient of .* is not finite before any training"):
        check(gru=gru(lambda self, hidden: tf.sqrt(tf.nn.relu(hidden - 9))))


def test_the_detector_is_asked_for():
    encoder, decoder = model.build_captioner(CONFIG, V, np.zeros(F, np.float32))
    with pytest.raises(UserError, match="^model.py has no RNN_Decoder.detector"):
        check_model(encoder, tf.Module(), (P, F), V)


def test_the_detectors_weights_are_the_last_wherever_it_is_made():
    """The optimizer clips so many of the last weights apart."""

    def make(decoder):
        layer = keras.layers.Dense(3)
        layer.build((None, 4))
        return layer

    encoder, decoder = build(__init__=with_attribute(make))
    theirs, apart = (
        TrainingState(encoder, decoder, tf.Module()).trainable_variables,
        decoder.detector.trainable_variables,
    )
    assert [id(weight) for weight in theirs[-len(apart) :]] == [id(weight) for weight in apart]
    assert len(theirs) == len(encoder.trainable_variables) + len(decoder.trainable_variables)
    assert {id(weight) for weight in decoder.extra.weights} <= {id(weight) for weight in theirs}
