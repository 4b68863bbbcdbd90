"""Checks a GPU: each stage is computed on it and on the CPU, and the results are compared within stated bounds.

PYTHONPATH=. python tests/benchmarks/gpu_check.py [--count N] [--steps N] [--anyway] [--<setting> VALUE ...]

Where TensorFlow finds no GPU that it can use, it says so and ends. Each way of computing has a process of its own, as
the scripts have. All compute the same: features of drawn photographs, training steps from the same first weights,
and, at the weights that the CPU's steps have led to, loss, gradients and captions. The CPU computes in float32 and
compiles nothing; the bounds are what the number types' precision explains. The exit status is 1 where one is broken.
With --anyway the GPU's part is computed on the CPU where there is no GPU, which only tries this script itself.
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import tensorflow as tf
import train_image_caption_model as training
from drawn_data import describe_machine, draw_photographs, draw_prepared
from train_speed import our_gradients

from captioning.features.cache import features_folder
from captioning.export.saved_model import decode_captions
from captioning.features.cnn import CNNS
from captioning.features.extraction import extract_features
from captioning.features.network import extraction_graphs, feature_network
from captioning.settings import make_config
from captioning.training.batches import caption_batches, collect_captions
from config import Config
from support.command_line import parse_command_line
from support.devices import describe_devices, set_up_devices
from support.distribution import replicas
from support.errors import UserError
from support.process import run_script

REFERENCE = "CPU"
EXACT = {"precision": "float32", "extract_precision": "float32"}
WAYS = {  # the settings of each way of computing; "auto" is as the scripts come
    REFERENCE: EXACT,
    "GPU, float32": EXACT,
    "GPU, fastest": {"precision": "auto", "extract_precision": "auto"},
    "all GPUs, float32": EXACT | {"strategy": "mirrored"},
}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How far a way's results may be from the CPU's.

    Attributes:
      features: least mean cosine of a location's features. Random weights make errors of rounding grow from layer to
        layer, so they have a bound of their own.
      random_features: the same for random weights.
      losses: largest relative difference of a training step's loss.
      gradients: least cosine of the gradient of any weight. That of all together would hide a wrong attention.
      captions: least share of captions that are word for word the same.
      log_probs: largest mean difference of captions' log-probabilities, in nats.
    """

    features: float
    random_features: float
    losses: float
    gradients: float
    captions: float
    log_probs: float


# GPUs multiply float32 as TF32, with 10 bits behind the point, bfloat16 has 7.
FLOAT32_BOUNDS = Bounds(0.999, 0.98, 0.01, 0.999, 0.9, 0.05)
FASTEST_BOUNDS = Bounds(0.999, 0.8, 0.03, 0.99, 0.7, 0.3)


def add_options(parser):
    parser.add_argument("--count", type=int, default=64, help="photographs, and images to caption (default: 64)")
    parser.add_argument("--steps", type=int, default=30, help="training steps (default: 30)")
    parser.add_argument("--anyway", action="store_true", help="go on without a GPU, to try this script")
    parser.add_argument("--way", help="compute one way and write its results to --folder; for this script's own use")
    parser.add_argument("--folder", type=pathlib.Path, help="for this script's own use")


def main(argv):
    given, options = parse_command_line(argv, __doc__, Config, add_options)
    if options.way:
        places = {"features_dir": str(options.folder / "features"), "run_dir": str(options.folder / options.way)}
        compute(make_config(given, places, WAYS[options.way]), options)
        return
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus and not options.anyway:
        print(f"there is no GPU to check: {describe_devices()}")
        return
    ways = [way for way in WAYS if len(gpus) > 1 or WAYS[way].get("strategy") != "mirrored"]
    with tempfile.TemporaryDirectory() as name:
        results = {way: run_way(way, pathlib.Path(name), argv) for way in ways}
    if not gpus:
        print("there is no GPU: what is called GPU below was computed on the CPU")
    print(f"{describe_devices()}; {describe_machine()}\n")
    config = make_config(given)
    rows = [row for way in ways[1:] for row in compare(results[REFERENCE], results[way], way, config)]
    print_rows(rows)
    if not all(kept for *_, kept in rows):
        sys.exit(1)


def run_way(way, folder, argv):
    """Compute one way in a process of its own. Returns a dict of arrays."""
    print(f"computing: {way}", flush=True)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": "-1"} if way == REFERENCE else {})
    command = [sys.executable, __file__, *argv, "--way", way, "--folder", str(folder)]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        raise UserError(f"{way} ended with exit status {process.returncode}: {process.stdout[-3000:]}")
    with np.load(folder / f"{way}.npz") as saved:
        return dict(saved)


# --- Computing --------------------------------------------------------------------------------------------------


def compute(config, options):
    """Compute all stages as the settings say, and write the results to `folder`/<way>.npz."""
    set_up_devices()
    folder, mirrored = options.folder, config.strategy == "mirrored"
    prepared = draw_prepared(folder / "features", options.count, config)
    results = {} if mirrored else {"features": compute_features(folder, options, config)}
    with replicas(config.strategy):
        state = training.open_run(prepared, config)
        results |= {"losses": train(state, prepared, options, config)}
    if not mirrored:
        results |= compute_at_trained(state, prepared, folder, config)
    np.savez(folder / f"{options.way}.npz", **results)


def compute_features(folder, options, config):
    """float32 (count, P, F) of drawn photographs."""
    photographs = folder / "photographs"
    if not photographs.exists():
        photographs.mkdir()
        draw_photographs(photographs, options.count)
    paths = sorted(photographs.iterdir())
    network = feature_network(config, folder / "random_statistics.npz", paths)
    with extraction_graphs(config):
        batches = extract_features(network, CNNS[config.cnn], paths, config.extract_batch)
        return np.concatenate([features for _, features, _ in batches])


def train(state, prepared, options, config):
    """Take the training steps from the reference's first weights. Returns the steps' losses, float (steps,)."""
    take_weights(state, options.folder / "first.npz")
    captions = collect_captions(prepared.train, features_folder(config))
    order = np.arange(options.steps * config.batch_size) % len(captions.lengths)
    losses = []
    for features, words in caption_batches(captions, order, config):
        losses.append(float(training.train_step(state, features, words, config)))
    take_weights(state, options.folder / "trained.npz")
    return np.array(losses)


def take_weights(state, path):
    """Set the weights to those in the file; the first process, which is the reference's, writes it."""
    variables = [*state.encoder.variables, *state.decoder.variables]
    if not path.exists():
        np.savez(path, *(variable.numpy() for variable in variables))
    with np.load(path) as saved:
        for variable, name in zip(variables, saved.files, strict=True):
            variable.assign(saved[name])


def compute_at_trained(state, prepared, folder, config):
    """Loss and gradients of one batch, and captions, at the weights that the reference has trained."""
    captions = collect_captions(prepared.train, features_folder(config))
    features, words = next(iter(caption_batches(captions, np.arange(config.batch_size), config)))
    loss, gradients = our_gradients(state, features, words)
    results = {f"gradient {i}": np.ravel(tf.convert_to_tensor(gradient)) for i, gradient in enumerate(gradients)}
    results["loss"] = loss
    images = np.stack([np.load(path) for path in sorted((folder / "features").glob("*.npy"))]).astype(np.float32)
    for name, width in (("greedy", 1), ("beams", 3)):
        settings = dataclasses.replace(config, beam_width=width, max_words=15)
        decoded = tf.function(decode_captions)(state.encoder, state.decoder, images, settings)
        results[f"{name} words"] = decoded.words
        results[f"{name} log_probs"] = tf.reduce_sum(decoded.log_probs, axis=1)
    return results


# --- Comparing --------------------------------------------------------------------------------------------------


def compare(reference, found, way, config):
    """Rows of the table for one way: (way, what, number found, its bound as text, whether it is kept)."""
    bounds = FASTEST_BOUNDS if "fastest" in way else FLOAT32_BOUNDS
    rows = []

    def at_least(what, number, bound):
        rows.append((way, what, number, f">= {bound}", bool(number >= bound)))

    def at_most(what, number, bound):
        rows.append((way, what, number, f"<= {bound}", bool(number <= bound)))

    if "features" in found:
        bound = bounds.random_features if config.inception_weights == "random" else bounds.features
        at_least("features, mean cosine", cosine(reference["features"], found["features"]).mean(), bound)
    difference = np.abs(found["losses"] / reference["losses"] - 1).max()
    at_most(f"losses of {len(found['losses'])} training steps, relative difference", difference, bounds.losses)
    if "loss" in found:
        difference = np.abs(found["loss"] / reference["loss"] - 1)
        at_most("loss of trained weights, relative difference", difference, bounds.losses)
        names = [name for name in found if name.startswith("gradient ")]
        least = np.min([cosine(reference[name], found[name]) for name in names])  # NaN stays, which min would drop
        at_least("gradients, least cosine of any weight's", least, bounds.gradients)
        for name in ("greedy", "beams"):
            same = same_captions(reference[f"{name} words"], found[f"{name} words"])
            at_least(f"captions, {name}, share that is the same", same, bounds.captions)
            difference = np.abs(found[f"{name} log_probs"] - reference[f"{name} log_probs"]).mean()
            at_most(f"captions, {name}, log-probability, mean difference", difference, bounds.log_probs)
    return rows


def cosine(a, b):
    """Cosine of vectors: (..., n), (..., n) -> (...)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)


def same_captions(a, b):
    """The share of rows that are the same apart from <pad> (0) at the end. int (B, L), int (B, M) -> float."""
    length = max(a.shape[1], b.shape[1])
    a, b = (np.pad(words, ((0, 0), (0, length - words.shape[1]))) for words in (a, b))
    return (a == b).all(1).mean()


def print_rows(rows):
    print("| computed on | compared with the CPU's | found | bound | |\n|---|---|---|---|---|")
    for way, what, number, bound, kept in rows:
        print(f"| {way} | {what} | {number:.5f} | {bound} | {'good' if kept else '**BAD**'} |")


if __name__ == "__main__":
    run_script(main)
