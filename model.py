"""The captioner of Show, Attend and Tell (Xu et al., 2015, arXiv 1502.03044), with soft attention and a GRU.

Letters of every shape in this project:
  B batch              D encoded feature     V vocabulary
  T caption length     E word embedding      K beam width
  P locations (64)     U GRU, attention      F feature (2048)

`python model.py` prints the shapes at the defaults.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from captioning.decoder.basic_layers import MixedPrecisionDense, softmax_cross_entropy
from captioning.decoder.dropout import channel_dropout, variational_dropout
from captioning.decoder.rules import DecodedCaptions, has_ended, next_word_log_probs
from captioning.decoder.word_detector import WordDetector
from captioning.vocabulary import PAD, START
from config import Config


class CNN_Encoder(keras.Model):
    """Encodes the CNN's feature of each location: normalisation, Dense, ReLU.

    Args:
      encoder_dim: int, D.
      feature_mean: float (F,), each channel's mean, which is subtracted from the features.
      feature_std: float, by which they are then divided, so that nothing depends on their scale.
      precision: Keras dtype policy of the large product.
      dropout: float, share of the channels that training drops, the same at all locations of an image.

    Call:
      features: float (B, P, F)
      dropout_seed: int (2,), or None for no dropout.

    Returns:
      encoded_features: float (B, P, D)
    """

    def __init__(self, encoder_dim, feature_mean, feature_std, precision="float32", dropout=0.0):
        super().__init__(autocast=False)  # Keras would cast features to float32 before the product
        self.dropout = dropout
        self.dense = MixedPrecisionDense(encoder_dim, precision, use_bias=False)
        self.bias = self.add_weight(shape=(encoder_dim,), initializer="zeros", name="bias")
        # Weights, so that a checkpoint brings them: new images must be normalised by the numbers of training.
        self.feature_mean = self.add_constant("feature_mean", feature_mean)
        self.feature_std = self.add_constant("feature_std", feature_std)

    def add_constant(self, name, value):
        """A weight that training leaves alone and that checkpoints hold."""
        constant = lambda shape, dtype: tf.constant(value, dtype, shape)  # noqa: E731
        return self.add_weight(shape=np.shape(value), initializer=constant, trainable=False, name=name)

    def call(self, features, dropout_seed=None):
        features = channel_dropout(features, self.feature_mean, self.dropout, dropout_seed)  # (B, P, F)
        # W (x - mean) / std is computed as (W x - W mean) / std: D numbers are touched at each location instead of F.
        products = self.dense(features)  # (B, P, D)
        mean = tf.matmul(self.feature_mean[tf.newaxis], self.dense.kernel)  # (1, D)
        return tf.nn.relu(products / self.feature_std + (self.bias - mean / self.feature_std))  # (B, P, D)


class BahdanauAttention(layers.Layer):
    """Soft attention over the locations (section 4.2), with the additive score of Bahdanau et al., 2014.

    Args:
      units: int, U.
      precision: Keras dtype policy of `key_layer`.

    Call:
      encoded_features: float (B, P, D)
      keys: float (B, P, U), from `key_layer`; they do not depend on the word
      hidden: float (B, U)

    Returns:
      context_vector: float (B, D), the mean of the locations, weighted by attention (equation 13)
      attention_weights: float (B, P, 1), summing to 1 over the locations (equation 5)
    """

    def __init__(self, units, precision="float32"):
        super().__init__()
        # The score's hidden layer in two parts: keys from the image, and a query from the decoder. One bias is enough.
        self.key_layer = MixedPrecisionDense(units, precision, use_bias=False)
        self.query_layer = layers.Dense(units)
        self.score_layer = MixedPrecisionDense(1, use_bias=False)  # softmax would undo a bias

    def call(self, encoded_features, keys, hidden):
        query = self.query_layer(hidden)  # (B, U)
        score = self.score_layer(tf.tanh(keys + query[:, tf.newaxis]))  # (B, P, 1), equation 4
        attention_weights = tf.nn.softmax(score, axis=1)  # (B, P, 1)
        # A weighted mean and not a choice of one location ("hard" attention), so that gradients reach the weights.
        context_vector = tf.matmul(attention_weights, encoded_features, transpose_a=True)[:, 0]  # (B, D)
        return context_vector, attention_weights


class RNN_Decoder(keras.Model):
    """Says one word after the other, looking at the image anew for each (section 3.1.2, with a GRU).

    Args:
      vocab_size: int, V.
      embedding_dim: int, E.
      units: int, U.
      dropout: float, share of embeddings and of hidden states before the output layer that training drops.
      precision: Keras dtype policy of the large products; all else is float32.

    Call, one step:
      words: int (B, 1), the previous word of each caption
      encoded_features: float (B, P, D)
      hidden: float (B, U)
      keys: float (B, P, U), from `attention.key_layer`; computed here if not given

    Returns:
      logits: float (B, V)
      hidden: float (B, U)
      attention_weights: float (B, P, 1)
    """

    def __init__(self, vocab_size, embedding_dim, units, dropout=0.0, precision="float32"):
        super().__init__()
        self.dropout = dropout
        self.embedding = layers.Embedding(vocab_size, embedding_dim)
        self.attention = BahdanauAttention(units, precision)
        self.initial_layer = layers.Dense(units, activation="tanh")
        # A GRU's input here is [word, context]. Its kernel is in two parts, as the words' part is known beforehand.
        self.word_gates = MixedPrecisionDense(3 * units, precision)
        self.context_gates = layers.Dense(3 * units, use_bias=False)
        # Orthogonal, as in Keras's GRU: a product that is taken at each word should neither grow nor vanish.
        self.hidden_gates = layers.Dense(3 * units, kernel_initializer="orthogonal")
        self.output_layer = MixedPrecisionDense(vocab_size, precision)
        self.detector = WordDetector(vocab_size, precision)  # says where words are seen; no step uses it

    def initial_hidden(self, encoded_features):
        """The first hidden state, from the mean feature (section 3.1.2). float (B, P, D) -> (B, U)."""
        return self.initial_layer(tf.reduce_mean(encoded_features, axis=1))  # (B, U)

    def call(self, words, encoded_features, hidden, keys=None):
        keys = self.attention.key_layer(encoded_features) if keys is None else keys  # (B, P, U)
        word_gates = self.word_gates(self.embedding(words[:, 0]))  # (B, 3U)
        hidden, attention_weights = self.step(word_gates, hidden, encoded_features, keys)
        return self.output_layer(hidden), hidden, attention_weights  # (B, V), (B, U), (B, P, 1)

    def step(self, word_gates, hidden, encoded_features, keys):
        """Attention, then the GRU. Returns the new hidden (B, U), attention_weights (B, P, 1)."""
        # Training, decoding and evidence all call this, so an edit here changes them together.
        context_vector, attention_weights = self.attention(encoded_features, keys, hidden)
        return self.gru(word_gates, context_vector, hidden), attention_weights

    def gru(self, word_gates, context_vector, hidden):
        """The GRU as Keras has it (reset_after). float (B, 3U), (B, D), (B, U) -> new hidden (B, U)."""
        x_update, x_reset, x_new = tf.split(word_gates + self.context_gates(context_vector), 3, axis=1)  # (B, U) each
        h_update, h_reset, h_new = tf.split(self.hidden_gates(hidden), 3, axis=1)  # (B, U) each
        # The reset gate decides how much of the past goes into the new state, the update gate how much of it stays.
        update = tf.sigmoid(x_update + h_update)
        new = tf.tanh(x_new + tf.sigmoid(x_reset + h_reset) * h_new)
        return update * hidden + (1 - update) * new

    def teacher_forcing(self, captions, encoded_features, dropout_seed=None):
        """Predict each word from the true words before it. Only attention and GRU go word by word.

        Args:
          captions: int (B, T), <start>, words, <end>, then <pad>
          encoded_features: float (B, P, D)
          dropout_seed: int (2,), or None for no dropout.

        Returns:
          logits: float (N, V), for the N `target_words` of the captions
          attention_weights: float (B, T-1, P), of no meaning where the caption has ended
        """
        # Words come first, as the loop goes from word to word. The last one has no word to predict.
        words = tf.transpose(captions)  # (T, B)
        embedded = variational_dropout(self.embedding(words[:-1]), self.dropout, dropout_seed, layer=0)  # (T-1, B, E)
        # What needs no hidden state is computed for all words at once: a large product is faster than many small ones.
        word_gates = self.word_gates(embedded)  # (T-1, B, 3U)
        keys = self.attention.key_layer(encoded_features)  # (B, P, U)

        def one_word(before, word_gates):
            hidden, attention_weights = self.step(word_gates, before[0], encoded_features, keys)
            return hidden, attention_weights[:, :, 0]  # (B, U), (B, P)

        # The zeros only tell the loop the shape of attention weights; no word reads those of the word before.
        before = self.initial_hidden(encoded_features), tf.zeros(tf.shape(encoded_features)[:2])  # (B, U), (B, P)
        all_hidden, all_weights = tf.scan(one_word, word_gates, before)  # (T-1, B, U), (T-1, B, P)
        all_hidden = variational_dropout(all_hidden, self.dropout, dropout_seed, layer=1)  # (T-1, B, U)
        # V is the largest size here, so nothing is spent on <pad>.
        logits = self.output_layer(tf.boolean_mask(all_hidden, words[1:] != PAD))  # (N, V)
        return logits, tf.transpose(all_weights, (1, 0, 2))  # (N, V), (B, T-1, P)


def build_captioner(config, vocab_size, feature_mean, feature_std=1.0, precision="float32"):
    """Encoder and decoder, a CNN_Encoder and an RNN_Decoder, with all their weights drawn from `config.seed`.

    Args:
      vocab_size: int, V.
      feature_mean: float (F,), and feature_std: float, what normalises the features. A checkpoint that is restored
        brings its own.
      precision: Keras dtype policy of the large products; weights are float32.
    """
    keras.utils.set_random_seed(config.seed)
    # Keras makes weights at the first call. All are made here, in one order, so that a seed gives the same ones.
    encoder = CNN_Encoder(config.encoder_dim, feature_mean, feature_std, precision, config.feature_dropout)
    sizes = vocab_size, config.embedding_dim, config.units
    decoder = RNN_Decoder(*sizes, config.dropout, precision)
    encoded_features = encoder(tf.zeros((1, 1, len(feature_mean))))  # (1, 1, D): weights depend on no P
    decoder.detector.build(encoded_features.shape)
    decoder(tf.zeros((1, 1), tf.int32), encoded_features, decoder.initial_hidden(encoded_features))
    return encoder, decoder


def target_words(captions):
    """The first word behind <start> of each caption, then the second of each, and so on to <end>.

    int (B, T) -> int (N,), in the order of the logits of `teacher_forcing`.
    """
    words = tf.transpose(captions[:, 1:])  # (T-1, B)
    return tf.boolean_mask(words, words != PAD)  # (N,)


def caption_loss(captions, logits):
    """Cross-entropy of the words, averaged over real tokens only.

    Args:
      captions: int (B, T)
      logits: float (N, V), for each of `target_words`

    Returns: float (), nats per token; <end> counts, <pad> does not. 0 where there is no token.
    """
    # Every word counts the same, whether its caption is short or long.
    losses = softmax_cross_entropy(logits, target_words(captions))  # (N,)
    return tf.math.divide_no_nan(tf.reduce_sum(losses), tf.cast(tf.size(losses), losses.dtype))


def attention_loss(captions, attention_weights):
    """The doubly stochastic term (equation 14): over a caption, each location should get as much attention as others.

    Args:
      captions: int (B, T)
      attention_weights: float (B, T-1, P)

    Returns:
      float (): mean over captions and locations of (1 - the sum over words of attention)^2. The paper sums over the
      locations. A row of <pad> alone is no caption.
    """
    # Each word's weights sum to 1 over the locations. Here they are pressed to sum to 1 over the words too. Without
    # this, maps hardly point better than a uniform one (see docs/measurements.md).
    is_target = tf.cast(captions[:, 1:] != PAD, attention_weights.dtype)  # (B, T-1)
    attention_sums = tf.einsum("btp,bt->bp", attention_weights, is_target)  # (B, P)
    is_caption = tf.reduce_max(is_target, axis=1)  # (B,)
    losses = tf.reduce_mean(tf.square(1.0 - attention_sums), axis=1)  # (B,)
    return tf.math.divide_no_nan(tf.reduce_sum(losses * is_caption), tf.reduce_sum(is_caption))


def greedy_decode(encoder, decoder, features, max_words, repeat_block=0):
    """Say the likeliest word, then the likeliest after it, until <end> or `max_words` words.

    Args:
      features: float (B, P, F)
      repeat_block: int, no sequence of so many words is said twice; 0 for no such rule.

    Returns: DecodedCaptions
    """
    encoded_features = encoder(features)  # (B, P, D)
    keys = decoder.attention.key_layer(encoded_features)  # (B, P, U)

    def one_word(words, log_probs, attention_weights, hidden):
        # Unlike in training, the word before is the model's own.
        logits, hidden, weights = decoder(words[:, -1:], encoded_features, hidden, keys)
        candidates = next_word_log_probs(logits, words, repeat_block)  # (B, V)
        # A caption that has ended waits for the others of its batch, and says <pad>.
        ended = has_ended(words)  # (B,)
        word = tf.where(ended, PAD, tf.argmax(candidates, axis=1, output_type=tf.int32))  # (B,)
        log_prob = tf.where(ended, 0.0, tf.reduce_max(candidates, axis=1))  # (B,)
        words = tf.concat((words, word[:, tf.newaxis]), 1)  # (B, t + 2)
        log_probs = tf.concat((log_probs, log_prob[:, tf.newaxis]), 1)  # (B, t + 1)
        return words, log_probs, tf.concat((attention_weights, tf.transpose(weights, (0, 2, 1))), 1), hidden

    B, P, hidden = tf.shape(features)[0], features.shape[1], decoder.initial_hidden(encoded_features)
    state = tf.fill((B, 1), START), tf.zeros((B, 0)), tf.zeros((B, 0, P)), hidden
    # These tensors grow by a word at each turn, which a loop in a graph must be told.
    shapes = tuple(map(tf.TensorShape, ((None, None), (None, None), (None, None, P), (None, hidden.shape[1]))))
    running = lambda words, *_: ~tf.reduce_all(has_ended(words))  # noqa: E731
    words, *found, _ = tf.while_loop(running, one_word, state, shapes, maximum_iterations=max_words)
    return DecodedCaptions(words[:, 1:], *found)  # (B, L), (B, L), (B, L, P)


def print_shapes(batch=16):
    """Print what goes in and comes out at the defaults, read off the tensors themselves."""
    P, F = 64, 2048  # InceptionV3's
    encoder, decoder = build_captioner(Config(), Config().vocab_size, np.zeros(F, np.float32))
    features, words = tf.zeros((batch, P, F)), tf.fill((batch, 1), START)
    encoded_features = encoder(features)
    hidden = decoder.initial_hidden(encoded_features)
    logits, new_hidden, attention_weights = decoder(words, encoded_features, hidden)
    print(f"CNN_Encoder\n  in   features {features.shape}\n  out  encoded_features {encoded_features.shape}")
    print(f"RNN_Decoder\n  in   words {words.shape}, encoded_features {encoded_features.shape}, hidden {hidden.shape}")
    print(f"  out  logits {logits.shape}, hidden {new_hidden.shape}, attention_weights {attention_weights.shape}")


if __name__ == "__main__":
    print_shapes()
