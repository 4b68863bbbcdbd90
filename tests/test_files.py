import os
import pathlib
import signal
import subprocess
import sys

import data_utils
import files
import inference_image_caption as inference
import train_image_caption_model as training
from command_line import UserError
from conftest import options

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def holder():
    """A function that has another process lock a folder under a name; all such processes are killed in the end."""
    held = []

    def hold(folder, name):
        # As in a script, but without the seconds that importing TensorFlow takes.
        code = (
            "import sys, time, types; sys.modules['command_line'] = types.SimpleNamespace(UserError=Exception)\n"
            "import files\n"
            "with files.locked(*sys.argv[1:]): print('in', flush=True); time.sleep(600)"
        )
        command = [sys.executable, "-c", code, str(folder), name]
        held.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert held[-1].stdout.readline() == "in\n"
        return held[-1]

    yield hold
    for process in held:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("main", "folder", "name"),
    [
        (data_utils.main, "data", "data"),
        (data_utils.main, "data/features", "features"),
        (training.main, "run", "run"),
        (inference.main, "run/captions", "run"),
    ],
)
def test_the_second_run_names_the_first_and_a_dead_ones_lock_does_not_block(trained, holder, main, folder, name):
    first = holder(trained / folder, name)
    with pytest.raises(UserError, match=f"process {first.pid} is at work on ") as raised:
        main([*options(trained), "--epochs", "2"])
    assert "\n" not in str(raised.value)
    first.kill()
    first.wait()
    main([*options(trained), "--epochs", "2"])


def test_captioning_works_while_a_training_runs(trained, holder, tmp_path):
    holder(trained / "run", "run")
    inference.main([*options(trained), "--output", str(tmp_path)])
    assert (tmp_path / "captions.jsonl").exists()


def test_names_and_folders_lock_apart_and_a_lock_ends_with_its_block(tmp_path):
    with files.locked(tmp_path / "a"), files.locked(tmp_path / "b"), files.locked(tmp_path / "a", "shard 2"):
        with pytest.raises(UserError, match=f"process {os.getpid()} "), files.locked(tmp_path / "a"):
            pass
    with files.locked(tmp_path / "a"):
        pass


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path, holder):
    living, dead = holder(tmp_path, "living"), holder(tmp_path, "dead")
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    for process in (living.pid, dead.pid, os.getpid()):  # a process of this number may have left it before
        (tmp_path / f"{files.TEMPORARY}{process}-1-a.npy").write_bytes(b"half")
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.glob("*.npy")] == [f"{files.TEMPORARY}{living.pid}-1-a.npy"]
