"""Exported bundles against script 3: size, captions unchanged, CIDEr, seconds per image, and the cold start.

PYTHONPATH=. python tests/benchmarks/bundle_check.py --run_dir DIR [--count N] [--rounds N] [--kinds litert:int8 ...]
    [--python FILE] [--folder DIR] [--<setting> VALUE ...]

Each bundle captions the run's validation images greedily in a process of its own, by the Python that --python names:
one of a virtual environment without TensorFlow shows that it needs none. Its captions are compared with those of script
3, from features computed in float32 and from the cached ones. CPU seconds, user and system, hardly depend on what else
the machine does; wall seconds do.
"""

import support.before_tensorflow  # noqa: F401, I001  must come first

import collections
import dataclasses
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from drawn_data import describe_machine

from captioning.captioner import caption_batch
from captioning.evaluation.metrics import score_captions
from captioning.export.bundle import WEIGHTS, export_bundle
from captioning.features.cache import cached_batches, dataset_images, load_data
from captioning.features.image_files import set_up_pillow
from captioning.inference.own_images import extract_batches
from captioning.settings import make_config
from captioning.training.run_folder import load_captioner, run_network, run_settings
from config import Config
from support.command_line import parse_command_line
from support.devices import set_up_devices
from support.process import run_script

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
KINDS = [f"{kind}:{weights}" for kind in ("litert", "onnx") for weights in WEIGHTS[kind]]


def add_options(parser):
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="format:weights (default: all)")
    parser.add_argument("--count", type=int, default=600, help="validation images at the most (default: 600)")
    parser.add_argument("--rounds", type=int, default=0, help="cold starts of each bundle and of script 3 (default: 0)")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs the bundles (default: this one)")
    parser.add_argument("--folder", help="where the bundles go, and are taken from if they are there already")


def main(argv):
    given, options = parse_command_line(argv, __doc__, Config, add_options)
    config = run_settings(given, make_config(given).run_dir)
    config = dataclasses.replace(config, beam_width=1)
    set_up_pillow()
    set_up_devices()
    captioner = load_captioner(config)
    images = dataset_images(load_data(config).validation, config)[: options.count]
    exact = dataclasses.replace(config, extract_precision="float32")
    network = run_network(exact)
    print(describe_machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(options.folder or temporary)
        bundles = {}
        for kind in options.kinds:
            bundles[kind] = folder / kind.replace(":", "_")
            if not bundles[kind].exists():
                export_bundle(captioner, network, *kind.split(":"), config, bundles[kind])
        expected = said_by_script_3(captioner, extract_batches(network, images, exact, collections.Counter()), config)
        cached = said_by_script_3(captioner, cached_batches(images, config), config)
        report(bundles, images, expected, cached, options.python)
        time_cold_starts(bundles, images[0], options, config)


def said_by_script_3(captioner, batches, config):
    """dict of image id to caption"""
    return {c.image_id: c.caption for batch in batches for c in caption_batch(captioner, *batch, config)}


def report(bundles, images, expected, cached, python):
    """Print a row for script 3 from features in float32, one from cached features, and one for each bundle."""
    references = {image.image_id: image.references for image in images}
    print(f"\n{len(images)} images, greedy")
    print("| | MB | unchanged from float32, % | from cached features, % | CIDEr | CPU s/image | wall |")
    print("|---|---|---|---|---|---|---|")
    rows = {"script 3, float32": ("", expected, "", ""), "script 3, cached features": ("", cached, "", "")}
    for kind, folder in bundles.items():
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / 1e6
        _, *first = run_bundle(python, folder, images[:1])
        captions, *all_seconds = run_bundle(python, folder, images)
        per_image = [(whole - one) / max(len(images) - 1, 1) for whole, one in zip(all_seconds, first, strict=True)]
        rows[kind] = (f"{size:.1f}", captions, *(f"{seconds:.3f}" for seconds in per_image))
    for name, (size, captions, cpu, wall) in rows.items():
        same = [100 * sum(captions[i] == other[i] for i in captions) / len(captions) for other in (expected, cached)]
        cider = score_captions(captions, references)["CIDEr"]
        print(f"| {name} | {size} | {same[0]:.1f} | {same[1]:.1f} | {cider:.3f} | {cpu} | {wall} |", flush=True)


def run_bundle(python, folder, images):
    """Caption images by a bundle's script. Returns (dict of image id to caption, CPU seconds, wall seconds)."""
    command = [python, folder / "caption.py", *(image.path for image in images)]
    output, cpu, wall = timed(command)
    lines = dict(line.split(": ", 1) for line in output.splitlines())
    return {image.image_id: lines[str(image.path)] for image in images}, cpu, wall


def timed(command):
    """Run a command. Returns (its standard output, CPU seconds, wall seconds)."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def time_cold_starts(bundles, image, options, config):
    """Print CPU and wall seconds of one image's caption from a fresh process, by each in alternation."""
    if not options.rounds:
        return
    with tempfile.TemporaryDirectory() as output:
        script = [sys.executable, "inference_image_caption.py", "--run_dir", config.run_dir, "--image", image.path]
        script += ["--figures", "0", "--anew", "--output", output, "--inception_weights", config.inception_weights]
        commands = {"script 3": script}
        commands |= {kind: [options.python, folder / "caption.py", image.path] for kind, folder in bundles.items()}
        seconds = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                seconds[name].append(timed(command)[1:])
    print("\ncold start, one image: median of CPU seconds, of wall seconds")
    for name, values in seconds.items():
        cpu, wall = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{name}: {cpu:.2f}, {wall:.2f}")


if __name__ == "__main__":
    run_script(main)
