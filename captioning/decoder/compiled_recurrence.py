"""The decoder's recurrence over given captions, compiled for CPUs, with a gradient of its own.

`compiled_unroll` takes the arguments of RNN_Decoder.unroll in model.py and returns the same. TensorFlow's gradient of
such a loop keeps (B, P, U) numbers for every word and adds up the gradients of all weights at every word. The one here
computes the attention anew and the gradients of the weights once, at the end. Letters of shapes as in model.py.
"""

import functools
from typing import NamedTuple

import tensorflow as tf

# The loops are compiled for lengths that are multiples of this, so that a few of them serve captions of all lengths.
LENGTH_BUCKET = 16


class Kernels(NamedTuple):
    """The weights that the recurrence uses at every word."""

    state: tf.Tensor  # (U, 4U), of the attention's query and of the GRU's hidden gates, side by side
    state_bias: tf.Tensor  # (4U,)
    score: tf.Tensor  # (U, 1), of the attention
    context: tf.Tensor  # (D, 3U), from the context vector to the GRU's input gates


class Image(NamedTuple):
    """What the attention looks at."""

    encoded_features: tf.Tensor  # (B, P, D)
    keys: tf.Tensor  # (B, P, U)

    def first(self, rows):
        return Image(self.encoded_features[:rows], self.keys[:rows])


class Steps(NamedTuple):
    """What the forward loop keeps of each word; the backward loop needs it all. 0 where a caption has ended."""

    hidden: tf.Tensor  # (T', B, U), after the word
    attention_weights: tf.Tensor  # (T', B, P)
    context_vector: tf.Tensor  # (T', B, D)
    input_gates: tf.Tensor  # (T', B, 3U)
    query_and_gates: tf.Tensor  # (T', B, 4U), the query and the hidden gates


def compiles_loops(config):
    """Whether the decoder's recurrence is compiled by XLA, as the setting `compile` says.

    With `auto` it is compiled on a CPU. For a GPU, XLA needs parts of CUDA that many installations lack. With several
    workers a compiled loop would hold up the exchange of gradients that are ready.
    """
    if config.compile == "auto":
        return not tf.config.list_physical_devices("GPU") and config.strategy != "multiworker"
    return config.compile == "on"


def decoder_kernels(decoder):
    """The Kernels of an RNN_Decoder."""
    attention = decoder.attention
    return Kernels(
        tf.concat((attention.query_layer.kernel, decoder.hidden_gates.kernel), 1),  # (U, 4U)
        tf.concat((attention.query_layer.bias, decoder.hidden_gates.bias), 0),  # (4U,)
        tf.convert_to_tensor(attention.score_layer.kernel),
        tf.convert_to_tensor(decoder.context_gates.kernel),
    )


def compiled_unroll(decoder, word_gates, lengths, hidden, encoded_features, keys):
    """Attention and GRU over the given words of each caption. With d for the gradient of the loss by a tensor:

      d_score = weights * (d_weights - sum(weights * d_weights)), where d_weights = encoded_features @ d_context
      d_keys = d_score * score_kernel * (1 - tanh(keys + query)^2), and d_query is its sum over the locations
      d_hidden before = d_hidden after through the GRU + [d_query, d_hidden_gates] @ state_kernel^T

    These are its backward pass, from the last word to the first. The first half of the rows is for the longer captions:
    when all others have ended, these alone go on. Captions may come in any order, but other orders cost more.

    Args:
      decoder: RNN_Decoder. Its products with kernels, and those that make the kernels' gradients, are computed in its
        `product_type`; all else is in float32.
      word_gates: float (T, B, 3U), the words' part of the GRU's input gates.
      lengths: int (B,), how many words of each caption are said, T at the most. What is returned for words behind them
        is of no use.
      hidden: float (B, U), before the first word.
      encoded_features: float (B, P, D)
      keys: float (B, P, U)

    Returns:
      all_hidden: float (T, B, U), after each word
      all_attention_weights: float (T, B, P), at each word
    """

    @tf.custom_gradient
    def unroll(*inputs):
        # TensorFlow need not prepare to differentiate what follows. Outside of a graph it could not.
        word_gates, hidden, *rest = map(tf.stop_gradient, inputs)
        image, kernels = Image(*rest[:2]), Kernels(*rest[2:])
        num_steps = tf.shape(word_gates)[0]  # T
        later_rows = lengths[first_half(tf.size(lengths)) :]  # none where B is 1
        ends = tf.maximum(tf.reduce_max(later_rows), 0), num_steps
        rounded = [tf.cast(kernel, decoder.product_type) for kernel in (kernels.state, kernels.context)]
        kernels = kernels._replace(state=rounded[0], context=rounded[1])
        steps = Steps(*forward_loop(*ends, pad_to_bucket(word_gates), hidden, image, kernels))

        def gradient(d_all_hidden, d_all_weights):
            previous = tf.concat((hidden[tf.newaxis], steps.hidden[:-1]), 0)  # (T', B, U)
            d_outputs = pad_to_bucket(d_all_hidden), pad_to_bucket(d_all_weights)
            # A product with a transposed kernel is several times slower, so kernels are transposed once.
            transposed = kernels._replace(state=tf.transpose(kernels.state), context=tf.transpose(kernels.context))
            d_hidden, d_keys, d_score, *by_step = backward_loop(*ends, *d_outputs, previous, steps, image, transposed)
            d_input_gates, d_query_and_gates, d_context = (x[:num_steps] for x in by_step)  # (T, B, ...)
            weights = steps.attention_weights[:num_steps]  # (T, B, P)
            return (
                d_input_gates,
                d_hidden,
                tf.einsum("tbp,tbd->bpd", weights, d_context),  # (B, P, D)
                d_keys,
                kernel_gradient(previous[:num_steps], d_query_and_gates, decoder.product_type),  # (U, 4U)
                tf.reduce_sum(d_query_and_gates, (0, 1)),  # (4U,)
                d_score,
                kernel_gradient(steps.context_vector[:num_steps], d_input_gates, decoder.product_type),  # (D, 3U)
            )

        return (steps.hidden[:num_steps], steps.attention_weights[:num_steps]), gradient

    return unroll(word_gates, hidden, encoded_features, keys, *decoder_kernels(decoder))


def kernel_gradient(inputs, d_outputs, product_type):
    """The gradient of a Dense layer's kernel, of all words in one product. (T, B, m), (T, B, n) -> float32 (m, n)."""
    inputs, d_outputs = (tf.cast(tf.reshape(x, (-1, x.shape[-1])), product_type) for x in (inputs, d_outputs))
    return tf.cast(tf.matmul(inputs, d_outputs, transpose_a=True), tf.float32)  # (m, n)


def pad_to_bucket(x):
    """Zeros behind the last word. (T, ...) -> (T', ...), a multiple of LENGTH_BUCKET."""
    return tf.pad(x, ((0, -tf.shape(x)[0] % LENGTH_BUCKET), (0, 0), (0, 0)))


def pad_rows(x, rows):
    """Zeros behind the last row. (b, ...) -> (rows, ...)."""
    return tf.pad(x, ((0, rows - tf.shape(x)[0]), *[(0, 0)] * (x.shape.rank - 1)))


def first_half(rows):
    return (rows + 1) // 2


def product(x, kernel):
    """Multiplies in the number type of the kernel. (B, m), (m, n) -> float32 (B, n)."""
    return tf.matmul(tf.cast(x, kernel.dtype), kernel, output_type=tf.float32)


def split_product(x, kernel, parts):
    """`product` as the sum of `parts` products, which XLA can compute side by side."""
    return tf.add_n(list(map(product, tf.split(x, parts, 1), tf.split(kernel, parts))))


def attend(query, image, score_kernel):
    """As BahdanauAttention in model.py. (B, U), Image, (U, 1) -> context_vector (B, D), attention_weights (B, P)."""
    tanh = tf.tanh(image.keys + query[:, tf.newaxis])  # (B, P, U)
    score = tf.reshape(tf.matmul(tf.reshape(tanh, (-1, tanh.shape[-1])), score_kernel), tf.shape(tanh)[:2])  # (B, P)
    attention_weights = tf.nn.softmax(score)  # (B, P)
    context_vector = tf.matmul(attention_weights[:, tf.newaxis], image.encoded_features)[:, 0]  # (B, D)
    return context_vector, attention_weights


def gru(input_gates, hidden_gates, hidden):
    """The GRU as Keras has it (reset_after), behind its products. float (B, 3U), (B, 3U), (B, U) -> (B, U)."""
    x_update, x_reset, x_new = tf.split(input_gates, 3, axis=-1)  # (B, U) each
    h_update, h_reset, h_new = tf.split(hidden_gates, 3, axis=-1)  # (B, U) each
    update = tf.sigmoid(x_update + h_update)
    new = tf.tanh(x_new + tf.sigmoid(x_reset + h_reset) * h_new)
    return update * hidden + (1 - update) * new


@tf.function(jit_compile=True)
def forward_loop(full_steps, num_steps, word_gates, hidden, image, kernels):
    """The first `full_steps` of T' words for all rows, then up to `num_steps` for the first half. Returns Steps."""
    units = hidden.shape[-1]
    bucket, rows = tf.unstack(tf.shape(word_gates)[:2])

    def one_word(image, t, hidden, outputs):
        count = tf.shape(hidden)[0]  # b
        query_and_gates = product(hidden, kernels.state) + kernels.state_bias  # (b, 4U)
        query, hidden_gates = query_and_gates[:, :units], query_and_gates[:, units:]  # (b, U), (b, 3U)
        context_vector, attention_weights = attend(query, image, kernels.score)  # (b, D), (b, P)
        input_gates = word_gates[t][:count] + product(context_vector, kernels.context)  # (b, 3U)
        hidden = gru(input_gates, hidden_gates, hidden)  # (b, U)
        step = Steps(hidden, attention_weights, context_vector, input_gates, query_and_gates)
        outputs = [output.write(t, pad_rows(x, rows)) for output, x in zip(outputs, step, strict=True)]
        return t + 1, hidden, outputs

    widths = units, image.keys.shape[1], image.encoded_features.shape[-1], 3 * units, 4 * units
    outputs = [tf.TensorArray(tf.float32, bucket, element_shape=(hidden.shape[0], width)) for width in widths]
    state = 0, hidden, outputs
    for count, end in (rows, full_steps), (first_half(rows), num_steps):
        body = functools.partial(one_word, image.first(count))
        t, hidden, outputs = state
        state = tf.while_loop(lambda t, *_, end=end: t < end, body, (t, hidden[:count], outputs))
    return [output.stack() for output in state[-1]]


@tf.function(jit_compile=True)
def backward_loop(full_steps, num_steps, d_all_hidden, d_all_weights, previous, steps, image, transposed):
    """Gradients of forward_loop, from the last word to the first.

    Args:
      d_all_hidden, d_all_weights: float (T', B, U) and (T', B, P), gradients of hidden states and attention weights.
      previous: float (T', B, U), the hidden state before each word.
      steps: Steps, from forward_loop.
      transposed: Kernels, its `state` and `context` transposed.

    Returns:
      the gradients of hidden (B, U), keys (B, P, U) and score kernel (U, 1), and for each word those of input_gates
      (T', B, 3U), query_and_gates (T', B, 4U) and context_vector (T', B, D)
    """
    units = previous.shape[-1]
    bucket, rows = tf.unstack(tf.shape(previous)[:2])
    by_step = d_all_hidden, d_all_weights, previous, steps.attention_weights, steps.input_gates, steps.query_and_gates

    def one_word(image, t, d_hidden, d_keys, d_score_kernel, outputs):
        count = tf.shape(image.keys)[0]  # b
        # Indexed in two goes: XLA gets x[t, :count, units:] wrong, as it does not know t.
        d_state, d_weights, hidden, weights, input_gates, query_and_gates = (x[t][:count] for x in by_step)  # (b, ...)
        query, hidden_gates = query_and_gates[:, :units], query_and_gates[:, units:]  # (b, U), (b, 3U)
        d_input_gates, d_hidden_gates, d_previous = gru_gradient(input_gates, hidden_gates, hidden, d_hidden + d_state)
        d_context = split_product(d_input_gates, transposed.context, 3)  # (b, D)
        # Attention is differentiated by hand: TensorFlow's gradient would compute its score and softmax anew.
        d_weights += tf.linalg.matvec(image.encoded_features, d_context)  # (b, P)
        d_score = weights * (d_weights - tf.reduce_sum(weights * d_weights, axis=1, keepdims=True))  # (b, P)
        tanh = tf.tanh(image.keys + query[:, tf.newaxis])  # (b, P, U)
        d_keys += d_score[:, :, tf.newaxis] * (1 - tanh * tanh)  # (b, P, U), still without the score kernel
        # The same, summed over the locations. There the sum of d_score is 0.
        d_query = -transposed.score[:, 0] * tf.reduce_sum(d_score[:, :, tf.newaxis] * (tanh * tanh), axis=1)  # (b, U)
        # A product for each row: XLA computes the one over all rows 20 times slower where they are few.
        d_score_kernel += tf.reduce_sum(tf.matmul(d_score[:, tf.newaxis], tanh), axis=0)  # (1, U)
        d_query_and_gates = tf.concat((d_query, d_hidden_gates), 1)  # (b, 4U)
        d_previous += split_product(d_query_and_gates, transposed.state, 4)  # (b, U)
        results = d_input_gates, d_query_and_gates, d_context
        outputs = [output.write(t, pad_rows(x, rows)) for output, x in zip(outputs, results, strict=True)]
        return t - 1, d_previous, d_keys, d_score_kernel, outputs

    widths = 3 * units, 4 * units, image.encoded_features.shape[-1]
    outputs = [tf.TensorArray(tf.float32, bucket, element_shape=(previous.shape[1], width)) for width in widths]
    no_rows = tf.zeros((0, units)), tf.zeros((0, *image.keys.shape[1:]))
    state = num_steps - 1, *no_rows, tf.zeros_like(tf.transpose(transposed.score)), outputs
    for count, begin in (first_half(rows), full_steps), (rows, 0):
        body = functools.partial(one_word, image.first(count))
        t, d_hidden, d_keys, d_score_kernel, outputs = state
        state = t, pad_rows(d_hidden, count), pad_rows(d_keys, count), d_score_kernel, outputs
        state = tf.while_loop(lambda t, *_, begin=begin: t >= begin, body, state)
    _, d_hidden, d_keys, d_score_kernel, outputs = state
    by_step = [output.stack() for output in outputs]
    return d_hidden, d_keys * transposed.score[:, 0], tf.transpose(d_score_kernel), *by_step


def gru_gradient(input_gates, hidden_gates, hidden, d_new_hidden):
    """TensorFlow's gradient of `gru`: those of its three arguments, from that of its result (B, U)."""
    arguments = input_gates, hidden_gates, hidden
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        new_hidden = gru(*arguments)  # (B, U)
    return tape.gradient(new_hidden, arguments, d_new_hidden)
