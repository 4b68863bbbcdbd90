import os
import shutil

import pytest

from conftest import let_time_pass
from support.file_states import find_stat, has_size_and_time, read_state, renew_states


def renew(path, state):
    return renew_states([path], [find_stat(path)], [state])[0]


@pytest.fixture
def recorded(tmp_path):
    """A file and its state."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"an image")
    return path, read_state(path)


def test_a_file_that_did_not_change_is_not_read(recorded, monkeypatch):
    path, state = recorded
    monkeypatch.setattr("support.file_states.read_state", None)
    assert renew(path, state) == state


def test_a_file_of_another_time_is_read_and_its_new_time_returned(recorded, tmp_path, capsys):
    path, state = recorded
    copy = tmp_path / "copy.jpg"
    shutil.copyfile(path, copy)
    os.utime(copy, ns=(1, 1))
    assert renew(copy, state) == state._replace(mtime_ns=1)
    assert f"other times than recorded: 1, such as {copy}" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"a picturE", b"a longer image", b""])
def test_another_content_is_a_change(recorded, content):
    path, state = recorded
    path.write_bytes(content)
    os.utime(path, ns=(state.mtime_ns + 1, state.mtime_ns + 1))
    assert renew(path, state) is None


def test_another_size_is_a_change_even_at_the_same_time(recorded, monkeypatch):
    path, state = recorded
    path.write_bytes(b"a longer image")
    os.utime(path, ns=(state.mtime_ns, state.mtime_ns))
    monkeypatch.setattr("support.file_states.read_state", None)  # the size tells
    assert renew(path, state) is None


def test_a_file_that_is_gone_or_cannot_be_read_is_a_change(recorded, tmp_path):
    path, state = recorded
    os.utime(path, ns=(1, 1))
    stat = find_stat(path)
    path.unlink()
    assert find_stat(path) is None and read_state(path) is None
    assert renew_states([path, path], [None, stat], [state, state]) == [None, None]
    path.mkdir()
    assert read_state(path) is None


def test_each_of_many_files_gets_its_own_answer(tmp_path):
    paths = [tmp_path / str(number) for number in range(40)]
    for path in paths:
        path.write_text(path.name)
    states = [read_state(path) for path in paths]
    let_time_pass(tmp_path)
    for path in paths[10:]:
        os.utime(path, ns=(1, 1))
    for path in paths[20:30]:
        path.write_text("x" * len(path.name))
    paths[30].unlink()
    renewed = renew_states(paths, [find_stat(path) for path in paths], states)
    assert renewed[:10] == states[:10]
    assert renewed[10:20] == [state._replace(mtime_ns=1) for state in states[10:20]]
    assert renewed[20:31] == [None] * 11
    assert all(has_size_and_time(find_stat(path), state) for path, state in zip(paths[31:], renewed[31:], strict=True))
