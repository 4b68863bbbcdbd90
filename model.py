"""The captioner of Show, Attend and Tell (Xu et al., 2015, arXiv 1502.03044), with soft attention and a GRU.

Letters of every shape in this project:
  B batch              D encoded feature     V vocabulary
  T caption length     E word embedding      K beam width
  P locations (64)     U GRU and attention units
  F feature (2048)

`python model.py` prints the shapes at the defaults.
"""

from config import Config
from data_utils import CHANNELS, END, LOCATIONS, PAD, START, UNK
from recurrence import attend, gru, say_words

import keras
import numpy as np
import tensorflow as tf
from keras import layers


class Product(layers.Dense):
    """A Dense layer that multiplies in the precision of a Keras dtype policy; all else in it is float32."""

    def __init__(self, units, precision, **options):
        super().__init__(units, autocast=False, **options)
        self.product_type = keras.DTypePolicy(precision).compute_dtype

    def call(self, inputs):
        inputs, kernel = (tf.cast(x, self.product_type) for x in (inputs, self.kernel))
        outputs = tf.cast(tf.tensordot(inputs, kernel, 1), tf.float32)  # (..., units)
        return tf.nn.bias_add(outputs, self.bias) if self.use_bias else outputs


class CNN_Encoder(keras.Model):
    """Encodes each location's InceptionV3 feature: Dense and ReLU over the 64 locations.

    Args:
      encoder_dim: int, D.
      feature_mean: float (F,), what is subtracted from features, each channel's mean.
      feature_std: float, what they are then divided by, so that nothing depends on their scale.
      precision: Keras dtype policy of the large product.

    Call:
      features: float (B, P, F)

    Returns:
      encoded_features: float (B, P, D)
    """

    def __init__(self, encoder_dim, feature_mean, feature_std, precision="float32"):
        super().__init__(autocast=False)  # `product` casts: Keras would to float32 first
        self.product = Product(encoder_dim, precision, use_bias=False)
        self.bias = self.add_weight(shape=(encoder_dim,), initializer="zeros", name="bias")
        self.feature_mean = self.keep("feature_mean", feature_mean)
        self.feature_std = self.keep("feature_std", feature_std)

    def keep(self, name, value):
        """A weight that training leaves alone and checkpoints hold."""
        constant = lambda shape, dtype: tf.constant(value, dtype, shape)  # noqa: E731
        return self.add_weight(shape=np.shape(value), initializer=constant, trainable=False, name=name)

    def call(self, features):
        # Normalised behind the product, which is the same and touches 8 times fewer numbers.
        products = self.product(features)  # (B, P, D)
        mean = tf.matmul(self.feature_mean[tf.newaxis], self.product.kernel)  # (1, D)
        return tf.nn.relu(products / self.feature_std + (self.bias - mean / self.feature_std))  # (B, P, D)


class BahdanauAttention(layers.Layer):
    """Additive attention over the locations (section 4.2; Bahdanau et al., 2014).

    Args:
      units: int, U.
      precision: Keras dtype policy of `make_keys`.

    Call:
      encoded_features: float (B, P, D)
      keys: float (B, P, U), from `make_keys`, which does not depend on the word
      hidden: float (B, U)

    Returns:
      context_vector: float (B, D), the locations' mean weighted by attention
      attention_weights: float (B, P, 1), summing to 1 over the locations
    """

    def __init__(self, units, precision="float32"):
        super().__init__()
        self.make_keys = Product(units, precision, use_bias=False)
        self.make_query = layers.Dense(units)
        self.make_score = layers.Dense(1, use_bias=False)  # softmax would undo a bias
        self.make_score.build((None, units))

    def call(self, encoded_features, keys, hidden):
        query = self.make_query(hidden)  # (B, U)
        context_vector, attention_weights = attend(query, encoded_features, keys, self.make_score.kernel)
        return context_vector, attention_weights[:, :, tf.newaxis]  # (B, D), (B, P, 1)


class RNN_Decoder(keras.Model):
    """Says one word after the other, looking at the image anew for each (section 3.1.2, with a GRU).

    Args:
      vocab_size: int, V.
      embedding_dim: int, E.
      units: int, U.
      dropout: float, share of the embeddings and of the hidden states before the output layer dropped in training.
      precision: Keras dtype policy of the products over a whole caption and, where the recurrence is compiled, of its
        products with kernels; all else is float32.

    Call, one step:
      words: int (B, 1), the previous word of each caption
      encoded_features: float (B, P, D)
      hidden: float (B, U)
      keys: float (B, P, U), from `attention.make_keys`; computed here if not given

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
        self.make_hidden = layers.Dense(units, activation="tanh")
        # The GRU's input is [word, context]; its kernel is in two parts, as all words' part is known beforehand.
        self.word_gates = Product(3 * units, precision)
        self.context_gates = layers.Dense(3 * units, use_bias=False)
        self.hidden_gates = layers.Dense(3 * units, kernel_initializer="orthogonal")
        self.make_logits = Product(vocab_size, precision)

    def initial_hidden(self, encoded_features):
        """The first hidden state, from the mean feature (section 3.1.2). (B, P, D) -> (B, U)."""
        return self.make_hidden(tf.reduce_mean(encoded_features, axis=1))  # (B, U)

    def call(self, words, encoded_features, hidden, keys=None):
        if keys is None:
            keys = self.attention.make_keys(encoded_features)  # (B, P, U)
        word_gates = self.word_gates(self.embedding(words[:, 0]))  # (B, 3U)
        hidden, attention_weights = self.step(word_gates, encoded_features, keys, hidden)
        return self.make_logits(hidden), hidden, attention_weights  # (B, V), (B, U), (B, P, 1)

    def step(self, word_gates, encoded_features, keys, hidden):
        """Attention, then the GRU as Keras has it (reset_after). Returns hidden (B, U), attention_weights (B, P, 1)."""
        context_vector, attention_weights = self.attention(encoded_features, keys, hidden)
        input_gates = word_gates + self.context_gates(context_vector)  # (B, 3U)
        return gru(input_gates, self.hidden_gates(hidden), hidden), attention_weights

    def teach(self, captions, encoded_features, dropout_seed=None):
        """The teacher-forced pass: all words at once but for attention and GRU, which need the word before.

        Args:
          captions: int (B, T), <start>, words, <end>, then <pad>.
          encoded_features: float (B, P, D)
          dropout_seed: int (2,), or None for no dropout.

        Returns:
          logits: float (N, V), for the N `words_to_say` of the captions
          attention_weights: float (B, T-1, P), of no meaning where the caption has ended
        """
        words = tf.transpose(captions)  # (T, B)
        to_say = words[1:] != PAD  # (T-1, B)
        embedded = self.drop(self.embedding(words[:-1]), dropout_seed, 0)  # (T-1, B, E)
        word_gates = self.word_gates(embedded)  # (T-1, B, 3U)
        lengths = tf.reduce_sum(tf.cast(to_say, tf.int32), axis=0)  # (B,)
        keys = self.attention.make_keys(encoded_features)  # (B, P, U)
        hidden = self.initial_hidden(encoded_features)  # (B, U)
        inside = self.attention.make_query, self.attention.make_score, self.context_gates, self.hidden_gates
        kernels = [tf.convert_to_tensor(layer.kernel) for layer in inside]
        biases = [layer.bias for layer in (self.attention.make_query, self.hidden_gates)]
        inputs = word_gates, lengths, hidden, encoded_features, keys, *kernels, *biases
        all_hidden, all_weights = say_words(*inputs, self.word_gates.product_type)  # (T-1, B, U), (T-1, B, P)
        all_hidden = self.drop(all_hidden, dropout_seed, 1)  # (T-1, B, U)
        logits = self.make_logits(tf.boolean_mask(all_hidden, to_say))  # (N, V)
        return logits, tf.transpose(all_weights, (1, 0, 2))  # (N, V), (B, T-1, P)

    def drop(self, x, seed, place):
        """Dropout of the same numbers at all words of a caption (Gal and Ghahramani, 2016).

        Its mask depends on nothing but `seed` and `place`, so that a resumed run draws the same. Several replicas draw
        that of the whole batch, each taking its rows, so that their number does not matter.

        Args:
          x: float (T, B, n)
        """
        if seed is None or not self.dropout:
            return x
        replica, (rows, size) = tf.distribute.get_replica_context(), tf.unstack(tf.shape(x)[1:])
        shape = rows * replica.num_replicas_in_sync, size
        drawn = tf.random.stateless_uniform(shape, tf.stack((seed[0], 2 * seed[1] + place)))
        kept = drawn[replica.replica_id_in_sync_group :: replica.num_replicas_in_sync] >= self.dropout  # (B, n)
        return x * (tf.cast(kept, x.dtype) / (1 - self.dropout))  # (T, B, n)


def build_captioner(config, vocab_size, feature_mean=None, feature_std=1.0, precision="float32"):
    """Encoder and decoder with all their weights, drawn from `config.seed`.

    Args:
      vocab_size: int, V.
      feature_mean, feature_std: what normalises the features; a checkpoint that is restored brings its own.
      precision: Keras dtype policy of the large products; the weights are float32 whatever it is.

    Returns:
      (CNN_Encoder, RNN_Decoder)
    """
    keras.utils.set_random_seed(config.seed)
    mean = np.zeros(CHANNELS, np.float32) if feature_mean is None else feature_mean
    encoder = CNN_Encoder(config.encoder_dim, mean, feature_std, precision)
    decoder = RNN_Decoder(vocab_size, config.embedding_dim, config.units, config.dropout, precision)
    encoded_features = encoder(tf.zeros((1, LOCATIONS, CHANNELS)))
    decoder(tf.zeros((1, 1), tf.int32), encoded_features, decoder.initial_hidden(encoded_features))
    return encoder, decoder


def words_to_say(captions):
    """Each caption's first word behind <start>, then each one's second, and so on to <end>. int (B, T) -> int (N,)."""
    words = tf.transpose(captions[:, 1:])  # (T-1, B)
    return tf.boolean_mask(words, words != PAD)  # (N,)


def caption_loss(captions, logits):
    """Cross-entropy of the words, averaged over real tokens only.

    Args:
      captions: int (B, T)
      logits: float (N, V), for each of `words_to_say`

    Returns:
      float (): nats per token; <end> counts, <pad> does not. 0 where there is no token.
    """
    losses = word_losses(logits, words_to_say(captions))  # (N,)
    return tf.math.divide_no_nan(tf.reduce_sum(losses), tf.cast(tf.size(losses), losses.dtype))


@tf.custom_gradient
def word_losses(logits, words):
    """Cross-entropy of each word in nats; on a CPU three times as fast as TensorFlow's own, which does not use oneDNN.

    Args:
      logits: float (N, V)
      words: int (N,)

    Returns:
      float (N,)
    """
    probabilities = tf.nn.softmax(logits)  # (N, V)
    places = tf.stack((tf.range(tf.size(words), dtype=words.dtype), words), axis=1)  # (N, 2)
    # That of the likeliest word: the word's own may be too small for a float.
    log_probability = tf.math.log(tf.reduce_max(probabilities, axis=1))  # (N,)
    losses = tf.reduce_max(logits, axis=1) - log_probability - tf.gather_nd(logits, places)  # (N,)

    def gradient(d_losses):
        return tf.tensor_scatter_nd_sub(probabilities * d_losses[:, tf.newaxis], places, d_losses), None  # (N, V)

    return losses, gradient


def attention_loss(captions, attention_weights):
    """The doubly stochastic term (equation 14): each location should be looked at as much as the others in all.

    Args:
      captions: int (B, T)
      attention_weights: float (B, T-1, P)

    Returns:
      float (): the mean over captions and locations of (1 - the sum over words of attention)^2. The paper sums over
      the locations; as a mean, its weight does not depend on their number. A row of <pad> alone is no caption.
    """
    real = tf.cast(captions[:, 1:] != PAD, attention_weights.dtype)  # (B, T-1)
    looked = tf.einsum("btp,bt->bp", attention_weights, real)  # (B, P)
    captioned = tf.reduce_max(real, axis=1)  # (B,)
    losses = tf.reduce_mean(tf.square(1.0 - looked), axis=1)  # (B,)
    return tf.math.divide_no_nan(tf.reduce_sum(losses * captioned), tf.reduce_sum(captioned))


def decode_captions(encoder, decoder, features, max_words, beam_width=1, length_penalty=0.0, repeat_block=0):
    """Beam search for the likeliest caption, as one graph over the batch; a width of 1 is greedy decoding.

    A beam that says <end> keeps its place to the last; the others go on until they end or have `max_words` words.
    Of an image's ended beams (of all, where none has ended) the one of the highest log-probability divided by
    length ** length_penalty is taken. <pad>, <unk> and <start> are never said.

    Args:
      features: float (B, P, F)
      max_words: int, the most words of a caption.
      beam_width: int, K.
      length_penalty: float, 0 for plain log-probabilities, which favour short captions; 1 for their mean per word.
      repeat_block: int, no sequence of so many words is said twice; 0 for no such rule.

    Returns:
      words: int (B, L), each caption's word ids with <end>, then <pad>; L is the longest beam's length
      log_probabilities: float (B,), natural logarithm of each caption's probability
      attention_weights: float (B, L, P), along the winning beam
    """
    vocab_size = decoder.make_logits.units
    never = -1e9 * tf.reduce_sum(tf.one_hot((PAD, UNK, START), vocab_size), 0)  # (V,)
    encoded_features = encoder(features)  # (B, P, D)
    keys = decoder.attention.make_keys(encoded_features)  # (B, P, U)
    hidden = decoder.initial_hidden(encoded_features)  # (B, U)
    encoded_features, keys, hidden = (
        tf.repeat(x, beam_width, 0) for x in (encoded_features, keys, hidden)
    )  # (BK, ...)

    def one_step(t, total, hidden, words, weights):
        logits, hidden, looked = decoder(tf.reshape(words[:, :, -1], (-1, 1)), encoded_features, hidden, keys)
        gains = tf.nn.log_softmax(logits) + never  # (BK, V)
        if repeat_block:
            gains = without_repeats(gains, tf.reshape(words, (-1, t + 1)), repeat_block)  # (BK, V)
        gains = tf.reshape(gains, (-1, beam_width, vocab_size))  # (B, K, V)
        ended = has_ended(words)[:, :, tf.newaxis]  # (B, K, 1)
        is_pad = tf.range(vocab_size) == PAD  # (V,)
        # What an ended beam goes on to say is <pad>, which ranks above all that a running one can say (at most 0).
        candidates = total[:, :, tf.newaxis] + tf.where(ended, 0.0, gains)  # (B, K, V)
        ranks = tf.where(ended, tf.where(is_pad, 1.0, -tf.float32.max), candidates)  # (B, K, V)
        best = tf.math.top_k(tf.reshape(ranks, (-1, beam_width * vocab_size)), beam_width).indices  # (B, K)
        total = tf.gather(tf.reshape(candidates, (-1, beam_width * vocab_size)), best, batch_dims=1)  # (B, K)
        beam, word = best // vocab_size, best % vocab_size  # (B, K)
        looked = tf.reshape(looked, (-1, beam_width, 1, LOCATIONS))  # (B, K, 1, P)
        hidden = tf.gather(tf.reshape(hidden, (-1, beam_width, hidden.shape[-1])), beam, batch_dims=1)  # (B, K, U)
        words = tf.concat((tf.gather(words, beam, batch_dims=1), word[:, :, tf.newaxis]), -1)  # (B, K, t + 2)
        weights = tf.gather(tf.concat((weights, looked), 2), beam, batch_dims=1)  # (B, K, t + 1, P)
        return t + 1, total, tf.reshape(hidden, (-1, hidden.shape[-1])), words, weights

    batch = tf.shape(features)[0]
    total = tf.tile([[0.0] + [-1e6] * (beam_width - 1)], (batch, 1))  # (B, K): all beams begin alike, so one begins
    words = tf.fill((batch, beam_width, 1), START)
    weights = tf.zeros((batch, beam_width, 0, LOCATIONS))
    _, total, _, words, weights = tf.while_loop(
        lambda t, total, hidden, words, weights: ~tf.reduce_all(has_ended(words)),
        one_step,
        (0, total, hidden, words, weights),
        shape_invariants=(
            tf.TensorShape(()),
            tf.TensorShape((None, beam_width)),
            tf.TensorShape((None, hidden.shape[-1])),
            tf.TensorShape((None, beam_width, None)),
            tf.TensorShape((None, beam_width, None, LOCATIONS)),
        ),
        maximum_iterations=max_words,
    )
    ended = has_ended(words)  # (B, K)
    eligible = ended | ~tf.reduce_any(ended, axis=1, keepdims=True)  # (B, K)
    lengths = tf.reduce_sum(tf.cast(words != PAD, tf.float32), axis=2) - 1  # (B, K), without <start>
    best = tf.argmax(tf.where(eligible, total / lengths**length_penalty, -tf.float32.max), axis=1)  # (B,)
    words, total, weights = (tf.gather(x, best, batch_dims=1) for x in (words, total, weights))
    return words[:, 1:], total, weights  # (B, L), (B,), (B, L, P)


def without_repeats(gains, words, length):
    """Bar the words that would say a sequence of `length` words for the second time.

    Args:
      gains: float (N, V), log-probabilities of the next word.
      words: int (N, T), what has been said.

    Returns:
      float (N, V)
    """
    words = tf.pad(words, ((0, 0), (length, 0)))  # (N, length + T): long enough for what follows, however short
    count = tf.shape(words)[1] - length + 1
    same = tf.ones_like(words[:, :count], tf.bool)  # (N, count)
    for i in range(length - 1):
        same &= words[:, i : i + count] == words[:, i - length + 1, tf.newaxis]  # (N, count)
    barred = tf.where(same, words[:, length - 1 :], PAD)  # (N, count): <pad> is barred anyway
    rows = tf.repeat(tf.range(tf.shape(words)[0])[:, tf.newaxis], count, 1)  # (N, count)
    return tf.tensor_scatter_nd_min(gains, tf.stack((rows, barred), -1), tf.fill(tf.shape(rows), -1e9))


def has_ended(words):
    """Whether each caption's last word is <end> or comes after it. int (..., T) -> bool (...)."""
    return (words[..., -1] == END) | (words[..., -1] == PAD)


def print_shapes(batch=16):
    """Print what goes in and comes out at the defaults, read off the tensors themselves."""
    config = Config()
    encoder, decoder = build_captioner(config, config.vocab_size)
    features = tf.zeros((batch, LOCATIONS, CHANNELS))
    encoded_features = encoder(features)
    words = tf.fill((batch, 1), START)
    hidden = decoder.initial_hidden(encoded_features)
    logits, new_hidden, attention_weights = decoder(words, encoded_features, hidden)
    print("CNN_Encoder")
    print(f"  in   features {tuple(features.shape)}")
    print(f"  out  encoded features {tuple(encoded_features.shape)}")
    print("RNN_Decoder, one step")
    print(f"  in   words {tuple(words.shape)}, encoded features {tuple(encoded_features.shape)}, ", end="")
    print(f"hidden {tuple(hidden.shape)}")
    print(f"  out  logits {tuple(logits.shape)}, hidden {tuple(new_hidden.shape)}, ", end="")
    print(f"attention_weights {tuple(attention_weights.shape)}")


if __name__ == "__main__":
    print_shapes()
