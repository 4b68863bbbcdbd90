"""A training step of this project against the same model, batch and number type in PyTorch.

PYTHONPATH=. python tests/benchmarks/pytorch_speed.py --engine tensorflow|eager|compiled [--precision float32|bfloat16]

`eager` and `compiled` need PyTorch, `tensorflow` does not, so each may have an environment of its own. Run them in
turn. Each makes up the same captions and features, takes some steps to warm up, and prints the median time of a step.
PyTorch's model has no word detector, which ours trains beside the captioner, and so has a little less to do.
"""

import argparse
import statistics
import time

import numpy as np

B, P, F, D, E, U, V = 64, 64, 2048, 256, 256, 512, 5000  # the defaults of config.py
LENGTHS = 14, 10  # T of the longer and of the shorter half of a batch, with <start> and <end>
DROPOUT, CLIP_NORM, RATE = 0.5, 5.0, 1e-3
WARM_UP = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", choices=["tensorflow", "eager", "compiled"], required=True)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    make_step = tensorflow_step if options.engine == "tensorflow" else pytorch_step
    step = make_step(*make_up_batch(), options)
    losses, times = [], []
    for _ in range(WARM_UP + options.steps):
        start = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - start)
    median = statistics.median(times[WARM_UP:])
    print(f"{options.engine}, {options.precision}: {1000 * median:.0f} ms a step, {B / median:.0f} captions/s", end="")
    print(f"; loss {losses[0]:.3f}, then {losses[-1]:.3f}")


def make_up_batch():
    """Returns features float16 (B, P, F), captions int (B, T)."""
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((B, P, F), np.float32) - 1.34).clip(0).astype(np.float16)  # 91 % zeros
    captions = rng.integers(4, V, (B, max(LENGTHS))).astype(np.int32)
    captions[:, 0] = 2
    captions[B // 2 :, LENGTHS[1] :] = 0
    return features, captions


def tensorflow_step(features, captions, options):
    import support.before_tensorflow  # noqa: F401, I001  must come first
    import tensorflow as tf

    import train_image_caption_model as training
    from captioning.data.prepared_data import Prepared
    from captioning.settings import make_config

    config = make_config({})
    vocabulary = [f"w{word}" for word in range(V)]
    prepared = Prepared([], [], [], vocabulary, np.zeros(F, np.float32), feature_std=1.0, network="made up")
    training.log_frequency_bias = lambda captions, size: np.zeros(size, np.float32)
    state = training.build_state(prepared, "mixed_bfloat16" if options.precision == "bfloat16" else "float32", config)
    features, captions = tf.constant(features), tf.constant(captions)
    return lambda: float(training.train_step(state, features, captions, config))


def pytorch_step(features, captions, options):
    import torch
    from torch import nn
    from torch.nn import functional

    class Captioner(nn.Module):
        """model.py's encoder and decoder."""

        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(F, D)
            self.embedding = nn.Embedding(V, E)
            self.key, self.query, self.score = nn.Linear(D, U), nn.Linear(U, U), nn.Linear(U, 1, bias=False)
            self.initial = nn.Linear(D, U)
            self.gru = nn.GRUCell(E + D, U)
            self.output = nn.Linear(U, V)

        def forward(self, features, captions):
            encoded_features = torch.relu(self.encoder(features))  # (B, P, D)
            keys = self.key(encoded_features)  # (B, P, U)
            hidden = torch.tanh(self.initial(encoded_features.mean(1)))  # (B, U)
            embedded = self.drop(self.embedding(captions[:, :-1]))  # (B, T-1, E)
            all_hidden, all_weights = [], []
            for t in range(captions.shape[1] - 1):
                scores = self.score(torch.tanh(keys + self.query(hidden)[:, None]))[..., 0]  # (B, P)
                weights = torch.softmax(scores, 1)  # (B, P)
                context_vector = torch.bmm(weights[:, None].to(encoded_features.dtype), encoded_features)[
                    :, 0
                ]  # (B, D)
                hidden = self.gru(torch.cat((embedded[:, t], context_vector.to(embedded.dtype)), 1), hidden)  # (B, U)
                all_hidden.append(hidden)
                all_weights.append(weights)
            hidden = self.drop(torch.stack(all_hidden, 1))  # (B, T-1, U)
            real = captions[:, 1:] != 0  # (B, T-1)
            return self.output(hidden[real]), torch.stack(all_weights, 1), real  # (N, V), (B, T-1, P), (B, T-1)

        def drop(self, x):
            """The same mask at all words of a caption. (B, T, n) -> (B, T, n)."""
            return x * functional.dropout(torch.ones_like(x[:, :1]), DROPOUT, self.training)

    torch.manual_seed(0)
    model = Captioner()
    run = torch.compile(model) if options.engine == "compiled" else model
    optimizer = torch.optim.Adam(model.parameters(), RATE, fused=True)
    kept, captions = torch.from_numpy(features), torch.from_numpy(captions).long()
    number_type = torch.bfloat16 if options.precision == "bfloat16" else torch.float32

    def step():
        features = kept.to(number_type)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
            logits, weights, real = run(features, captions)
        loss = functional.cross_entropy(logits.float(), captions[:, 1:][real])
        attention = (1 - (weights.float() * real[..., None]).sum(1)).square().mean()
        optimizer.zero_grad()
        (loss + attention).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        return float(loss)

    return step


if __name__ == "__main__":
    main()
