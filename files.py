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


def read_json(path, mend):
    """The value in a JSON file; UserError with the command `mend` where it is missing or damaged."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {mend}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {mend}") from None
