"""Files that are either whole or not there: written beside their target, then renamed over it."""

import contextlib
import csv
import io
import json
import os
import pathlib
import secrets
import shutil
import time

from command_line import UserError

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

TEMPORARY = ".tmp-"
STALE = 3600.0  # seconds after which no host is still writing a temporary file


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path beside `path`, of the same ending; it takes `path`'s place when the block ends well.

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error} ({free_space(path.parent)})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def free_space(folder):
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB free there; make room and run the same command again"


def remove_leftovers(folder, age=0.0):
    """Delete the temporary files that a killed run left in `folder`.

    Args:
      age: float, seconds; younger ones stay. STALE where other hosts write to the same folder.
    """
    for path in pathlib.Path(folder).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= age:
                path.unlink()


@contextlib.contextmanager
def locked(folder, name="run", shared=False):
    """Keep other processes out of this block for the same folder and name; a process that dies lets go.

    Args:
      shared: bool, let in others that are `shared` too.

    Raises:
      UserError: another process is inside, and is named; or the folder cannot be written.
    """
    path = pathlib.Path(folder, f".{name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+"))
            lock_file(file, shared)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"process {file.read()} is at work on {folder}: wait until it has ended, or stop it"
            ) from None
        except OSError as error:
            raise UserError(f"cannot lock {path}: {error.strerror} ({free_space(path.parent)})") from error
        yield


def lock_file(file, shared):
    """Lock an open file for as long as it is open; BlockingIOError where another has locked it."""
    if fcntl:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return
    if shared:
        return  # msvcrt has no such lock
    file.seek(1 << 20)  # behind the process id, as Windows lets nobody read what is locked
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError from error


def write_bytes(path, data):
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path, value, indent=None):
    write_bytes(path, (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode())


def write_npy(path, array):
    data = io.BytesIO()
    np.save(data, array, allow_pickle=False)
    write_bytes(path, data.getbuffer())


def write_csv(path, rows):
    """Write a list of dicts of the same keys, the keys as the first line."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def read_json(path, mend, kind=object):
    """The value in a JSON file; UserError with the command `mend` where it is missing, damaged or not of this kind."""
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {mend}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {mend}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} is damaged (it holds no {kind.__name__}): {mend}")
    return value
