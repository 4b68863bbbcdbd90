import errno
import json
import os
import pathlib
import tempfile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from captioning.features.manifest import (
    _MANIFEST,
    Entry,
    Manifest,
    keep_live,
    merge_journals,
    open_journal,
    read_manifest,
    scan_features,
    write_manifest,
)
from conftest import let_time_pass
from strategies import JSON, check_one_line
from support.errors import UserError
from support.file_states import FileState, read_state

IMAGE = FileState(10, 20, 30)


def live_manifest(folder):
    """The Manifest of the features that are unchanged."""
    files = scan_features(folder)
    return keep_live(folder, files, read_manifest(folder, files))


def add_feature(folder, stem, journal, content=b"numbers"):
    """Write a feature file and its line in a journal, as write_features does."""
    path = pathlib.Path(folder, f"{stem}.npy")
    path.write_bytes(content)
    entry = Entry(read_state(path), IMAGE)
    journal.add({stem: entry})
    return entry


def read(folder):
    return read_manifest(folder, scan_features(folder))


def test_what_is_written_is_read(tmp_path):
    entries = {"a b": Entry(IMAGE, FileState(1, 2, 3)), "é\n": Entry(IMAGE, None)}
    write_manifest(tmp_path, Manifest("a network", entries))
    assert read(tmp_path) == Manifest("a network", entries, [])


def test_nothing_is_known_of_an_empty_or_absent_folder(tmp_path):
    assert read(tmp_path) == read(tmp_path / "nowhere") == Manifest(None, {}, [])


def test_only_feature_files_are_found_and_none_is_read(tmp_path):
    for name in (".tmp-1-a.npy", "b.jpg", "c.npy"):
        (tmp_path / name).write_bytes(b"12")
    (tmp_path / "d.npy").mkdir()
    (tmp_path / "c.npy").chmod(0)
    assert {stem: stat.st_size for stem, stat in scan_features(tmp_path).items()} == {"c": 2}


def test_journals_of_several_processes_are_one_manifest(tmp_path):
    with open_journal(tmp_path, "a network") as first, open_journal(tmp_path, "a network") as second:
        entries = {"a": add_feature(tmp_path, "a", first), "b": add_feature(tmp_path, "b", second, b"others")}
        assert read(tmp_path).entries == entries  # while both are at work
    merge_journals(tmp_path)
    assert read(tmp_path) == Manifest("a network", entries, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "b.npy", _MANIFEST]

    before = (tmp_path / _MANIFEST).stat().st_mtime_ns
    merge_journals(tmp_path)
    assert (tmp_path / _MANIFEST).stat().st_mtime_ns == before  # nothing new


def test_a_journal_without_lines_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_journal(tmp_path, "a network"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_second_network_is_refused_and_the_first_goes_on(tmp_path):
    with open_journal(tmp_path, "a network") as journal:
        with pytest.raises(UserError, match="features of two networks .*name another --features_dir, or delete"):
            with open_journal(tmp_path, "another network"):
                pytest.fail("two networks in one cache")
        add_feature(tmp_path, "a", journal)
    assert read(tmp_path).network == "a network"


def test_a_line_without_its_feature_does_no_harm(tmp_path):
    """A process was killed after it wrote the line, and before it renamed the feature."""
    with open_journal(tmp_path, "a network") as journal:
        old = add_feature(tmp_path, "a", journal)
        journal.add({"a": Entry(FileState(7, 8, 9), FileState(1, 1, 1))})  # made again
        journal.add({"b": Entry(FileState(7, 8, 9), IMAGE)})
    assert live_manifest(tmp_path).entries == {"a": old}
    merge_journals(tmp_path)
    assert read(tmp_path).entries == {"a": old}


def test_of_two_lines_the_one_that_fits_the_file_counts(tmp_path):
    for content in (b"old", b"new"):
        let_time_pass(tmp_path)
        with open_journal(tmp_path, "a network") as journal:
            entry = add_feature(tmp_path, "a", journal, content)
    assert read(tmp_path).entries == {"a": entry}
    names = sorted(path.name for path in tmp_path.glob("*.jsonl"))
    os.rename(tmp_path / names[1], tmp_path / "manifest-0.jsonl")  # as of a host whose clock is wrong
    assert read(tmp_path).entries == {"a": entry}


def test_a_half_line_is_left_out(tmp_path):
    with open_journal(tmp_path, "a network") as journal:
        entry = add_feature(tmp_path, "a", journal)
        add_feature(tmp_path, "b", journal)
    with open(journal.path, "r+b") as file:
        file.truncate(journal.path.stat().st_size - 3)
    assert read(tmp_path).entries == {"a": entry}


class ShortWrites:
    """In place of a journal's file: each write takes some bytes only, and after so many the disk is full."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        count = self.file.write(data[: min(20, self.room)])
        self.room -= count
        if not count:
            raise OSError(errno.ENOSPC, "No space left on device")
        return count

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_what_a_short_write_left_out_is_written(tmp_path):
    with open_journal(tmp_path, "a network") as journal:
        journal.file = ShortWrites(journal.file, 10_000)
        entries = {stem: add_feature(tmp_path, stem, journal) for stem in "ab"}
    assert read(tmp_path).entries == entries


def test_lines_for_which_there_is_no_room_do_not_spoil_the_next(tmp_path):
    with open_journal(tmp_path, "a network") as journal:
        file, journal.file = journal.file, ShortWrites(journal.file, 30)
        with pytest.raises(OSError, match="No space"):
            add_feature(tmp_path, "a", journal)
        journal.file = file
        entry = add_feature(tmp_path, "b", journal)
    assert read(tmp_path).entries == {"b": entry}
    assert len(journal.path.read_bytes().splitlines()) == 2


def test_a_journal_without_its_first_line_is_left_out_where_others_name_the_network(tmp_path):
    (tmp_path / "manifest-1-a.jsonl").write_bytes(b"\0" * 50)
    with pytest.raises(UserError, match="manifest-1-a.jsonl is damaged"):
        read(tmp_path)
    with open_journal(tmp_path, "a network") as journal:
        entry = add_feature(tmp_path, "a", journal)
    merge_journals(tmp_path)
    assert read(tmp_path) == Manifest("a network", {"a": entry}, [])


def test_changed_features_are_not_live_and_copied_ones_are(tmp_path):
    with open_journal(tmp_path, "a network") as journal:
        entries = {stem: add_feature(tmp_path, stem, journal) for stem in "abcd"}
    let_time_pass(tmp_path)
    os.utime(tmp_path / "b.npy", ns=(1, 1))
    (tmp_path / "c.npy").write_bytes(b"NUMBERS")
    (tmp_path / "d.npy").write_bytes(b"num")
    live = live_manifest(tmp_path)
    copied = entries["b"]._replace(feature=entries["b"].feature._replace(mtime_ns=1))
    assert live.entries == {"a": entries["a"], "b": copied}


def test_a_journal_that_another_process_merges_meanwhile_is_read_all_the_same(tmp_path, monkeypatch):
    with open_journal(tmp_path, "a network") as journal:
        entry = add_feature(tmp_path, "a", journal)
    read_bytes = pathlib.Path.read_bytes

    def merge_first(path):
        if path == journal.path and path.exists():
            monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
            merge_journals(tmp_path)
        return read_bytes(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", merge_first)
    assert read(tmp_path) == Manifest("a network", {"a": entry}, [])


@pytest.mark.parametrize("header", [b"", b"{}", b"[1]", b'{"network": 3}', b"\xff", b"[" * 100_000])
def test_a_damaged_first_line_is_one_line_that_names_both_ways_out(tmp_path, header):
    (tmp_path / _MANIFEST).write_bytes(header + b'\n["a", [1, 2, 3], [4, 5, 6]]\n')
    with pytest.raises(UserError, match=r"manifest.jsonl is damaged .*another --features_dir, or delete the [^\n]*$"):
        read(tmp_path)


@pytest.mark.slow
@example(b'["a", "abc", [4, 5, 6]]')
@example(b'["a", [true, 2, 3], null]')
@example(b"[" * 100_000)
@given(st.binary() | JSON.map(json.dumps).map(str.encode))
def test_any_line_is_read_or_left_out(line):
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, _MANIFEST).write_bytes(b'{"network": "a network"}\n' + line)
        for stem, entry in read_manifest(folder, {}).entries.items():
            assert isinstance(stem, str) and isinstance(entry, Entry)


@pytest.mark.slow
@given(st.binary() | JSON.map(json.dumps).map(str.encode))
def test_any_manifest_is_read_or_one_line(data):
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, _MANIFEST).write_bytes(data)
        try:
            read_manifest(folder, {})
        except UserError as error:
            check_one_line(error)
