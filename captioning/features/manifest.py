"""The manifest of a feature cache: which network made its features, and which image each was made from.

  manifest.jsonl                  the network's identity, then a line for each feature file
  manifest-<time>-<token>.jsonl   the same, of a process that is at work or was stopped: its journal

A line has the size, modification time and CRC-32 of the feature file, and of its image. A file of the same size and
time counts as unchanged and is not read. If only the time differs, as after copying the folder, the CRC-32 decides.

The lines of a batch are on the disk before its features take their names. So a kill or a power cut can leave a line
without a whole feature, which is made again, as is a feature without a line. Each process writes a journal of its own,
so that several hosts can add features at once. A run that has the folder for itself merges the journals into the
manifest.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import time
from typing import NamedTuple

from support.errors import UserError
from support.file_states import FileState, has_size_and_time, renew_states
from support.files import list_folder, write_durably

_MANIFEST = "manifest.jsonl"
MADE_ELSEWHERE = "made elsewhere"  # in the place of a network's identity, where another program made the features


class Entry(NamedTuple):
    """A feature file, and the image that it was made from. None stands for an image that is not known."""

    feature: FileState
    image: FileState | None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known of the features in a folder.

    Attributes:
      network: str, identity of the network that made them, MADE_ELSEWHERE, or None where nothing is known. Without
        lines it may be that of random weights which have no calibration yet.
      entries: dict of stem to Entry.
      journals: list of paths, the journals that are part of it.
    """

    network: str | None
    entries: dict[str, Entry]
    journals: list[pathlib.Path] = ()


def scan_features(folder):
    """The feature files in a folder. Reads none of them. Path -> dict of stem to os.stat_result."""
    try:
        with os.scandir(folder) as found:
            return {
                entry.name[: -len(".npy")]: entry.stat()
                for entry in found
                if entry.name.endswith(".npy") and not entry.name.startswith(".") and entry.is_file()
            }
    except FileNotFoundError:
        return {}


def read_manifest(folder, files):
    """Read the manifest and all journals.

    Args:
      folder: path of the cache.
      files: dict of stem to os.stat_result, what `scan_features` found before. In this order, a feature that another
        process writes meanwhile is either not among the files or has its line.

    Returns:
      Manifest. Its lines may be of files that have changed or are gone. Of several lines of one feature it has the one
      that fits the file, or else the last.

    Raises:
      UserError: no file is left whole that names the network, or two networks have made features in this folder.
    """
    networks, entries, begun, damage = {}, {}, None, None
    journals = list_folder(folder, "manifest-*.jsonl")
    for path in [pathlib.Path(folder, _MANIFEST), *journals]:
        try:
            network, found = _read_lines(path)
        except FileNotFoundError:
            if path in journals:  # another process has merged it meanwhile
                return read_manifest(folder, files)
            continue
        except UserError as error:
            if path not in journals:
                raise
            damage = error  # features whose lines are lost with it are made again
            continue
        if found or path in journals:
            networks[network] = path
        else:
            begun = network  # by a run that had the folder for itself; nothing is made by this network yet
        for stem, entry in found:
            if stem not in entries or not has_size_and_time(files.get(stem), entries[stem].feature):
                entries[stem] = entry
    if damage and not networks and begun is None:
        raise damage
    if len(networks) > 1:
        first, second = list(networks)[:2]
        raise UserError(f"{folder} holds features of two networks ({first}; {second}): {ways_out(folder)}")
    return Manifest(next(iter(networks), begun), entries, journals)


def _read_lines(path):
    """Read one file of the manifest.

    Lines that are damaged are left out, such as the last one of a process that was killed.

    Returns:
      (str identity of the network, list of (stem, Entry))

    Raises:
      UserError: the first line is damaged.
    """
    header, *lines = path.read_bytes().split(b"\n")
    try:
        network = json.loads(header)["network"]
        if not isinstance(network, str):
            raise ValueError("the network has no name")
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        remedy = f"nothing else tells which network made the features, so {ways_out(path.parent)}"
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    return network, list(filter(None, map(_parse_line, lines)))


def _parse_line(line):
    """(stem, Entry) of a manifest's line, or None if it is damaged."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        stem, feature, image = json.loads(line)
        entry = Entry(FileState(*feature), None if image is None else FileState(*image))
        numbers = [*entry.feature, *(entry.image or ())]
        if isinstance(stem, str) and all(type(number) is int for number in numbers):
            return stem, entry
    return None


def write_manifest(folder, manifest):
    """Write the manifest and delete the journals that it holds now. No other process may be writing features."""
    lines = [_format_line(stem, entry) for stem, entry in sorted(manifest.entries.items())]
    data = b"".join([_format_header(manifest.network), *lines])
    path = pathlib.Path(folder, _MANIFEST)
    if not path.is_file() or path.read_bytes() != data:
        write_durably(path, data)
    for journal in manifest.journals:
        journal.unlink(missing_ok=True)


def _format_header(network):
    return json.dumps({"network": network}).encode() + b"\n"


def _format_line(stem, entry):
    return json.dumps([stem, *entry]).encode() + b"\n"


class Journal:
    """The lines of the manifest that one process adds, in a file of its own."""

    def __init__(self, path, network):
        self.path = path
        write_durably(path, _format_header(network))
        self.file = open(path, "ab", buffering=0)
        self.is_empty = True

    def add(self, entries):
        """Add the lines of a batch, a dict of stem to Entry, all or none. They outlive a power cut from now on."""
        data = b"".join(_format_line(stem, entry) for stem, entry in entries.items())
        end = self.file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self.file.write(data) :]  # which may write less than it is given
            os.fsync(self.file.fileno())
        except OSError:
            self.file.truncate(end)  # half a line would spoil the next
            raise
        self.is_empty = False


@contextlib.contextmanager
def open_journal(folder, network):
    """Claim a cache for a network, and give the block a Journal for its features.

    Raises:
      UserError: another process has claimed the cache for another network at the same time, or it cannot be written.
    """
    # The claim is written before the others are read: of two processes at least one sees the other's.
    path = pathlib.Path(folder, f"manifest-{time.time_ns()}-{secrets.token_hex(4)}.jsonl")
    journal = Journal(path, network)
    try:
        read_manifest(folder, {})
        yield journal
    finally:
        journal.file.close()
        if journal.is_empty:
            path.unlink(missing_ok=True)


def keep_live(folder, files, manifest):
    """The Manifest with only those lines whose feature files are unchanged, with their present times.

    Args:
      files: dict of stem to os.stat_result, as `scan_features` returns.
    """
    stems = [stem for stem in manifest.entries if stem in files]
    paths = [pathlib.Path(folder, f"{stem}.npy") for stem in stems]
    states = [manifest.entries[stem].feature for stem in stems]
    renewed = renew_states(paths, [files[stem] for stem in stems], states)
    entries = {
        stem: manifest.entries[stem]._replace(feature=state)
        for stem, state in zip(stems, renewed, strict=True)
        if state is not None
    }
    return dataclasses.replace(manifest, entries=entries)


def merge_journals(folder):
    """Make one manifest of all journals. No other process may be writing features."""
    files = scan_features(folder)
    manifest = read_manifest(folder, files)
    entries = {stem: entry for stem, entry in manifest.entries.items() if stem in files}
    if manifest.network is not None:
        write_manifest(folder, dataclasses.replace(manifest, entries=entries))


def ways_out(folder):
    """What the user can do about features of the wrong network."""
    return (
        f"name another --features_dir, or delete the .npy and .jsonl files in {folder}, "
        "and run python data_utils.py again to make the features anew"
    )
