"""HTTP requests that no server can make last for ever, and that no redirect leads into the user's own network."""

import http.client
import io
import ipaddress
import socket
import threading
import time
import urllib.parse

import requests
import urllib3

# Some servers refuse programs that do not say who they are and whom to ask.
_USER_AGENT = "image-captioning-with-visual-attention/1.0 (+contact: {})"
_CONTACT = "see the README.md and the issue tracker of this project"
_LEAST_SPEED = 5_000  # bytes a second, on average, that a server must send
_REDIRECTS = 10  # that are followed

_PER_THREAD = threading.local()


def get(url, headers, timeout, contact=""):
    """Ask for `url`, and for the address that the server names instead.

    Args:
      headers: dict of str to str.
      timeout: float, seconds that the server may be silent. After so many seconds it must have sent _LEAST_SPEED bytes
        for each second more, headers among them, or reading ends with a timeout.
      contact: str, ASCII, the user's e-mail or web address, which the server is told; empty for words in its place.

    Returns:
      requests.Response of any status but a redirect, whose body has not been read

    Raises:
      ValueError: an address is malformed or not http or https, the redirects do not end, or one of them leads from a
        public address to one of this machine or its network.
      requests.exceptions.RequestException, urllib3.exceptions.HTTPError: no answer came.
    """
    headers = {"User-Agent": _USER_AGENT.format(contact or _CONTACT), **headers}
    place = url
    for _ in range(_REDIRECTS + 1):
        if urllib.parse.urlsplit(place).scheme not in ("http", "https"):
            raise ValueError(f"only http and https addresses are fetched: {place}")
        response = _thread_session().get(place, headers=headers, stream=True, timeout=timeout)
        if not response.is_redirect:
            return response
        target = response.headers["Location"].encode("latin-1", "replace").decode("utf-8", "replace")
        place = urllib.parse.urljoin(place, requests.utils.requote_uri(target))
        if response.raw.length_remaining == 0:
            response.raw.read()  # the connection can be used again
        response.close()
        if _is_local(place) and not _is_local(url):
            raise ValueError(f"it leads to {place}, which is not public")
    raise ValueError(f"it redirects more than {_REDIRECTS} times")


def _is_local(url):
    """Whether the host of an address is this machine or in its network. False where the host's name is unknown."""
    try:
        found = socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None)
    except (OSError, UnicodeError):
        return False
    return not all(ipaddress.ip_address(address[0].partition("%")[0]).is_global for *_, address in found)


def _thread_session():
    """This thread's session, which keeps connections open from one file to the next."""
    if not hasattr(_PER_THREAD, "session"):
        _PER_THREAD.session = _Session()
        # "identity" asks for the file's own bytes, as ranges and digests count these.
        _PER_THREAD.session.headers.update({"Accept-Encoding": "identity"})
        for scheme in _CONNECTIONS:
            _PER_THREAD.session.mount(f"{scheme}://", _Adapter())
    return _PER_THREAD.session


class _Session(requests.Session):
    """Leaves redirects to `get`: requests would go anywhere, and read their bodies, however long, into memory."""

    def get_redirect_target(self, resp):
        return None


class _Stream(io.RawIOBase):
    """What comes through a socket in answer to one request. A timeout ends what only trickles in."""

    def __init__(self, stream, patience):
        self.stream, self.patience = stream, patience
        self.begun, self.received = time.monotonic(), 0

    def readable(self):
        return True

    def readinto(self, buffer):
        if time.monotonic() - self.begun > self.patience + self.received / _LEAST_SPEED:
            raise TimeoutError(f"the server is slower than {_LEAST_SPEED:,} bytes a second")
        count = self.stream.readinto(buffer)
        self.received += count or 0
        return count

    def close(self):
        self.stream.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock, *args, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Stream(self.fp.detach(), sock.gettimeout()))


class _Plain(urllib3.connection.HTTPConnection):
    response_class = _Answer


class _Encrypted(urllib3.connection.HTTPSConnection):
    response_class = _Answer


_CONNECTIONS = {"http": _Plain, "https": _Encrypted}


class _Adapter(requests.adapters.HTTPAdapter):
    def get_connection_with_tls_context(self, *args, **kwargs):
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = _CONNECTIONS[pool.scheme]
        return pool
