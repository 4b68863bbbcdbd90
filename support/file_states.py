"""Whether files have changed since they were recorded, without reading more of them than necessary."""

import concurrent.futures
import contextlib
import os
import pathlib
import zlib
from stat import S_ISREG
from typing import NamedTuple

from support.devices import usable_cores
from support.errors import printable
from support.files import raise_if_lost


class FileState(NamedTuple):
    """What tells whether a file has changed: its size in bytes, its modification time in ns and its CRC-32."""

    size: int
    mtime_ns: int
    crc32: int


def make_state(stat, crc32):
    return FileState(stat.st_size, stat.st_mtime_ns, crc32)


def read_state(path):
    """Read a file. Returns its FileState, or None if it cannot be read; UserError where its drive has gone."""
    stat = find_stat(path)  # before it is read: a change in between shows later
    try:
        return make_state(stat, zlib.crc32(pathlib.Path(path).read_bytes())) if stat else None
    except OSError as error:
        raise_if_lost(error, path)
        return None


def find_stat(path):
    """A file's os.stat_result, or None if there is no such file, or something that is no file, such as a named pipe.

    Raises:
      UserError: its drive has gone.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise_if_lost(error, path)
        return None
    return found if S_ISREG(found.st_mode) else None


def has_size_and_time(stat, state):
    return stat is not None and (stat.st_size, stat.st_mtime_ns) == (state.size, state.mtime_ns)


def renew_states(paths, stats, states):
    """Find out which files are still those that were recorded.

    Args:
      paths: list of N paths.
      stats: list of N os.stat_result, or None for a file that is not there.
      states: list of N FileState, as recorded.

    Returns:
      list of N FileState with the present time, or None for each file that is not there or has changed
    """
    renewed = [state if has_size_and_time(stat, state) else None for stat, state in zip(stats, states, strict=True)]
    unsure = [i for i, stat in enumerate(stats) if stat and not renewed[i] and stat.st_size == states[i].size]
    if unsure:
        such = printable(paths[unsure[0]])
        print(f"other times than recorded: {len(unsure)}, such as {such}; reading whether more has changed")
    with cancelling_pool(usable_cores()) as pool:
        for i, state in zip(unsure, pool.map(read_state, [paths[i] for i in unsure]), strict=True):
            renewed[i] = state if state and state.crc32 == states[i].crc32 else None
    return renewed


@contextlib.contextmanager
def cancelling_pool(workers):
    """A pool of threads. When the block ends, by Ctrl-C for example, no further job begins and none is waited for."""
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
