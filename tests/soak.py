"""What the project survives: kills at random moments, broken input, and the faults that the tests cause.

PYTHONPATH=. python tests/soak.py [--kills 20] [--images 2000] [--annotations 2000] [--seed N]

Each script is killed (SIGKILL) and started again on a tiny data set, which it must finish as if nothing had happened.
Prints a table of the faults caused, survived and lost, and exits with status 1 where anything was lost.
"""

import argparse
import csv
import faulthandler
import json
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time

import hypothesis
import numpy as np

import hostile_captions
from captioning.features.cnn import CNNS
from captioning.features.feature_files import check_feature_file
from conftest import options, weights, write_coco
from features import test_image_files
from strategies import files_of

ROOT = pathlib.Path(__file__).parent.parent
STAGES = {  # the script, the option that names the folder it fills, and that folder of the undisturbed run
    "preparing": ("data_utils.py", "--data_dir", "data"),
    "training": ("train_image_caption_model.py", "--run_dir", "run"),
    "captioning": ("inference_image_caption.py", "--output", "captions"),
}
TESTED = {  # kind of fault: words of pytest's -k for the tests that cause it
    "download or zip file": "test_downloads.py and not full_disk and not interrupt",
    "full disk": "full_disk",
    "damaged file": "damaged",
    "two runs at once": "test_files.py",
    "Ctrl-C and SIGTERM": "interrupt",
}
IMAGES = 160
# With the shortest time between checkpoints, kills also hit those in mid-epoch.
SETTINGS = "--extract_batch 4 --epochs 8 --patience 99 --plot_images 8 --checkpoint_minutes 0.01".split()
KILLS_IN_A_ROW = 5  # on one folder, before a run of it may end
HANG, MEMORY = 60, 3e9  # seconds and bytes that no single input may take


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 20), ("images", 2000), ("annotations", 2000), ("seed", int(time.time()))):
        parser.add_argument(f"--{name}", type=int, default=default)
    wanted = parser.parse_args(argv)
    print(f"--seed {wanted.seed}", flush=True)
    rng = np.random.default_rng(wanted.seed)

    outcomes = {}  # kind of fault: (caused, list of what was lost)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write_coco(root / "coco", IMAGES, captions_each=2)
        for stage, (_, _, name) in STAGES.items():
            status, out, seconds = run(stage, root, root / name, SETTINGS)
            if status:
                raise SystemExit(f"{stage} fails undisturbed:\n{out}")
            print(f"{stage} takes {seconds:.0f} s undisturbed", flush=True)
            done = bear_kills(stage, root, root / name, SETTINGS, wanted.kills, seconds, rng)
            outcomes[f"SIGKILL while {stage}"] = done

    images = test_image_files.damaged_images()
    outcomes["damaged image file"] = fuzz(test_image_files.check_image, images, wanted.images, wanted.seed)
    for name, shape, check in (
        ("COCO's", hostile_captions.COCO, hostile_captions.check_captions_file),
        ("Karpathy's", hostile_captions.KARPATHY, hostile_captions.check_karpathy_file),
    ):
        outcomes[f"hostile captions file like {name}"] = fuzz(
            check, files_of(shape), wanted.annotations // 3, wanted.seed
        )
    tables, check = hostile_captions.tables(), hostile_captions.check_table_file
    outcomes["hostile table of captions"] = fuzz(check, tables, wanted.annotations // 3, wanted.seed)
    for kind, words in TESTED.items():
        outcomes[f"{kind}, in the tests"] = count_tests(words)

    print("\n| kind of fault | caused | survived | lost |\n|---|---|---|---|")
    for kind, (caused, lost) in outcomes.items():
        print(f"| {kind} | {caused} | {caused - len(lost)} | {len(lost)} |")
    for kind, (_, lost) in outcomes.items():
        for loss in lost:
            print(f"{kind}: {loss}")
    sys.exit(any(lost for _, lost in outcomes.values()))


# --- Kills ------------------------------------------------------------------------------------------------------


def run(stage, root, folder, settings, seconds=None):
    """Run a stage's script to its end, or kill it after `seconds`.

    Returns:
      (exit status, output, seconds that it took)
    """
    script, option, _ = STAGES[stage]
    argv = [sys.executable, script, *options(root), *settings, option, str(folder)]
    start = time.perf_counter()
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
    return process.returncode, out.decode(errors="replace"), time.perf_counter() - start


def bear_kills(stage, root, reference, settings, kills, seconds, rng):
    """Kill a stage's script `kills` times at random moments, and compare what it leaves with an undisturbed run's.

    Args:
      root: folder with the data set, and what the stages before left.
      reference: folder that this stage's script filled undisturbed.
      seconds: float, what that took: the moments are drawn from it. A run that ends sooner is judged, but is no fault.
      rng: np.random.Generator

    Returns:
      (kills that hit a running script, list of what was lost: of each kill at the most one)
    """
    caused, lost = 0, []
    while caused < kills:
        with tempfile.TemporaryDirectory() as top:
            most = min(KILLS_IN_A_ROW, kills - caused)
            moments = rng.uniform(0, seconds, most).round(2).tolist()
            done, losses, took = kill_in_a_row(stage, root, pathlib.Path(top, stage), reference, settings, moments)
        caused += done
        lost += [f"killed after {moments[:done]} s: {loss}" for loss in losses][: max(1, done)]
        print(f"{stage}: {caused} kills, the last after {moments[:done]} s, {len(lost)} lost", flush=True)
        if not done:  # the machine is quicker now
            seconds = took
    return caused, lost


def kill_in_a_row(stage, root, folder, reference, settings, moments):
    """Kill a stage's script at each moment in turn, until a run ends by itself, which the one after the last does.

    Returns:
      (kills that hit, list of what was lost, seconds that the last run took)
    """
    hits, losses, features, epoch = 0, [], {}, 0
    for moment in [*moments, None]:
        status, out, took = run(stage, root, folder, settings, moment)
        found = {path: path.stat() for path in folder.glob("features/*.npy")}
        found = {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}
        shape = CNNS["InceptionV3"].feature_shape
        losses += [f"half a file, {path.name}" for path in found if not check_feature_file(path, shape)]
        losses += [f"{path.name} was made twice" for path, state in features.items() if found.get(path) != state]
        epochs = [int(number) for number in re.findall(r"epoch (\d+)/", out)]
        if epochs and epochs[0] < epoch:
            losses.append(f"back to epoch {epochs[0]} from {epoch}")
        features, epoch = found, max([epoch, *epochs])
        if status != -signal.SIGKILL:
            break
        hits += 1
    if status:
        losses.append(f"ends with status {status}: {out[-500:]}")
    else:
        losses += compare(stage, folder, reference)
    return hits, losses, took


def compare(stage, folder, reference):
    """What a run that was killed left otherwise than the undisturbed one: list of str."""
    names, expected = (left_files(top) for top in (folder, reference))
    if names != expected:
        return [f"files are missing, {expected - names}, or left over, {names - expected}"]
    if stage == "preparing":
        files = [name for name in names if (folder / name).is_file() and not name.endswith((".lock", ".jsonl"))]
        differing = [name for name in files if (folder / name).read_bytes() != (reference / name).read_bytes()]
        if read_manifest(folder) != read_manifest(reference):
            differing.append("the manifest")
        return [f"{name} differs" for name in differing]
    read = read_run if stage == "training" else read_captions
    mine, theirs = read(folder), read(reference)
    if mine.keys() != theirs.keys():
        return [f"{mine.keys() ^ theirs.keys()} differ"]
    return [f"{name} differs" for name in mine if not np.allclose(mine[name], theirs[name], atol=1e-4)]


def left_files(folder):
    """The names of all files in a folder. Those in `last` are numbered by the saves, which kills add to."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    last = [name for name in names if name.startswith("last/")]
    return set(names) - set(last) | {f"{len(last)} files in last/"}


def read_manifest(folder):
    """What the manifest tells of features and images but their times: dict of stem to sizes and checksums."""
    header, *lines = map(json.loads, (folder / "features" / "manifest.jsonl").read_text().splitlines())
    return header, {stem: [(state[0], state[2]) for state in states] for stem, *states in lines}


def read_run(folder):
    """What a run has learnt: dict of name to array, the weights, the optimizer's state and the losses."""
    values = {}
    for kind in ("last", "best"):
        values |= {f"{kind}/{name}": value for name, value in weights(folder.parent, kind, folder.name).items()}
    rows = list(csv.DictReader((folder / "history.csv").open()))
    for name in ("epoch", "train_loss", "validation_loss"):
        values[name] = np.array([float(row[name]) for row in rows])
    return values


def read_captions(folder):
    """What was said of each image, and where the model looked: dict of (image, caption) to weights (words, P)."""
    lines = (folder / "captions.jsonl").read_text().splitlines()
    return {(r["image"], r["caption"]): np.array(r["attention_weights"]) for r in map(json.loads, lines)}


# --- Input ------------------------------------------------------------------------------------------------------


def fuzz(check, inputs, count, seed):
    """Run `check` on `count` values of the hypothesis strategy `inputs`: (how many, list of what was lost)."""
    caused, lost = [], []

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, derandomize=False, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(inputs)
    def run_check(value):
        caused.append(len(value))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            check(value)
        except Exception as error:
            lost.append(f"{type(error).__name__} {str(error)[:200]!r} of {value[:2000]!r}")
        faulthandler.cancel_dump_traceback_later()
        if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > MEMORY:
            lost.append(f"more than {MEMORY:.0e} bytes of memory for {value[:2000]!r}")

    run_check()
    return len(caused), lost


def count_tests(words):
    """The faults that tests cause: (how many tests pytest's -k finds by the words, list of those that fail)."""
    argv = [sys.executable, "-m", "pytest", "-q", "-rfE", "-m", "slow or not slow", "-k", words]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    return sum(counts.values()), re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, flags=re.MULTILINE)


if __name__ == "__main__":
    main(sys.argv[1:])
