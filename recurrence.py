"""The decoder's recurrence: what is computed at one word, and all words of given captions as one compiled loop.

Letters as in model.py. TensorFlow's own gradient of such a loop keeps (B, P, U) numbers for every word and adds up all
weights' gradients at every word; the one here computes attention anew, and the weights' gradients once, at the end.
"""

import functools
import os

import tensorflow as tf

# The loops are compiled with room for a multiple of so many words, so that a few of them serve captions of any length.
ROOM = 16

# XLA compiles the loops for the CPU; for a GPU it needs parts of CUDA that many installations of TensorFlow lack. Of
# several workers none compiles, as a compiled loop holds up the exchange of the gradients that are ready.
COMPILE = not tf.config.list_physical_devices("GPU") and "TF_CONFIG" not in os.environ


def attend(query, encoded_features, keys, score_kernel):
    """Soft attention over the locations (section 4.2), with the additive score of Bahdanau et al., 2014.

    Args:
      query: float (B, U)
      encoded_features: float (B, P, D)
      keys: float (B, P, U)
      score_kernel: float (U, 1)

    Returns:
      context_vector: float (B, D), the locations' mean weighted by attention
      attention_weights: float (B, P), summing to 1 over the locations
    """
    tanh = tf.tanh(keys + query[:, tf.newaxis])  # (B, P, U)
    score = tf.reshape(tf.matmul(tf.reshape(tanh, (-1, tanh.shape[-1])), score_kernel), tf.shape(tanh)[:2])  # (B, P)
    attention_weights = tf.nn.softmax(score)  # (B, P)
    context_vector = tf.matmul(attention_weights[:, tf.newaxis], encoded_features)[:, 0]  # (B, D)
    return context_vector, attention_weights


def gru(input_gates, hidden_gates, hidden):
    """The GRU as Keras has it (reset_after), behind its products. float (B, 3U), (B, 3U), (B, U) -> (B, U)."""
    x_update, x_reset, x_new = tf.split(input_gates, 3, axis=-1)  # (B, U) each
    h_update, h_reset, h_new = tf.split(hidden_gates, 3, axis=-1)  # (B, U) each
    update = tf.sigmoid(x_update + h_update)
    new = tf.tanh(x_new + tf.sigmoid(x_reset + h_reset) * h_new)
    return update * hidden + (1 - update) * new


def say_words(
    word_gates,
    lengths,
    hidden,
    encoded_features,
    keys,
    query_kernel,
    score_kernel,
    context_kernel,
    hidden_kernel,
    query_bias,
    hidden_bias,
    product_type="float32",
):
    """Attention and GRU over the given words of each caption.

    The first half of the rows is for the longer captions: when all others have ended, these alone go on. Captions may
    come in any order, but other orders cost more.

    Args:
      word_gates: float (T, B, 3U), the words' part of the GRU's input gates.
      lengths: int (B,), how many words of each caption are to be said, T at the most. What is returned for words behind
        them is of no use.
      hidden: float (B, U), before the first word.
      encoded_features: float (B, P, D)
      keys: float (B, P, U)
      query_kernel, score_kernel: float (U, U) and (U, 1), of the attention.
      context_kernel: float (D, 3U), makes the context vector's part of the GRU's input gates.
      hidden_kernel: float (U, 3U), makes the GRU's hidden gates.
      query_bias, hidden_bias: float (U,) and (3U,), of query and hidden gates.
      product_type: number type of the products with kernels and of those that make the kernels' gradients; all else is
        in float32. Where the loops are not compiled, only of the latter.

    Returns:
      all_hidden: float (T, B, U), after each word
      all_weights: float (T, B, P), attention_weights at each word
    """

    @tf.custom_gradient
    def say(*inputs):
        # TensorFlow need not prepare to differentiate what follows, and outside of a graph it could not.
        inputs = [tf.stop_gradient(x) for x in inputs]
        word_gates, hidden, encoded_features, keys, state_kernel, state_bias, score_kernel, context_kernel = inputs
        words = tf.shape(word_gates)[0]
        ends = tf.maximum(tf.reduce_max(lengths[half(tf.size(lengths)) :]), 0), words  # B may be 1
        image = encoded_features, keys, score_kernel
        kernels = [
            tf.cast(kernel, product_type if COMPILE else tf.float32) for kernel in (state_kernel, context_kernel)
        ]
        states, weights, contexts, input_gates, projected = forward_loop(
            *ends, with_room(word_gates), hidden, *image, state_bias, *kernels
        )

        def gradient(d_states, d_weights):
            before = tf.concat((hidden[tf.newaxis], states[:-1]), 0)  # (T', B, U)
            d_hidden, d_keys, d_score_kernel, *by_word = backward_loop(
                *ends,
                with_room(d_states),
                with_room(d_weights),
                before,
                weights,
                input_gates,
                projected,
                *image,
                *map(tf.transpose, kernels),  # a product with the transposed is several times slower, at every word
            )
            d_gates, d_projected, d_contexts = (x[:words] for x in by_word)  # (T, B, ...)
            return (
                d_gates,
                d_hidden,
                tf.einsum("tbp,tbd->bpd", weights[:words], d_contexts),  # (B, P, D)
                d_keys,
                kernel_gradient(before[:words], d_projected, product_type),  # (U, 4U)
                tf.reduce_sum(d_projected, (0, 1)),  # (4U,)
                d_score_kernel,
                kernel_gradient(contexts[:words], d_gates, product_type),  # (D, 3U)
            )

        return (states[:words], weights[:words]), gradient

    state_kernel = tf.concat((query_kernel, hidden_kernel), 1)  # (U, 4U): all that the hidden state is multiplied with
    state_bias = tf.concat((query_bias, hidden_bias), 0)  # (4U,)
    return say(word_gates, hidden, encoded_features, keys, state_kernel, state_bias, score_kernel, context_kernel)


def kernel_gradient(inputs, d_outputs, product_type):
    """The gradient of a Dense layer's kernel, of all words in one product. (T, B, m), (T, B, n) -> float32 (m, n)."""
    inputs, d_outputs = (tf.cast(tf.reshape(x, (-1, x.shape[-1])), product_type) for x in (inputs, d_outputs))
    return tf.cast(tf.matmul(inputs, d_outputs, transpose_a=True), tf.float32)  # (m, n)


def with_room(x):
    """Zeros behind the last word. (T, ...) -> (T', ...), a multiple of ROOM."""
    return tf.pad(x, ((0, -tf.shape(x)[0] % ROOM), (0, 0), (0, 0)))


def product(x, kernel):
    """Multiplies in the number type of the kernel. (B, m), (m, n) -> float32 (B, n)."""
    return tf.matmul(tf.cast(x, kernel.dtype), kernel, output_type=tf.float32)


def split_product(x, kernel, parts):
    """`product` as the sum of `parts` products, which XLA can compute side by side."""
    return tf.add_n(list(map(product, tf.split(x, parts, 1), tf.split(kernel, parts))))


def half(rows):
    return (rows + 1) // 2


def fill_up(x, rows):
    """Rows of zeros behind. (b, ...) -> (B, ...)."""
    return tf.pad(x, ((0, rows - tf.shape(x)[0]), *[(0, 0)] * (x.shape.rank - 1)))


@tf.function(jit_compile=COMPILE)
def forward_loop(
    both, words, word_gates, hidden, encoded_features, keys, score_kernel, state_bias, state_kernel, context_kernel
):
    """The first `both` of T' words for all rows, then up to `words` for the first half.

    Returns, for each word, what the backward loop needs, 0 where nothing is said:
      hidden (T', B, U) after each word, attention_weights (T', B, P), context_vector (T', B, D), input_gates
      (T', B, 3U), and [query, hidden gates] (T', B, 4U)
    """
    units = hidden.shape[-1]
    room, rows = tf.unstack(tf.shape(word_gates)[:2])

    def one_word(image, t, hidden, outputs):
        count = tf.shape(hidden)[0]  # b
        projected = product(hidden, state_kernel) + state_bias  # (b, 4U)
        query, hidden_gates = projected[:, :units], projected[:, units:]  # (b, U), (b, 3U)
        context_vector, attention_weights = attend(query, *image, score_kernel)  # (b, D), (b, P)
        input_gates = word_gates[t][:count] + product(context_vector, context_kernel)  # (b, 3U)
        hidden = gru(input_gates, hidden_gates, hidden)  # (b, U)
        results = hidden, attention_weights, context_vector, input_gates, projected
        outputs = [output.write(t, fill_up(x, rows)) for output, x in zip(outputs, results, strict=True)]
        return t + 1, hidden, outputs

    widths = units, keys.shape[1], encoded_features.shape[-1], 3 * units, 4 * units
    outputs = [tf.TensorArray(tf.float32, room, element_shape=(hidden.shape[0], width)) for width in widths]
    state = 0, hidden, outputs
    for count, end in (rows, both), (half(rows), words):
        body = functools.partial(one_word, (encoded_features[:count], keys[:count]))
        t, hidden, outputs = state
        state = tf.while_loop(lambda t, *_, end=end: t < end, body, (t, hidden[:count], outputs))
    return [output.stack() for output in state[-1]]


@tf.function(jit_compile=COMPILE)
def backward_loop(
    both,
    words,
    d_states,
    d_weights,
    before,
    weights,
    input_gates,
    projected,
    encoded_features,
    keys,
    score_kernel,
    state_kernel_transposed,
    context_kernel_transposed,
):
    """Gradients of forward_loop, from the last word to the first.

    Args:
      d_states, d_weights: float (T', B, U) and (T', B, P), the gradients of hidden states and attention weights.
      before: float (T', B, U), the hidden state before each word.
      weights: float (T', B, P), the attention weights at each word.

    Returns:
      the gradients of hidden (B, U), keys (B, P, U) and score_kernel (U, 1), and for each word those of input_gates
      (T', B, 3U), [query, hidden gates] (T', B, 4U) and context_vector (T', B, D)
    """
    units = before.shape[-1]
    room, rows = tf.unstack(tf.shape(before)[:2])

    def one_word(image, t, d_hidden, d_keys, d_score_kernel, outputs):
        encoded_features, keys = image  # (b, P, D), (b, P, U)
        count = tf.shape(keys)[0]  # b
        # projected[t, :count, units:] in one go is what XLA gets wrong, as t is not known to it.
        here = (x[t][:count] for x in (d_states, d_weights, before, weights, input_gates, projected))
        d_state, d_looked, hidden, looked, x_gates, query_and_gates = here  # (b, ...)
        query, hidden_gates = query_and_gates[:, :units], query_and_gates[:, units:]  # (b, U), (b, 3U)
        inputs = x_gates, hidden_gates, hidden
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            hidden = gru(*inputs)  # (b, U)
        d_input_gates, d_hidden_gates, d_before = tape.gradient(hidden, inputs, d_hidden + d_state)
        d_context = split_product(d_input_gates, context_kernel_transposed, 3)  # (b, D)
        # Attention differentiated by hand: TensorFlow's gradient would compute its score and softmax anew.
        d_looked += tf.linalg.matvec(encoded_features, d_context)  # (b, P)
        d_score = looked * (d_looked - tf.reduce_sum(looked * d_looked, axis=1, keepdims=True))  # (b, P)
        tanh = tf.tanh(keys + query[:, tf.newaxis])  # (b, P, U)
        d_keys += d_score[:, :, tf.newaxis] * (1 - tanh * tanh)  # (b, P, U), but for score_kernel
        # The same, summed over the locations, over which the sum of d_score is 0.
        d_query = -score_kernel[:, 0] * tf.reduce_sum(d_score[:, :, tf.newaxis] * (tanh * tanh), axis=1)  # (b, U)
        # A product for each row: the one over all rows XLA computes 20 times slower where they are few.
        d_score_kernel += tf.reduce_sum(tf.matmul(d_score[:, tf.newaxis], tanh), axis=0)  # (1, U)
        d_projected = tf.concat((d_query, d_hidden_gates), 1)  # (b, 4U)
        d_before += split_product(d_projected, state_kernel_transposed, 4)  # (b, U)
        results = d_input_gates, d_projected, d_context
        outputs = [output.write(t, fill_up(x, rows)) for output, x in zip(outputs, results, strict=True)]
        return t - 1, d_before, d_keys, d_score_kernel, outputs

    widths = 3 * units, 4 * units, encoded_features.shape[-1]
    outputs = [tf.TensorArray(tf.float32, room, element_shape=(before.shape[1], width)) for width in widths]
    none = tf.zeros((0, *before.shape[2:])), tf.zeros((0, *keys.shape[1:]))
    state = words - 1, *none, tf.zeros_like(tf.transpose(score_kernel)), outputs
    for count, begin in (half(rows), both), (rows, 0):
        body = functools.partial(one_word, (encoded_features[:count], keys[:count]))
        t, d_hidden, d_keys, d_score_kernel, outputs = state
        state = t, fill_up(d_hidden, count), fill_up(d_keys, count), d_score_kernel, outputs
        state = tf.while_loop(lambda t, *_, begin=begin: t >= begin, body, state)
    _, d_hidden, d_keys, d_score_kernel, outputs = state
    outputs = [output.stack() for output in outputs]
    return d_hidden, d_keys * score_kernel[:, 0], tf.transpose(d_score_kernel), *outputs
