"""Files from the network and out of zip archives. Each is fetched whole and checked before it takes its name."""

import contextlib
import functools
import http.client
import lzma
import multiprocessing.pool
import pathlib
import re
import shutil
import stat
import time
import zipfile
import zlib

import requests
import urllib3
from tqdm import tqdm

from support import connections, files
from support.errors import UserError

_PIECE = 1 << 18  # bytes read at a time
_LIMIT = 50_000_000  # bytes of a file whose size nobody knows beforehand, such as an image
_IN_A_ROW = 20  # downloads that may fail one after the other before the rest is given up
_DENIALS = {401, 403, 407, 451}  # HTTP statuses that speak of who asks, or how often, and not of the file


class DownloadError(UserError):
    """A file that could not be fetched.

    Attributes:
      reason: str, a few words.
      refused: bool, whether another attempt would fail as well.
      absent: bool, whether that is because of the file, and not because the server refuses to serve.
    """

    def __init__(self, url, path, reason, refused=False, absent=None):
        super().__init__(
            f"{url} cannot be downloaded ({reason}): download it with a browser, put it at {path} "
            "and run the same command again"
        )
        self.reason = reason
        self.refused = refused
        self.absent = refused if absent is None else absent


class AttemptFailed(Exception):
    """One attempt failed. Another may continue the .part file."""


class WrongPart(AttemptFailed):
    """The .part file is not the beginning of the file that the server has now. Another attempt starts over."""


def download_all(jobs, workers, progress=True, give_up=_IN_A_ROW, need_most=False, attempts=3, **options):
    """Fetch many small files, several at a time. Files that are there already cost nothing.

    Args:
      jobs: list of (url, path).
      workers: int, files fetched at a time.
      give_up: int, files that may fail one after the other before the rest is given up; None to try them all.
      need_most: bool, whether the rest is also given up where most files failed or were refused, 404 aside.
      attempts, options: as in `download`, for each file.

    Returns:
      sorted list of (pathlib.Path, str reason) of the files that could not be fetched

    Raises:
      UserError: `give_up` files failed one after the other, none of them by a refusal such as 404; most failed, where
        most are needed; or a file cannot be written.
    """
    urls = {pathlib.Path(path): url for url, path in jobs}
    missing = [(url, path) for path, url in urls.items() if not _is_present(path, None)]
    if not missing:
        return []
    try_one = functools.partial(_try_download, attempts=attempts, **options)
    bar = tqdm(total=len(urls), initial=len(urls) - len(missing), unit="file", disable=not progress)
    # At the end of the block no further file is begun. Unlike those of concurrent.futures, this pool's threads do not
    # hold up the end of the process, where a server may be silent for long.
    with bar, multiprocessing.pool.ThreadPool(min(workers, len(missing))) as pool:
        return _collect_failures(pool.imap_unordered(try_one, missing), len(missing), give_up, need_most, bar)


def _try_download(job, **options):
    """(url, path, None or the error) of one job."""
    url, path = job
    try:
        download(url, path, progress=False, **options)
    except Exception as error:
        return url, path, error
    return url, path, None


def _collect_failures(results, count, give_up, need_most, bar):
    """Read `count` results of `_try_download`; the arguments, the list returned and the errors are `download_all`'s."""
    failed, in_a_row, not_served = [], 0, 0
    for done in range(1, count + 1):
        url, path, error = _next_result(results)
        bar.update()
        if error and not isinstance(error, DownloadError):
            raise error
        in_a_row = in_a_row + 1 if error and not error.refused else 0
        if error:
            failed.append((path, error.reason))
            last = f"{url} ({error.reason})"
            not_served += not error.absent
        if in_a_row == give_up:
            raise UserError(
                f"{give_up} downloads in a row failed, the last of them {last}: "
                "check the network and run the same command again"
            )
        if need_most and done >= min(give_up or count, count) and not_served > done / 2:
            raise UserError(
                f"{not_served} of {done} downloads were refused or failed, such as {last}: "
                "the server may have been asked too often, so run the same command again later; what has come is kept"
            )
    return sorted(failed)


def _next_result(results):
    while True:
        with contextlib.suppress(multiprocessing.TimeoutError):
            return results.next(timeout=0.5)  # a wait without end could miss a Ctrl-C that comes as it begins


def download(
    url, path, size=None, sha256=None, attempts=5, timeout=20.0, back_off=1.0, progress=True, limit=_LIMIT, contact=""
):
    """Fetch `url` to `path`. What has come is kept in `path`.part, and the next attempt or run continues it.

    A file that is already at `path` stays as it is, unless it is empty or does not have `size` bytes.

    Args:
      size: int, bytes of the file; None to believe the length that the server announces.
      sha256: str, hexadecimal digest of the file, which is checked when all of it has come; None for no check.
      attempts: int, tries in all. After the second wrong digest or file too long there is no other.
      timeout: float, seconds that the server may be silent, and after which it must keep up `connections._LEAST_SPEED`.
      back_off: float, seconds before the second attempt, doubled before each further one.
      limit: int, bytes that a file may have at most where `size` is None.
      contact: str, as in `connections.get`.

    Raises:
      DownloadError: the address is not http or https, the server refuses it, or the last attempt failed.
      UserError: the file cannot be written, say because the disk is full.
    """
    path = pathlib.Path(path)
    if _is_present(path, size):
        return
    wrong = 0
    for attempt in range(attempts):
        if attempt:
            time.sleep(back_off * 2 ** (attempt - 1))
        try:
            return _fetch(url, path, size, sha256, timeout, progress, limit, contact)
        except AttemptFailed as error:
            reason = str(error)
            wrong += isinstance(error, WrongPart)
        if wrong == 2:
            break
    raise DownloadError(url, path, reason)


def _is_present(path, size):
    """Whether a file that is not empty is at `path`, of `size` bytes unless that is None."""
    found = path.stat().st_size if path.is_file() else 0
    return found > 0 and size in (None, found)


def _fetch(url, path, size, sha256, timeout, progress, limit, contact):
    """One attempt of `download`."""
    # The tag is the server's name for one version of the file. Without the tag or the digest of the whole file,
    # bytes of one version could be added to a part of another.
    part, tag = (path.with_name(path.name + ending) for ending in (".part", ".part.tag"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        start = part.stat().st_size if part.exists() and (tag.exists() or sha256) else 0
        if start != size:
            with _open_url(url, path, start, timeout, contact) as response:
                first, whole = _announced_extent(response, size, sha256)
                if whole and not size and whole > limit:
                    raise DownloadError(url, path, f"it is longer than {limit:,} bytes", refused=True)
                _prepare_part(part, tag, response, start, first)
                _receive(response, part, first, whole, progress, limit)
        if sha256 and files.file_digest(part) != sha256.lower():
            raise WrongPart("its SHA-256 digest is not the expected one")
        files.rename(part, path)
        tag.unlink(missing_ok=True)
    except WrongPart:
        part.unlink(missing_ok=True)
        raise
    except OSError as error:  # of the disk: _open_url and _read_pieces turn the network's errors into others
        raise UserError(f"cannot write {path}: {files.reason_and_remedy(error, path.parent)}") from error


def _open_url(url, path, start, timeout, contact):
    """Ask for the bytes of `url` from `start` on. Returns requests.Response of status 200 or 206, to be closed.

    Raises:
      DownloadError: the address is wrong or the server refuses it.
      AttemptFailed, WrongPart: as their names say.
    """
    try:
        response = connections.get(url, {"Range": f"bytes={start}-"} if start else {}, timeout, contact)
    except ValueError as error:  # of the address, or of one that it redirects to
        raise DownloadError(url, path, str(error), refused=True) from None
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
        raise AttemptFailed(_describe(error)) from None
    if response.status_code in (200, 206):
        return response
    response.close()
    if response.status_code == 416:
        raise WrongPart("the file on the server is not the one begun")
    refused = 400 <= response.status_code < 500 and response.status_code not in (408, 429)
    if refused:
        absent = response.status_code not in _DENIALS
        raise DownloadError(url, path, f"HTTP status {response.status_code}", refused, absent)
    raise AttemptFailed(f"HTTP status {response.status_code}")


def _describe(error):
    """What the system or the server said first. requests and urllib3 wrap it in errors of their own."""
    reason = error
    while error := error.__cause__ or error.__context__:
        reason = error
    if isinstance(reason, http.client.IncompleteRead):
        return "the connection ended too early"
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__


def _announced_extent(response, size, sha256):
    """What the headers of a response say.

    Returns:
      (first byte in the response, bytes of the whole file or None)

    Raises:
      AttemptFailed, WrongPart: the response cannot be the file, or not the part that was asked for.
    """
    if re.match(r"\s*text/html\b", response.headers.get("Content-Type", ""), re.IGNORECASE):  # a login or error page
        raise AttemptFailed("the server sent a web page in its place")
    first, whole = 0, response.raw.length_remaining
    if response.status_code == 206:
        extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not extent:
            raise WrongPart("the server does not say which part it sent")
        first, whole = int(extent[1]), int(extent[2])
    if whole == 0 or (size and whole not in (None, size)):
        raise AttemptFailed(f"the server's file has {whole:,} bytes" + (f", not {size:,}" if size else ""))
    if whole is None and not (size or sha256 or response.raw.chunked):
        raise AttemptFailed("the server does not say how long the file is")
    return first, whole or size


def _prepare_part(part, tag, response, start, first):
    """Begin a new .part file if the response begins at byte 0; otherwise check that it continues the old one."""
    new_tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    if first == 0:
        part.unlink(missing_ok=True)
        tag.unlink(missing_ok=True)
        if new_tag:
            files.write_bytes(tag, new_tag.encode())
    elif first != start or (tag.exists() and tag.read_bytes() != new_tag.encode()):
        raise WrongPart("the file on the server is not the one begun")


def _receive(response, part, first, whole, progress, limit):
    """Append a response to the .part file.

    Args:
      first: int, the response's first byte.
      whole: int, bytes that the file must have in the end; None to take what comes, up to `limit` bytes.

    Raises:
      AttemptFailed, WrongPart: as their names say.
    """
    most = whole or limit
    bar = tqdm(total=whole, initial=first, unit="B", unit_scale=True, desc=part.stem, disable=not progress)
    with bar, open(part, "ab") as file:
        for piece in _read_pieces(response):
            file.write(piece)
            bar.update(len(piece))
            if file.tell() > most:
                break
    found = part.stat().st_size
    if found > most:
        raise WrongPart(f"it is longer than {most:,} bytes")
    if found < (whole or 1):
        raise AttemptFailed(f"the connection ended after {found:,} bytes")


def _read_pieces(response):
    """The body of a response as it comes, without decoding. A part of a compressed body could not be decoded.

    `read1` returns what is there. `read` would wait for a whole piece, and lose its beginning if no more came.
    """
    response.raw.enforce_content_length = False  # `_receive` counts the bytes and can say how many have come
    try:
        while piece := response.raw.read1(_PIECE, decode_content=False):
            yield piece
    except urllib3.exceptions.HTTPError as error:
        raise AttemptFailed(_describe(error)) from None


def unpack(archive, folder, wanted=None):
    """Unzip `archive` into `folder`. Members that are there already with the right size stay as they are.

    Args:
      wanted: function of a member's name, true where the member is to be unpacked; None for all.

    Raises:
      UserError: before anything is written: a member would leave `folder` or is a link, or the disk has no room for
        them. Later: the archive is damaged or the disk is full.
    """
    archive, folder = pathlib.Path(archive), pathlib.Path(folder)
    try:
        with zipfile.ZipFile(archive) as source:
            members = [member for member in source.infolist() if not member.filename.endswith("/")]
            for member in members:
                if fault := _member_fault(member):
                    raise UserError(
                        f"{archive} is not safe to unpack, {member.filename!r} {fault}: "
                        "delete it and run the same command again"
                    )
            members = [member for member in members if wanted is None or wanted(member.filename)]
            members = [member for member in members if not _is_present(folder / member.filename, member.file_size)]
            total = sum(member.file_size for member in members)
            folder.mkdir(parents=True, exist_ok=True)
            if total > shutil.disk_usage(folder).free:
                raise UserError(f"{archive} unpacks to {total / 1e6:,.0f} MB ({files.free_space(folder)})")
            with tqdm(total=total, unit="B", unit_scale=True, desc=archive.name) as bar:
                for member in members:
                    _extract(source, member, folder / member.filename, bar)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, UnicodeError) as error:
        raise UserError(f"{archive} is damaged ({error}): delete it and run the same command again") from error
    except OSError as error:
        reason = error.strerror or error
        remedy = f"see that you may read {archive} and write to {folder}, then run the same command again"
        raise UserError(f"cannot unpack {archive} ({reason}): {remedy}") from error


def _member_fault(member):
    """What makes a zip member unsafe, or None.

    Names are read as on Windows, which has every way out of a folder that other systems have, and more.
    """
    name = pathlib.PureWindowsPath(member.filename)
    if name.drive or name.root or ".." in name.parts or not name.parts:
        return "leaves the folder"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
        return "is a link or another special file"


def _extract(source, member, path, bar):
    """Unpack one member of the open archive `source`. zipfile reads its declared size and then checks its CRC-32."""
    with files.replacing(path) as temporary, open(temporary, "wb") as file, source.open(member) as content:
        while piece := content.read(_PIECE):
            file.write(piece)
            bar.update(len(piece))
        if file.tell() != member.file_size:
            raise zipfile.BadZipFile(f"{member.filename!r} is shorter than declared")
