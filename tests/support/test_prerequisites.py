"""One line where this Python cannot run the scripts. None of these tests needs TensorFlow."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from support import prerequisites

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPTS = ("data_utils.py", "train_image_caption_model.py", "inference_image_caption.py")


def last_words(capsys, **arguments):
    """The one line with which check_prerequisites ends the process."""
    with pytest.raises(SystemExit) as ended:
        prerequisites.check_prerequisites(**arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def pretend(monkeypatch, version=(3, 12), missing=(), platform="linux", machine="x86_64"):
    monkeypatch.setattr(sys, "version_info", (*version, 1))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(prerequisites.platform, "machine", lambda: machine)
    monkeypatch.setattr(prerequisites, "_is_installed", lambda module: module not in missing)


@pytest.mark.parametrize("file", [*SCRIPTS, "support/__init__.py", "support/before_tensorflow.py"])
def test_an_older_python_can_read_what_says_that_it_is_too_old(file):
    for path in (file, "support/prerequisites.py"):
        ast.parse((ROOT / path).read_text(encoding="utf-8"), feature_version=(3, 8))
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    if file in SCRIPTS:
        assert imports[0].names[0].name == "support.before_tensorflow"
    elif imports:
        assert imports[0].module == "support.prerequisites"


@pytest.mark.parametrize(("version", "word"), [((3, 8), "old"), ((3, 10), "old"), ((3, 14), "new")])
def test_a_python_without_a_tensorflow_is_named_before_anything_is_installed(monkeypatch, capsys, version, word):
    pretend(monkeypatch, version, prerequisites._PACKAGES)
    for packages in (False, True):
        line = last_words(capsys, packages=packages)
        assert line.startswith(f"error: Python {version[0]}.{version[1]} is too {word}") and "3.11 to 3.13" in line
        assert line.endswith("by python3.13 -m venv .venv")


def test_a_newer_python_with_a_tensorflow_of_its_own_and_those_in_between_run(monkeypatch):
    for version in [(3, 11), (3, 13), (3, 14)]:
        pretend(monkeypatch, version)
        prerequisites.check_prerequisites()
    pretend(monkeypatch, platform="darwin")
    prerequisites.check_prerequisites()


def test_intel_macs_are_told_that_there_is_no_tensorflow(monkeypatch, capsys):
    pretend(monkeypatch, missing=["tensorflow"], platform="darwin")
    assert "Macs with Intel chips" in last_words(capsys)
    pretend(monkeypatch, missing=["tensorflow"], platform="darwin", machine="arm64")
    assert "tensorflow is not installed" in last_words(capsys)


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch, capsys):
    pretend(monkeypatch, missing=["PIL", "tqdm"])
    line = last_words(capsys)
    assert line.startswith(f"error: pillow, tqdm are not installed for {sys.executable}: run {sys.executable} -m pip")
    assert "install -r requirements.txt" in line


def test_all_packages_of_the_requirements_are_asked_for():
    names = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert sorted(names) == sorted(prerequisites._PACKAGES.values())
    versions = re.search(r'requires-python = ">=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text()).groups()
    newest = prerequisites._NEWEST
    assert versions == ("{}.{}".format(*prerequisites._OLDEST), f"{newest[0]}.{newest[1] + 1}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_packages_is_one_line(script):
    ended = subprocess.run([sys.executable, "-E", "-S", script], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert "tensorflow" in line and "-m pip install -r requirements.txt" in line
