"""A folder of many images: does script 3's memory grow with it, and does a kill lose a caption or double one?

PYTHONPATH=. python tests/benchmarks/folder_memory.py --run_dir DIR [--images 20000] [-- --<setting> VALUE ...]

It makes small images in a temporary folder and lets inference_image_caption.py of the run in DIR caption a quarter of
them, then all of them, then all of them once more, this time with a SIGKILL when half of the captions are there and the
same command again. Prints a table. The memory is the most that a process held, of two processes the larger. images/s
are counted from the first caption to the last, so without the start of the process.

Ends with status 1 if all images take over 10 % more memory than a quarter, or if a line is lost, double or redone.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent.parent
IN_A_FOLDER = 1000  # images
GROWTH = 1.1  # times the memory of a quarter of the images, that all of them may take
POLL = 0.1  # seconds between two looks at the captions


class Measured(NamedTuple):
    """What a process of script 3 took and left."""

    status: int
    megabytes: float  # peak memory
    rate: float  # images/s; NaN where all captions came at once
    lines: list[bytes]  # whole lines of captions.jsonl


def main(argv):
    wanted, settings = parse(argv)
    problems = []
    columns = "images", "peak memory: MB", "images/s", "lines after a kill", "lines at the end"
    print(f"| {' | '.join(columns)} |\n{'|---:' * len(columns)}|", flush=True)
    with tempfile.TemporaryDirectory() as top:
        folder = pathlib.Path(top)
        peaks = {}
        for count in (wanted.images // 4, wanted.images):
            names = make_images(folder / "images", count)
            done = caption(wanted.run_dir, folder, f"captions of {count}", settings)
            peaks[count] = done.megabytes
            problems += find_problems(done, names)
            print_row(count, done.megabytes, done.rate, "", len(done.lines))
        killed = caption(wanted.run_dir, folder, "killed", settings, kill_at=wanted.images // 2)
        if killed.status == 0:
            problems.append("the process ended before it could be killed")
        done = caption(wanted.run_dir, folder, "killed", settings)
        problems += find_problems(done, names)
        if done.lines[: len(killed.lines)] != killed.lines:
            problems.append("captions that were there before the kill were made again")
        print_row(count, max(killed.megabytes, done.megabytes), killed.rate, len(killed.lines), len(done.lines))
    quarter, whole = peaks.values()
    if whole > GROWTH * quarter:
        problems.append(f"the memory grew from {quarter:.0f} to {whole:.0f} MB")
    for problem in problems:
        print(problem)
    sys.exit(bool(problems))


def parse(argv):
    """(options, list of the settings behind --)"""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", required=True, help="a trained run whose network this machine can build")
    parser.add_argument("--images", type=int, default=20_000)
    wanted = parser.parse_args(argv[:cut])
    if wanted.images < 8:
        parser.error("--images must be 8 or more")
    return wanted, argv[cut + 1 :]


def make_images(folder, count):
    """Add to a folder the images that it lacks of `count`. Returns the set of all their paths as str."""
    rng = np.random.default_rng(count)
    names = set()
    for number in range(count):
        path = folder / f"{number // IN_A_FOLDER:04d}" / f"IMG_{number:07d}.jpg"
        names.add(str(path))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            colours = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
            colours.resize((64, 48)).save(path)
    return names


def caption(run_dir, folder, output, settings, kill_at=None):
    """Caption `folder`/images in a process of its own, and kill it when `kill_at` captions are there.

    Returns:
      Measured; the script's output ends this process where it fails.
    """
    argv = ["inference_image_caption.py", "--run_dir", os.path.abspath(run_dir), *settings]
    argv += ["--image", str(folder / "images"), "--output", str(folder / output)]
    path, moments = folder / output / "captions.jsonl", []
    with (folder / "log").open("w+b") as log:
        process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        # Of this process and no other, which resource.getrusage(RUSAGE_CHILDREN) cannot tell apart.
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            lines = count_lines(path)
            if lines and (not moments or lines != moments[-1][1]):
                moments.append((time.perf_counter(), lines))
            if kill_at and lines >= kill_at:
                process.kill()
            time.sleep(POLL)
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        log.seek(0)
        if process.returncode and not kill_at:
            raise SystemExit(log.read().decode(errors="replace"))
    peak = ended[2].ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)  # macOS counts bytes, Linux kB
    rate = float("nan")
    if len(moments) > 1:
        (start, before), (end, after) = moments[0], moments[-1]
        rate = (after - before) / (end - start)
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return Measured(process.returncode, peak, rate, lines)


def count_lines(path):
    try:
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return 0


def find_problems(done, names):
    """What is wrong with the captions of images: list of str."""
    found = [json.loads(line)["image"] for line in done.lines]
    problems = []
    if lost := names - set(found):
        problems.append(f"{len(lost)} captions are lost, such as that of {min(lost)}")
    if len(found) > len(set(found)):
        problems.append(f"{len(found) - len(set(found))} captions are there twice")
    if others := set(found) - names:
        problems.append(f"{len(others)} captions are of images that nobody named")
    return problems


def print_row(*values):
    cells = [f"{value:.0f}" if isinstance(value, float) else str(value) for value in values]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
