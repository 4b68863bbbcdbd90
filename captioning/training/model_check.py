"""Whether training reaches all of model.py, and teaches what captions: asked before the first step, as users edit it.

Letters of shapes as in model.py.
"""

import numpy as np
import tensorflow as tf

from captioning.vocabulary import START
from model import attention_loss, caption_loss
from support.errors import UserError

_ALIKE = 0.1  # of their spread; numbers of 16 bits make logits differ by a tenth of that
_FIX = "change that in model.py, and run the same command again"


def check_model(encoder, decoder, shape, vocab_size):
    """Train a new model on made-up captions without changing it, and print a line for what looks like a mistake.

    Args:
      encoder, decoder: as model.build_captioner returns them.
      shape: (P, F)
      vocab_size: int, V.

    Raises:
      UserError: logits or gradients are not finite, or there are weights that training would never change.
    """
    if not hasattr(decoder, "detector"):
        raise UserError(f"model.py has no RNN_Decoder.detector, which evidence is made with: {_FIX}")
    rng = np.random.default_rng(0)
    features = tf.constant(rng.standard_normal((2, *shape), np.float32))  # (B, P, F)
    words = rng.integers(START + 1, vocab_size, (2, 3))
    captions = tf.constant(np.column_stack((np.full(2, START), words)), tf.int32)  # (B, T)
    with tf.GradientTape() as tape:
        encoded_features = encoder(features)  # (B, P, D)
        logits, attention_weights = decoder.teacher_forcing(captions, encoded_features)  # (B (T-1), V), (B, T-1, P)
        loss = caption_loss(captions, logits) + attention_loss(captions, attention_weights)
    _check_gradients(tape, loss, encoder, decoder)
    _compare_logits(logits, _logits_by_words(decoder, captions, encoded_features))


def _check_gradients(tape, loss, encoder, decoder):
    """See that the loss is a number, and that each variable that it depends on is a weight that training changes."""
    apart = {id(weight) for weight in decoder.detector.trainable_variables}  # it has a loss of its own
    weights = [w for w in encoder.trainable_variables + decoder.trainable_variables if id(w) not in apart]
    if not np.isfinite(loss):
        raise UserError(f"the loss is {loss:.3g} before any training, with weights as model.py draws them: {_FIX}")
    known = {id(weight.value) for weight in weights}
    for variable in tape.watched_variables():
        if id(variable) not in known:
            raise UserError(
                f"training would never change the variable {variable.name} of model.py, which is no weight of a layer: "
                f"make it by self.add_weight(), or keep the layer that has it as an attribute of another; {_FIX}"
            )
    for weight, gradient in zip(weights, tape.gradient(loss, weights), strict=True):
        if gradient is None:
            print(f"note: no word depends on {weight.path} of model.py, and training does not change it")
        elif not np.isfinite(tf.linalg.global_norm([gradient])):
            raise UserError(f"the gradient of {weight.path} is not finite before any training: {_FIX}")


def _logits_by_words(decoder, captions, encoded_features):
    """The logits of captions as decoding computes them. int (B, T), float (B, P, D) -> float (B (T-1), V)."""
    hidden, all_logits = decoder.initial_hidden(encoded_features), []
    for t in range(captions.shape[1] - 1):
        logits, hidden, _ = decoder(captions[:, t : t + 1], encoded_features, hidden)  # (B, V)
        all_logits.append(logits)
    return tf.concat(all_logits, 0)  # (B (T-1), V)


def _compare_logits(trained, said):
    """Print a line where the logits of training and of decoding, float (N, V) each, are not the same."""
    spread = np.std(trained - np.mean(trained, axis=0))
    if np.std(trained - said) > _ALIKE * max(spread, 1e-6):
        print(
            "warning: teacher_forcing and call of RNN_Decoder, in model.py, give the same words other logits: one "
            "model is trained, and another writes captions. Where one of them was edited, edit the other too"
        )
