"""How training and extraction grow with the data: captions/s, images/s, start-up and peak memory at several sizes.

PYTHONPATH=. python tests/benchmarks/growth.py SIZE [SIZE ...] -- [--<field> VALUE ...]

For each SIZE, a number of captions, it runs data_utils.py and two epochs of train_image_caption_model.py, the first of
which also compiles, as processes of their own on the data set that the settings name, in folders of their own, and
prints one line of a table. captions/s are the second epoch's. More captions bring more words, and a word is work for
each caption: only with a --vocab_size that all sizes reach is the work for a caption the same.
"""

import csv
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time


def main(argv):
    cut = argv.index("--")
    print("| captions | prepare: s | extract: images/s | first step: s | train: captions/s | largest process: MB |")
    print("|---|---|---|---|---|---|", flush=True)
    for size in argv[:cut]:
        with tempfile.TemporaryDirectory() as folder:
            places = ["--data_dir", f"{folder}/data", "--run_dir", f"{folder}/run", "--num_examples", size]
            prepare, out, _ = run("data_utils.py", [*argv[cut + 1 :], *places])
            extraction = re.findall(r"(\d+)/\1 \[(\d+):(\d+)<", out.split("extracting features")[-1])
            images, minutes, seconds = map(int, extraction[-1]) if "extracting" in out else (0, 0, 1)
            _, out, first = run("train_image_caption_model.py", [*argv[cut + 1 :], *places, "--epochs", "2"])
            *_, row = csv.DictReader(pathlib.Path(folder, "run", "history.csv").open())
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3  # the largest child so far
        print(
            f"| {size} | {prepare:.0f} | {images / max(1, minutes * 60 + seconds):.1f} | {first:.1f} "
            f"| {row['captions_per_second']} | {memory:.0f} |",
            flush=True,
        )


def run(script, argv):
    """(seconds, output, seconds to the first optimiser step, as the progress bar shows it) of a script."""
    start, first, out = time.perf_counter(), 0.0, []
    process = subprocess.Popen([sys.executable, script, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while piece := process.stdout.read1():
        out.append(piece.decode(errors="replace"))
        if not first and "loss=" in "".join(out[-3:]):
            first = time.perf_counter() - start
    if process.wait():
        raise SystemExit("".join(out))
    return time.perf_counter() - start, "".join(out), first


if __name__ == "__main__":
    main(sys.argv[1:])
