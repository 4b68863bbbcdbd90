import csv
import errno
import importlib
import os
import pathlib
import subprocess
import sys

import pytest

from conftest import full_disk, options
from support import files
from support.errors import UserError
from support.files import fcntl

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def holder():
    """A function that has another process lock a folder under a name; all such processes are killed in the end."""
    held = []

    def hold(folder, name):
        code = (
            "import sys, time; from support import files\n"
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


def refuse(monkeypatch, function, number):
    """Make a function that `files` calls raise the OSError of this number."""

    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(f"support.files.{function}", fail)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Reading and writing


def test_what_is_written_is_read(tmp_path):
    folder = tmp_path / "new" / "folder"
    files.write_json(folder / "a.json", {"é": [1, 2.5, None]})
    assert files.read_json(folder / "a.json") == {"é": [1, 2.5, None]}
    files.write_csv(folder / "a.csv", [{"epoch": 1, "note": "a,\nb"}, {"epoch": 2, "note": ""}])
    with open(folder / "a.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"epoch": "1", "note": "a,\nb"}, {"epoch": "2", "note": ""}]
    assert names_in(folder) == ["a.csv", "a.json"]


def test_a_file_name_that_is_no_utf_8_is_written_to_json_and_read(tmp_path):
    name = "caf\udce9.jpg"  # as Python has the byte that is none
    files.write_json(tmp_path / "a.json", [{"image_id": name}])
    assert files.read_json(tmp_path / "a.json") == [{"image_id": name}]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "is missing"),
        (b'{"a": ', "cannot be read .*"),
        (b'"\xff"', "cannot be read .*"),
        (b"[" * 100_000, "cannot be read .*"),
        (b"[1]", r"is damaged \(it holds no dict\)"),
    ],
)
def test_json_that_is_not_as_expected_is_the_users_error(tmp_path, data, words):
    if data is not None:
        (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=f"a.json {words}$"):
        files.read_json(tmp_path / "a.json", dict)


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError):
        with files.replacing(path) as temporary:
            assert temporary.parent == tmp_path and temporary.suffix == ".txt"
            temporary.write_text("half")
            raise KeyError
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_the_old_file_and_says_make_room(tmp_path):
    files.write_bytes(tmp_path / "a", b"old")
    with full_disk(100), pytest.raises(UserError, match="cannot write .*MB free there; make room and run the same"):
        files.write_bytes(tmp_path / "a", bytes(1000))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names_in(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_says_make_room(number, tmp_path):
    error = OSError(number, os.strerror(number))
    assert "MB free there; make room" in files.reason_and_remedy(error, tmp_path / "not" / "yet" / "made")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO, errno.ENAMETOOLONG])
def test_other_errors_name_the_folder_and_how_to_choose_another(number, tmp_path, monkeypatch):
    refuse(monkeypatch, "os.replace", number)
    with pytest.raises(UserError, match="cannot write ") as raised:
        files.write_bytes(tmp_path / "a", b"new")
    message = str(raised.value)
    assert os.strerror(number) in message and f"the folder {tmp_path} " in message and "--help" in message
    assert "room" not in message
    assert names_in(tmp_path) == []


def test_a_file_in_the_place_of_the_folder_is_the_users_error(tmp_path):
    (tmp_path / "taken").write_text("")
    for write in (lambda: files.write_bytes(tmp_path / "taken" / "a", b""), files.locked(tmp_path / "taken").__enter__):
        with pytest.raises(UserError, match=f"{tmp_path}/taken.*choose another") as raised:
            write()
        assert "room" not in str(raised.value)


def test_leftovers_go_and_young_ones_stay_where_other_hosts_write(tmp_path):
    old, young = (tmp_path / f"{files.TEMPORARY}{name}" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    files.remove_leftovers(tmp_path, files.STALE)
    assert list(tmp_path.iterdir()) == [young]
    files.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
    files.remove_leftovers(tmp_path / "none")


class Windows:
    """What locks files on Windows, msvcrt: one handle locks a byte. It knows no shared locks."""

    LK_NBLCK = 2

    def locking(self, number, mode, count):
        assert mode == self.LK_NBLCK and count == 1 and os.lseek(number, 0, os.SEEK_CUR) > 1000
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None


@pytest.fixture
def windows(monkeypatch):
    if fcntl is None:
        pytest.skip("this is Windows")
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", Windows(), raising=False)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)


def test_a_file_that_another_program_has_open_on_windows_is_renamed_soon_after(windows, tmp_path, monkeypatch):
    refusals, real = [PermissionError(errno.EACCES, "Access is denied")] * 3, os.replace

    def replace(source, target):
        if refusals:
            raise refusals.pop()
        real(source, target)

    monkeypatch.setattr("support.files.os.replace", replace)
    files.write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and names_in(tmp_path) == ["a"]
    refusals += [PermissionError(errno.EACCES, "Access is denied")] * 100
    with pytest.raises(UserError, match="cannot write .*no other program has the file open"):
        files.write_bytes(tmp_path / "a", b"newer")


def test_a_lock_on_windows_keeps_others_out_and_ends_with_its_block(windows, tmp_path):
    for _ in range(2):
        with files.locked(tmp_path), files.locked(tmp_path, "shard", shared=True):
            with pytest.raises(UserError, match=f"process {os.getpid()} is at work on"), files.locked(tmp_path):
                pass


# Folders


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, monkeypatch, number):
    (tmp_path / "ckpt-1").touch()
    assert files.list_folder(tmp_path, "ckpt-*") == [tmp_path / "ckpt-1"]
    assert files.list_folder(tmp_path / "none") == files.list_folder(tmp_path / "ckpt-1") == []
    refuse(monkeypatch, "os.listdir", number)
    with pytest.raises(OSError):
        files.list_folder(tmp_path)
    files.remove_leftovers(tmp_path)


# Locks


def test_names_and_folders_lock_apart_and_a_lock_ends_with_its_block(tmp_path):
    with files.locked(tmp_path / "a"), files.locked(tmp_path / "b"), files.locked(tmp_path / "a", "shard 2"):
        with pytest.raises(UserError, match=f"process {os.getpid()} "), files.locked(tmp_path / "a"):
            pass
    with files.locked(tmp_path / "a"):
        pass


def test_shared_locks_let_each_other_in_and_nobody_else(tmp_path):
    with files.locked(tmp_path, shared=True):
        with files.locked(tmp_path, shared=True):
            pass
        with pytest.raises(UserError, match="is at work on"), files.locked(tmp_path):
            pass
    with files.locked(tmp_path):
        with pytest.raises(UserError, match="is at work on"), files.locked(tmp_path, shared=True):
            pass


@pytest.mark.slow
def test_another_process_is_named_and_a_dead_ones_lock_does_not_block(tmp_path, holder):
    first = holder(tmp_path, "run")
    for shared in (False, True):
        with pytest.raises(UserError, match=f"process {first.pid} is at work on {tmp_path}: wait until it has ended"):
            with files.locked(tmp_path, shared=shared):
                pass
    first.kill()
    first.wait()
    with files.locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("shared", [False, True])
def test_a_file_system_without_locks_is_named_in_one_line_and_the_work_goes_on(
    tmp_path, monkeypatch, capsys, number, shared
):
    refuse(monkeypatch, "_lock_file", number)
    inside = False
    with files.locked(tmp_path / "run", shared=shared):
        inside = True
    assert inside
    (line,) = capsys.readouterr().out.splitlines()
    assert f"the file system of {tmp_path / 'run'} has no locks" in line and os.strerror(number) in line
    assert ("only processes that may share it" if shared else "only one process") in line


def test_a_lock_that_cannot_be_had_for_another_reason_is_the_users_error(tmp_path, monkeypatch, capsys):
    refuse(monkeypatch, "_lock_file", errno.EIO)
    with pytest.raises(UserError, match="cannot lock .*choose another folder"), files.locked(tmp_path):
        pytest.fail("the block ran")
    assert capsys.readouterr().out == ""


def test_a_lock_on_a_full_disk_says_make_room(tmp_path):
    with full_disk(0), pytest.raises(UserError, match="cannot lock .*make room"), files.locked(tmp_path):
        pytest.fail("the block ran")


def test_a_holder_that_cannot_be_read_is_another_process(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        assert files._lock_holder(file) == "another process"


# Scripts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "folder", "name"),
    [
        ("data_utils", "data", "data"),
        ("data_utils", "data/features", "features"),
        ("train_image_caption_model", "run", "run"),
        ("inference_image_caption", "run/captions", "run"),
    ],
)
def test_the_second_run_names_the_first_and_a_dead_ones_lock_does_not_block(trained, holder, script, folder, name):
    main = importlib.import_module(script).main
    first = holder(trained / folder, name)
    with pytest.raises(UserError, match=f"process {first.pid} is at work on ") as raised:
        main([*options(trained), "--epochs", "2"])
    assert "\n" not in str(raised.value)
    first.kill()
    first.wait()
    main([*options(trained), "--epochs", "2"])


@pytest.mark.slow
def test_captioning_works_while_a_training_runs(trained, holder, tmp_path):
    holder(trained / "run", "run")
    importlib.import_module("inference_image_caption").main([*options(trained), "--output", str(tmp_path)])
    assert (tmp_path / "captions.jsonl").exists()
