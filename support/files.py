"""Files that are either whole or not there.

Each file is written beside its target and then renamed, so that a killed process or a full disk leaves no half file.
"""

import contextlib
import csv
import errno
import fnmatch
import hashlib
import io
import json
import os
import pathlib
import re
import secrets
import shutil
import time

from support.errors import FileError, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

TEMPORARY = ".tmp-"  # temporary files' names begin with this
STALE = 3600.0  # seconds: no process writes one temporary file for so long

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What a drive answers that fails or has gone, such as one of the network.
_LOST = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO}
_RENAME_WAITS = (0.05, 0.1, 0.2, 0.5, 1.0)  # seconds between attempts to rename a file on Windows
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}  # what file systems without locks answer


def read_json(path, kind=object):
    """Read a JSON file.

    Args:
      kind: class that the value must be an instance of.

    Raises:
      FileError: the file is missing, damaged or holds another kind of value.
    """
    try:
        value = json.loads(pathlib.Path(path).read_bytes())  # UTF-8 or UTF-16, with or without a byte order mark
    except FileNotFoundError:
        raise FileError(path, "is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise FileError(path, f"cannot be read ({error})") from None
    if not isinstance(value, kind):
        raise FileError(path, f"is damaged (it holds no {kind.__name__})")
    return value


def write_json(path, value, indent=None):
    # What is no UTF-8 in a file name gets JSON's escape.
    data = (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    write_bytes(path, data)


def write_csv(path, rows):
    """Write a list of dicts of the same keys. The first line holds the keys."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def write_bytes(path, data):
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_durably(path, data):
    """Write a file that outlives a power cut once this returns."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if os.name == "posix":  # Windows syncs no folders
        folder = os.open(pathlib.Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the file's name
        finally:
            os.close(folder)


@contextlib.contextmanager
def replacing(path):
    """Give the block a temporary path beside `path`, with the same ending, and rename it to `path` when the block ends.

    If the block raises an error, the temporary file is deleted and `path` stays as it was.

    Raises:
      UserError: the file cannot be written, say because the disk is full.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(6)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        rename(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason_and_remedy(error, path.parent)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def walk_folder(folder, onerror=None):
    """os.walk that enters linked folders too. Each folder comes once: by its own place, or else by its first link.

    Args, yields: as of os.walk. Names that the caller takes out of a list of folders are not entered.
    """
    seen, waiting = set(), [os.fspath(folder)]
    while waiting:
        for place, folders, files in os.walk(waiting.pop(0), onerror=onerror):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            yield place, folders, files
            waiting += filter(os.path.islink, (os.path.join(place, name) for name in folders))


def rename(source, target):
    """os.replace. On Windows it fails while a virus scanner, say, has one of the files open, and is tried again."""
    for seconds in () if fcntl else _RENAME_WAITS:
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(seconds)
    os.replace(source, target)


def file_digest(path, algorithm="sha256"):
    """The digest of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def list_folder(folder, pattern="*"):
    """The paths in a folder whose names fit a pattern, in order; none where there is no folder.

    Unlike `glob` it never takes a folder that cannot be listed for an empty one.

    Raises:
      OSError: the folder cannot be listed.
    """
    try:
        return [pathlib.Path(folder, name) for name in sorted(fnmatch.filter(os.listdir(folder), pattern))]
    except (FileNotFoundError, NotADirectoryError):
        return []


def unusable_file(error):
    """What a user can do about an OSError of a file, a folder or its drive; None where it is of something else."""
    if error.filename is None and error.errno not in _LOST:
        return None
    named = isinstance(error.filename, str | bytes | os.PathLike)  # and not a number of an open file
    what = os.fsdecode(error.filename) if named else "a file or folder"
    remedy = "see that it can be read and written and that its drive is there, and run the same command again"
    return f"cannot use {what} ({error.strerror or error}): {remedy}"


def raise_if_lost(error, path):
    """Raise UserError where an OSError says that the drive fails or has gone, and not that the file is at fault."""
    if error.errno in _LOST:
        raise UserError(unusable_file(OSError(error.errno, error.strerror, path))) from error


def is_pattern(path):
    """Whether TensorFlow cannot read weights by this path: it takes it for a pattern, though not when it writes."""
    return re.search(r"[\[\\]", pathlib.Path(path).as_posix()) is not None


def reason_and_remedy(error, folder):
    """Why nothing could be written to `folder`, as an OSError says, and what the user can do about it."""
    folder = pathlib.Path(folder)
    if error.errno in _NO_SPACE:
        remedy = free_space(folder)
    else:
        usable = f"see that you may write to the folder {folder} and that no other program has the file open"
        remedy = f"{usable}, or choose another folder with the options in --help"
    return f"{error.strerror or error} ({remedy})"


def free_space(folder):
    """How much space is free in a folder, or where the folder would be, and what to do if that is too little."""
    return f"{disk_usage(folder).free / 1e6:,.0f} MB free there; make room and run the same command again"


def disk_usage(folder):
    """shutil.disk_usage of a folder, or of where it would be."""
    folder = pathlib.Path(folder)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder)


def remove_leftovers(folder, age=0.0):
    """Delete the temporary files that killed processes left in `folder`.

    A file that cannot be deleted stays, as it does no harm.

    Args:
      age: float, seconds; younger files stay. STALE where other processes may be writing to the same folder.
    """
    paths = []
    with contextlib.suppress(OSError):  # what is wrong with the folder, its next reader says
        paths = list_folder(folder, f"{TEMPORARY}*")
    for path in paths:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= age:
                path.unlink()


@contextlib.contextmanager
def locked(folder, name="run", shared=False):
    """Keep other processes out of blocks for the same folder and name, until the block or this process ends.

    On a file system without locks the block runs all the same. One printed line then tells the user.

    Args:
      name: str, which of the folder's locks to take.
      shared: bool, let in other processes whose lock is `shared` too.

    Raises:
      UserError: another process holds the lock, or the folder cannot be written.
    """
    path = pathlib.Path(folder, f".{name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)  # without a buffer, closing the file writes nothing and cannot fail
    except OSError as error:
        raise UserError(f"cannot lock {path}: {reason_and_remedy(error, path.parent)}") from error
    with file:
        _take_lock(file, path, shared)
        yield


def _take_lock(file, path, shared):
    """Lock the open file `path` and write this process's number into it; UserError where another has locked it."""
    try:
        _lock_file(file, shared)
        file.truncate(0)
        file.write(str(os.getpid()).encode())
    except BlockingIOError:
        raise UserError(
            f"{_lock_holder(file)} is at work on {path.parent}: wait until it has ended, or stop it"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UserError(f"cannot lock {path}: {reason_and_remedy(error, path.parent)}") from error
        others = "only processes that may share it" if shared else "only one process at a time"
        print(f"the file system of {path.parent} has no locks ({error.strerror}): let {others} work on that folder")


def _lock_file(file, shared):
    """Lock an open file until it is closed; BlockingIOError where another process has locked it."""
    if fcntl:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return
    if shared:
        return  # msvcrt has no shared locks
    file.seek(1 << 20)  # far behind the process number, because Windows lets nobody read locked bytes
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError from error


def _lock_holder(file):
    """`process 123`, as the process that holds the lock wrote into the file; some file systems let nobody read it."""
    with contextlib.suppress(OSError):
        file.seek(0)
        if number := file.read(20).decode(errors="replace"):
            return f"process {number}"
    return "another process"
