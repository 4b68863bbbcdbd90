"""Files that are either whole or not there: written beside their target, then renamed over it."""

import contextlib
import csv
import io
import json
import os
import pathlib
import shutil
import threading

from command_line import UserError

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

TEMPORARY = ".tmp-"


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path beside `path`, of the same ending; it takes `path`'s place when the block ends well.

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{threading.get_ident()}-{path.name}")
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


def remove_leftovers(folder):
    """Delete the temporary files that killed runs left in `folder`, and none of a process that is at work."""
    for path in pathlib.Path(folder).glob(f"{TEMPORARY}*"):
        process = path.name.removeprefix(TEMPORARY).partition("-")[0]
        if not is_other_process(process):
            with contextlib.suppress(OSError):  # Windows deletes no open file
                path.unlink()


def is_other_process(number):
    """Whether a process other than this one runs under the number, a str; not known on Windows."""
    if not number.isdecimal() or int(number) == os.getpid() or os.name == "nt":
        return False
    try:
        os.kill(int(number), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


@contextlib.contextmanager
def locked(folder, name="run"):
    """Keep other processes out of this block for the same folder and name; a process that dies lets go.

    Raises:
      UserError: another process is inside, and is named; or the folder cannot be written.
    """
    path = pathlib.Path(folder, f".{name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+"))
            lock_file(file)
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


def lock_file(file):
    """Lock an open file for as long as it is open; BlockingIOError where another has locked it."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
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
