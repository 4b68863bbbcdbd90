"""How scripts end, and what importing the modules of support/ does to the process."""

import builtins
import errno
import io
import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
import types

import pytest

from support import process
from support.errors import UserError
from support.process import end_process, interrupts_held_back, modules_left_out, run_script, silenced_stderr

ROOT = pathlib.Path(__file__).parent.parent.parent


def run(code, *arguments):
    """The ended process of a second Python in the project's folder."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=hear_interrupts)


def hear_interrupts():
    """A shell makes the tests ignore Ctrl-C if it starts them in the background. The new process must not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_user_error_is_one_line_whatever_it_quotes():
    assert str(UserError("no file a\nb: run\r\nthis")) == "no file a b: run this"
    assert str(UserError("no \x1b[31m\x9b\u202e \udce9 é犬")) == r"no \x1b[31m\x9b\u202e \udce9 é犬"


@pytest.mark.slow
def test_a_script_is_given_its_arguments_and_ends_with_0():
    ended = run("from support.process import run_script; run_script(print)", "--units", "3")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "['--units', '3']\n", "")


@pytest.mark.slow
def test_a_user_error_ends_a_script_with_one_line_and_2():
    ended = run(
        "from support.errors import UserError; from support.process import run_script\n"
        "def main(argv): print('\\udc80'); raise UserError('no a\\nb')\n"
        "run_script(main)"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "\\udc80\n", "error: no a b\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_a_script_with_one_line_and_130(number):
    ended = run(
        "import os, sys; from support.process import end_process, run_script; sys.excepthook = end_process\n"
        f"def main(argv): print('begun', end=''); os.kill(os.getpid(), {number:d})\n"
        "run_script(main)"
    )
    assert (ended.returncode, ended.stdout) == (130, "begun")
    assert ended.stderr == "interrupted: what was finished is kept; run the same command again to go on\n"


def last_words(capsys, error):
    """How run_script ends where `main` raises an error: (exit status, its one line on standard error)."""

    def main(argv):
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    (line,) = capsys.readouterr().err.splitlines()
    return ended.value.code, line


class NotebookOutput:
    """Standard output of a notebook: text is written, and nothing is reconfigured."""

    def __init__(self):
        self.text = io.StringIO()
        self.write, self.flush = self.text.write, self.text.flush


def test_a_script_runs_in_a_notebook_and_leaves_it_as_it_was(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    monkeypatch.setattr(sys, "stdout", NotebookOutput())
    monkeypatch.setattr(sys, "argv", ["script.py", "--units", "3"])
    run_script(print)
    assert sys.stdout.text.getvalue() == "['--units', '3']\n"
    assert last_words(capsys, UserError("no a"))[0] == 2
    assert last_words(capsys, KeyboardInterrupt())[0] == 130  # and not the end of the notebook
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_edited_file_that_a_notebook_has_loaded_is_one_line_until_it_restarts(monkeypatch, tmp_path, capsys):
    """Python loads a module once a process: the old model would train without a word."""
    monkeypatch.setattr(process, "_ROOT", tmp_path)
    monkeypatch.setattr(process, "_loaded", {})
    monkeypatch.setattr(sys, "argv", ["script.py"])
    for folder in (".", ".venv/site-packages"):
        path = tmp_path / folder / ("package.py" if "venv" in folder else "edited_model.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("units = 3")
        monkeypatch.setitem(sys.modules, path.stem, types.SimpleNamespace(__file__=str(path)))

    def run_again(contents, name="edited_model.py"):
        (tmp_path / name).write_text(contents)
        calls = []
        try:
            run_script(calls.append)
        except SystemExit as ended:
            return ended.code, capsys.readouterr().err
        return calls

    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    assert run_again("units = 3") == run_again("units = 3") == [[]]  # and written again as it was
    assert run_again("another", ".venv/site-packages/package.py") == [[]]
    line = "error: edited_model.py has changed since this notebook loaded it: restart the kernel\n"
    assert run_again("units = 4") == (2, line)
    assert run_again("units = 3") == [[]]
    monkeypatch.delattr(builtins, "__IPYTHON__")  # a process of its own loads what is there
    assert run_again("units = 4") == [[]]


def test_the_second_interrupt_in_a_notebook_ends_the_script_and_not_the_notebook(monkeypatch):
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    before = signal.getsignal(signal.SIGINT)
    with interrupts_held_back():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == before != signal.SIG_DFL


def test_a_script_runs_in_another_thread_where_no_signal_can_be_handled():
    seen = []

    def main(argv):
        with interrupts_held_back() as stop_if_asked:
            stop_if_asked()
            seen.append(argv)

    thread = threading.Thread(target=run_script, args=(main,))
    thread.start()
    thread.join()
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("number", "path"),
    [
        (errno.EACCES, "a.json"),
        (errno.ESTALE, pathlib.Path("a.json")),
        (errno.EIO, b"a.json"),
        (errno.EIO, 3),
        (errno.EIO, None),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(capsys, number, path):
    status, line = last_words(capsys, OSError(number, os.strerror(number), path))
    assert status == 2 and line.startswith(
        f"error: cannot use {'a file or folder' if path in (3, None) else 'a.json'} ("
    )
    assert os.strerror(number) in line and line.endswith("run the same command again")


def test_an_error_that_is_of_no_file_keeps_its_traceback():
    def main(argv):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        run_script(main)


def test_other_errors_keep_their_traceback(capsys):
    end_process(ValueError, ValueError("a fault of the program"), None)
    assert "ValueError: a fault of the program" in capsys.readouterr().err


def test_interrupts_wait_until_they_are_asked_for(capfd):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        with interrupts_held_back() as stop_if_asked:
            stop_if_asked()
            os.kill(os.getpid(), signal.SIGINT)
            assert "once more to stop without saving" in capfd.readouterr().err
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
            stop_if_asked()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_standard_error_is_silent_inside_the_block_only(capfd):
    with pytest.raises(ValueError):
        with silenced_stderr():
            os.write(2, b"notice\n")
            raise ValueError
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["errors", "prerequisites", "process", "command_line", "files", "downloads"])
def test_importing_a_module_changes_nothing_and_loads_no_tensorflow(module):
    code = (
        "import os, signal, sys\n"
        "def state(): return (sys.excepthook, dict(os.environ), os.fstat(2), *map(signal.getsignal, (2, 15)))\n"
        f"before = state(); import support.{module}; assert state() == before\n"
        "print(*{'tensorflow', 'keras', 'requests', 'tqdm', 'PIL'} & set(sys.modules))"
    )
    ended = run(code)
    assert ended.returncode == 0, ended.stderr
    assert set(ended.stdout.split()) == ({"requests", "tqdm"} if module == "downloads" else set())


@pytest.mark.slow
def test_before_tensorflow_sets_up_the_process_and_says_nothing():
    code = (
        "import os, sys; os.environ.pop('TF_CPP_MIN_LOG_LEVEL', None)\n"
        "import support.before_tensorflow\n"
        "print(sys.excepthook.__name__, os.environ['TF_CPP_MIN_LOG_LEVEL'], 'tensorflow' in sys.modules)"
    )
    ended = run(code)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end_process 3 True\n", "")


def test_modules_left_out_are_missing_inside_the_block_and_there_behind_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(KeyError), modules_left_out("colorsys", "json"):
        import json  # noqa: F401  which is there already

        with pytest.raises(ImportError):
            import colorsys
        raise KeyError
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_memory_that_nothing_needs_goes_back_to_the_system():
    """200 MB of small blocks below one that stays, in a circle."""
    ended = run(
        "import pathlib, resource\n"
        "from support.process import release_memory\n"
        "taken = lambda: resource.getpagesize() * int(pathlib.Path('/proc/self/statm').read_text().split()[1])\n"
        "circle = [bytes(1000) for _ in range(200_000)]\n"
        "circle.append(circle)\n"
        "above = bytes(1000)\n"
        "before = taken()\n"
        "del circle\n"
        "release_memory()\n"
        "print(before - taken())"
    )
    assert int(ended.stdout) > 150e6
