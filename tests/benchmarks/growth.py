"""How training and extraction grow with the data: captions/s, images/s, start-up and peak memory at several sizes.

PYTHONPATH=. python tests/benchmarks/growth.py SIZE [SIZE ...] -- [--<setting> VALUE ...]

For each SIZE, a number of captions, it runs data_utils.py and two epochs of train_image_caption_model.py, the first of
which also compiles, as processes of their own on the data set that the settings name, in folders of their own, and
prints one line of a table. captions/s are the second epoch's. The memory is the most that each of the two processes
held. More captions bring more words, and a word is work for each caption: only with a --vocab_size that all sizes reach
is the work for a caption the same.
"""

import csv
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple


class Measured(NamedTuple):
    """What a script's process took."""

    seconds: float
    output: str
    first_step: float  # seconds to the first optimizer step, as the progress bar shows it
    megabytes: float  # peak memory


def main(argv):
    cut = argv.index("--") if "--" in argv else len(argv)
    if not cut:
        raise SystemExit("name one or more numbers of captions, and settings behind --")
    columns = "captions", "prepare: s", "images/s", "MB", "train: first step after s", "captions/s", "MB"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for size in argv[:cut]:
        with tempfile.TemporaryDirectory() as folder:
            places = ["--data_dir", f"{folder}/data", "--run_dir", f"{folder}/run", "--num_examples", size]
            prepare = run("data_utils.py", [*argv[cut + 1 :], *places])
            train = run("train_image_caption_model.py", [*argv[cut + 1 :], *places, "--epochs", "2"])
            *_, row = csv.DictReader(pathlib.Path(folder, "run", "history.csv").open())
        print(
            f"| {size} | {prepare.seconds:.0f} | {extraction_rate(prepare.output)} | {prepare.megabytes:.0f} "
            f"| {train.first_step:.1f} | {row['captions_per_second']} | {train.megabytes:.0f} |",
            flush=True,
        )


def extraction_rate(output):
    """images/s as the progress bar ends, or "-" where the features were there before."""
    bars = re.findall(r"(\d+)/\1 \[(?:(\d+):)?(\d+):(\d+)<", output.split("extracting features")[-1])
    if "extracting features" not in output or not bars:
        return "-"
    images, hours, minutes, seconds = (int(number or 0) for number in bars[-1])
    return f"{images / max(1, hours * 3600 + minutes * 60 + seconds):.1f}"


def run(script, argv):
    """Run a script as a process. Returns Measured, or ends this one with the script's output if it fails."""
    start, first, out = time.perf_counter(), 0.0, []
    process = subprocess.Popen([sys.executable, script, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while piece := process.stdout.read1():
        out.append(piece.decode(errors="replace"))
        if not first and "loss=" in "".join(out[-3:]):
            first = time.perf_counter() - start
    # Of this process and no other, which resource.getrusage(RUSAGE_CHILDREN) cannot tell apart.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit("".join(out))
    peak = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)  # macOS counts bytes, Linux kB
    return Measured(time.perf_counter() - start, "".join(out), first, peak)


if __name__ == "__main__":
    main(sys.argv[1:])
