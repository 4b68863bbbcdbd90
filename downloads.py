"""Files from the network, of which a bad one never passes for a good one: fetched whole, checked, then renamed."""

import contextlib
import functools
import hashlib
import http.client
import lzma
import os
import pathlib
import queue
import re
import shutil
import stat
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib

import files
from command_line import UserError

from tqdm import tqdm

PIECE = 1 << 18  # bytes read at a time
IN_A_ROW = 20  # downloads that fail one after the other before the rest is given up
EXPANSION, SLACK = 100, 10_000_000  # an archive may unpack to so many times its size, plus so many bytes


class DownloadError(UserError):
    """A file that could not be fetched: `reason` in a few words, `refused` where trying again is of no use."""

    def __init__(self, url, path, reason, refused=False):
        super().__init__(
            f"{url} cannot be downloaded ({reason}): download it with a browser, put it at {path} "
            "and run the same command again"
        )
        self.reason = reason
        self.refused = refused


class AttemptFailed(Exception):
    """One attempt failed; another continues the .part file."""


class WrongPart(AttemptFailed):
    """The .part file is not the beginning of the file wanted: another attempt starts over."""


def download(url, path, size=None, sha256=None, attempts=5, timeout=20.0, back_off=1.0, progress=True, limit=None):
    """Fetch `url` to `path`, by way of `path`.part, which the next attempt or run continues.

    A file already at `path` stays as it is, provided it is not empty and has `size` bytes.

    Args:
      size: int, bytes of the file; None to go by the length that the server announces.
      sha256: str, hexadecimal digest of the file, checked when the download is complete; None to go without.
      attempts: int, tries in all; after a second wrong digest or file too long there is no other.
      timeout: float, seconds that the server may be silent.
      back_off: float, seconds before the second attempt, doubled before each further one.
      limit: int, bytes that a file of unknown size may have at the most.

    Raises:
      DownloadError: the URL is not http or https, the server refuses it, or the last attempt failed.
      UserError: the disk is full or the folder cannot be written.
    """
    path = pathlib.Path(path)
    if is_present(path, size):
        return
    wrong = 0
    for attempt in range(attempts):
        if attempt:
            time.sleep(back_off * 2 ** (attempt - 1))
        try:
            return fetch(url, path, size, sha256, timeout, progress, limit)
        except AttemptFailed as error:
            reason = str(error)
            wrong += isinstance(error, WrongPart)
        if wrong == 2:
            break
    raise DownloadError(url, path, reason)


def is_present(path, size):
    found = path.stat().st_size if path.is_file() else 0
    return found > 0 and size in (None, found)


def fetch(url, path, size, sha256, timeout, progress, limit):
    """One attempt of `download`."""
    # The tag is the server's name for one version of the file. Without it, or a digest of the whole,
    # a part of one version could be continued with the bytes of another.
    part, tag = (path.with_name(path.name + ending) for ending in (".part", ".part.tag"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        start = part.stat().st_size if part.exists() and (tag.exists() or sha256) else 0
        if start != size:
            with open_url(url, path, start, timeout) as response:
                first, whole = announced_extent(response, size, sha256)
                if limit and whole and whole > limit:
                    raise DownloadError(url, path, f"it is longer than {limit:,} bytes", refused=True)
                new_tag = response.headers["ETag"] or response.headers["Last-Modified"] or ""
                if first == 0:
                    part.unlink(missing_ok=True)
                    tag.unlink(missing_ok=True)
                    if new_tag:
                        files.write_bytes(tag, new_tag.encode())
                elif first != start or (tag.exists() and tag.read_text(encoding="utf-8") != new_tag):
                    raise WrongPart("the file on the server is not the one begun")
                receive(response, part, first, whole, progress, limit)
        if sha256 and file_digest(part) != sha256.lower():
            raise WrongPart("its SHA-256 digest is not the expected one")
        os.replace(part, path)
        tag.unlink(missing_ok=True)
    except WrongPart:
        part.unlink(missing_ok=True)
        raise
    except OSError as error:  # of the disk: open_url and read_pieces catch the network's
        raise UserError(f"cannot write {path}: {error.strerror or error} ({files.free_space(path.parent)})") from error


def open_url(url, path, start, timeout):
    """The response to a request for the bytes of `url` from `start` on."""
    try:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise ValueError("only http and https addresses are fetched")
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            raise WrongPart("the file on the server is not the one begun") from None
        if error.code in (408, 429) or error.code >= 500:
            raise AttemptFailed(f"HTTP status {error.code}") from None
        raise DownloadError(url, path, f"HTTP status {error.code}", refused=True) from None
    except (ValueError, http.client.InvalidURL) as error:
        raise DownloadError(url, path, str(error), refused=True) from None
    except (OSError, http.client.HTTPException) as error:
        raise AttemptFailed(describe(error)) from None


def describe(error):
    error = getattr(error, "reason", error)
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def announced_extent(response, size, sha256):
    """(first byte in the response, bytes of the whole file or None); AttemptFailed where it cannot be the file."""
    if response.status not in (200, 206):
        raise AttemptFailed(f"HTTP status {response.status}")
    if response.headers.get_content_type() == "text/html":  # a login or error page
        raise AttemptFailed("the server sent a web page in its place")
    first, whole = 0, response.length
    if response.status == 206:
        extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
        if not extent:
            raise WrongPart("the server does not say which part it sent")
        first, whole = int(extent[1]), int(extent[2])
    if whole == 0 or (size and whole not in (None, size)):
        raise AttemptFailed(f"the server's file has {whole:,} bytes" + (f", not {size:,}" if size else ""))
    if whole is None and not (size or sha256 or response.chunked):
        raise AttemptFailed("the server does not say how long the file is")
    return first, whole or size


def receive(response, part, first, whole, progress, limit):
    """Append the response to `part`, which then has `whole` bytes, or with None up to `limit` that it brings."""
    most = whole or limit
    bar = tqdm(total=whole, initial=first, unit="B", unit_scale=True, desc=part.stem, disable=not progress)
    with bar, open(part, "ab") as file:
        for piece in read_pieces(response):
            file.write(piece)
            bar.update(len(piece))
            if most and file.tell() > most:
                break
    found = part.stat().st_size
    if most and found > most:
        raise WrongPart(f"it is longer than {most:,} bytes")
    if found < (whole or 1):
        raise AttemptFailed(f"the connection ended after {found:,} bytes")


def read_pieces(response):
    try:
        while piece := response.read1(PIECE):
            yield piece
    except (OSError, http.client.HTTPException) as error:
        raise AttemptFailed(describe(error)) from None


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_all(jobs, workers, attempts=3, timeout=20.0, back_off=1.0, progress=True, limit=None, give_up=IN_A_ROW):
    """Fetch many small files, `workers` at a time; those already there cost nothing.

    Args:
      jobs: list of (url, path).
      attempts, timeout, back_off, limit: as in `download`, for each file.
      give_up: int, files that may fail one after the other before the rest is given up; None to try them all.

    Returns:
      sorted list of (pathlib.Path, str reason) of the files that could not be fetched

    Raises:
      UserError: `give_up` files failed one after the other, none by a refusal such as 404, or the disk is full.
    """
    urls = {pathlib.Path(path): url for url, path in jobs}
    missing = [(url, path) for path, url in urls.items() if not is_present(path, None)]
    try_one = functools.partial(try_download, attempts=attempts, timeout=timeout, back_off=back_off, limit=limit)
    failed, in_a_row = [], 0
    bar = tqdm(total=len(urls), initial=len(urls) - len(missing), unit="file", disable=not progress)
    waiting, results = queue.SimpleQueue(), queue.SimpleQueue()
    for job in missing:
        waiting.put(job)
    for _ in range(workers):  # daemons: Ctrl-C leaves at any moment, where a pool would wait for every open connection
        threading.Thread(target=work, args=(try_one, waiting, results), daemon=True).start()
    try:
        with bar:
            for _ in missing:
                path, error = next_result(results)
                bar.update()
                if error and not isinstance(error, DownloadError):
                    raise error
                if error:
                    failed.append((path, error.reason))
                in_a_row = in_a_row + 1 if error and not error.refused else 0
                if in_a_row == give_up:
                    raise UserError(
                        f"{give_up} downloads in a row failed, the last of them {urls[path]} ({error.reason}): "
                        "check the network and run the same command again"
                    )
    finally:
        work(str, waiting, queue.SimpleQueue())  # nothing is left for the threads
    return sorted(failed)


def work(function, waiting, results):
    """Put what the function makes of each job that waits into `results`, until none is left."""
    with contextlib.suppress(queue.Empty):
        while True:
            results.put(function(waiting.get_nowait()))


def next_result(results):
    while True:
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=0.5)  # a Ctrl-C that comes as the wait begins is seen only when it ends


def try_download(job, **options):
    url, path = job
    try:
        download(url, path, progress=False, **options)
    except Exception as error:  # raised again where the results are read, if it is not a DownloadError
        return path, error
    return path, None


def unpack(archive, folder, wanted=None, progress=True):
    """Unzip `archive` into `folder`; members already there with the right size stay as they are.

    Args:
      wanted: function of a member's name, true where the member is to be unpacked; None for all.

    Raises:
      UserError: before anything is written: a member that leaves `folder` or is a link, or more bytes than an honest
        archive holds or the disk takes; later: a damaged archive or a full disk.
    """
    archive, folder = pathlib.Path(archive), pathlib.Path(folder)
    try:
        with zipfile.ZipFile(archive) as source:
            members = [member for member in source.infolist() if not member.filename.endswith("/")]
            check_members(archive, members)
            members = [member for member in members if wanted is None or wanted(member.filename)]
            members = [member for member in members if not is_present(folder / member.filename, member.file_size)]
            total = sum(member.file_size for member in members)
            folder.mkdir(parents=True, exist_ok=True)
            if total > shutil.disk_usage(folder).free:
                raise UserError(f"{archive} unpacks to {total / 1e6:,.0f} MB ({files.free_space(folder)})")
            with tqdm(total=total, unit="B", unit_scale=True, desc=archive.name, disable=not progress) as bar:
                for member in members:
                    extract(source, member, folder / member.filename, bar)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, UnicodeError) as error:
        raise UserError(f"{archive} is damaged ({error}): delete it and run the same command again") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot unpack {archive} ({reason}): mend that and run the same command again") from error


def check_members(archive, members):
    """UserError where a member is unsafe, or where all are more than an honest archive holds."""
    mend = "delete it and run the same command again"
    for member in members:
        if fault := member_fault(member):
            raise UserError(f"{archive} is not safe to unpack, {member.filename!r} {fault}: {mend}")
    total = sum(member.file_size for member in members)
    if total > EXPANSION * archive.stat().st_size + SLACK:
        largest = max(members, key=lambda member: member.file_size).filename
        raise UserError(f"{archive} is not safe to unpack, with {largest!r} it swells to {total / 1e6:,.0f} MB: {mend}")


def member_fault(member):
    """What makes a zip member unsafe, or None; names are read as on Windows, which knows every way out of a folder."""
    name = pathlib.PureWindowsPath(member.filename)
    if name.drive or name.root or ".." in name.parts or not name.parts:
        return "leaves the folder"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
        return "is a link or another special file"


def extract(source, member, path, bar):
    with files.replacing(path) as temporary, open(temporary, "wb") as file, source.open(member) as content:
        while piece := content.read(PIECE):  # zipfile ends at the declared size and compares the CRC-32 there
            file.write(piece)
            bar.update(len(piece))
        if file.tell() != member.file_size:
            raise zipfile.BadZipFile(f"{member.filename!r} is shorter than declared")
