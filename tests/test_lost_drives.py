"""A folder that cannot be listed, read or written any more, as on a drive of the network that has gone, is one line."""

import builtins
import errno
import importlib
import io
import os
import pathlib
import shutil
import sys

import pytest

from conftest import options
from support.process import run_script

LOST = pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE], ids=errno.errorcode.get)


def lose(monkeypatch, calls, lost, number):
    """Let these calls raise an OSError for the path `lost` and all below it."""

    def failing(real):
        def call(path, *arguments, **more):
            if isinstance(path, str | os.PathLike) and pathlib.Path(path).is_relative_to(lost):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **more)

        return call

    for name in calls:
        for module in (builtins, io) if name == "open" else (os,):
            monkeypatch.setattr(module, name, failing(getattr(module, name)))


def last_words(monkeypatch, capsys, script, argv):
    """The line with which a script ends, whose exit status must be 2."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        run_script(importlib.import_module(script).main)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


READING = ("open",)
LISTING = ("listdir", "scandir")


@LOST
@pytest.mark.parametrize(
    ("script", "calls", "lost"),
    [
        ("data_utils", READING, "coco/annotations"),
        ("data_utils", LISTING, "data/features"),
        ("data_utils", READING, "data/features/manifest.jsonl"),
        ("train_image_caption_model", READING, "data/settings.json"),
        ("train_image_caption_model", LISTING, "data/features"),
        ("train_image_caption_model", LISTING, "run/last"),
        ("train_image_caption_model", READING, "run/config.json"),
        ("inference_image_caption", LISTING, "run/best"),
        ("inference_image_caption", READING, "run/words/captions.jsonl"),
    ],
)
def test_what_cannot_be_listed_or_read_any_more(trained, monkeypatch, capsys, script, calls, lost, number):
    more = ("--epochs", "3")
    if "captions.jsonl" in lost:
        more = ("--output", (trained / lost).parent)
        (trained / lost).parent.mkdir(exist_ok=True)
        (trained / lost).touch()
    lose(monkeypatch, calls, trained / lost, number)
    line = last_words(monkeypatch, capsys, script, [*options(trained), *more])
    assert os.strerror(number) in line and f"{trained / lost}" in line


@LOST
def test_what_script_1_cannot_rename_any_more(coco, monkeypatch, capsys, number):
    lose(monkeypatch, ["replace"], coco / "data", number)
    line = last_words(monkeypatch, capsys, "data_utils", options(coco))
    assert os.strerror(number) in line and f"cannot write {coco / 'data'}" in line


@LOST
def test_what_script_3_cannot_rename_any_more(trained, tmp_path, monkeypatch, capsys, number):
    lose(monkeypatch, ["replace"], tmp_path, number)
    argv = [*options(trained), "--output", tmp_path]
    line = last_words(monkeypatch, capsys, "inference_image_caption", argv)
    assert os.strerror(number) in line and f"cannot write {tmp_path}" in line


@LOST
def test_an_export_into_a_folder_that_cannot_be_listed(trained, tmp_path, monkeypatch, capsys, number):
    lose(monkeypatch, LISTING, tmp_path, number)
    monkeypatch.setattr("captioning.training.run_folder.run_network", lambda config: None)
    argv = [*options(trained), "--export", tmp_path]
    assert os.strerror(number) in last_words(monkeypatch, capsys, "inference_image_caption", argv)


@LOST
def test_captions_beside_images_in_a_folder_that_cannot_be_listed(tmp_path, monkeypatch, capsys, number):
    (tmp_path / "images" / "inner").mkdir(parents=True)
    (tmp_path / "images" / "a.txt").write_text("a dog")
    (tmp_path / "images" / "a.jpg").touch()
    lose(monkeypatch, LISTING, tmp_path / "images" / "inner", number)
    argv = ["--dataset", "table", "--images", tmp_path / "images", "--data_dir", tmp_path / "data"]
    assert str(tmp_path / "images" / "inner") in last_words(monkeypatch, capsys, "data_utils", argv)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_images_of_a_drive_that_has_gone_are_not_left_out_as_damaged(coco, monkeypatch, capsys, number):
    shutil.rmtree(coco / "data")
    lose(monkeypatch, READING, coco / "coco" / "train2014", number)
    argv = [*options(coco), "--num_examples", "20"]
    assert str(coco / "coco" / "train2014") in last_words(monkeypatch, capsys, "data_utils", argv)
