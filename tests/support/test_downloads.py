"""Downloads from a server that resets, stalls, refuses and lies, and zip files made to do harm."""

import contextlib
import errno
import gzip
import hashlib
import http.server
import os
import pathlib
import random
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile

import pytest

from conftest import full_disk
from support import downloads
from support.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent.parent

DATA = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
DIGEST = hashlib.sha256(DATA).hexdigest()
QUICK = {"timeout": 10.0, "back_off": 0.001, "progress": False}


@pytest.fixture
def server(monkeypatch):
    """A server whose `answers[path]` are called one per request, the last again and again; none means 404.

    `requests` lists (path, Range header or None) of each request, `headers` its headers, `connections` the connections
    made; `released` ends every stalled answer. Connections are kept open once `keep_alive()` is called.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = types.SimpleNamespace(answers={}, requests=[], headers=[], connections=[], released=threading.Event())

    class Handler(http.server.BaseHTTPRequestHandler):
        def setup(self):
            state.connections.append(self.client_address)
            super().setup()

        def do_GET(self):
            state.requests.append((self.path, self.headers["Range"]))
            state.headers.append(self.headers)
            answers = state.answers.get(self.path, [status(404)])
            (answers.pop(0) if len(answers) > 1 else answers[0])(self, state)

        def log_message(self, *args):
            pass

    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.daemon_threads = True
    service.handle_error = lambda *arguments: None  # it would print a traceback when a client hangs up
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{service.server_port}"
    state.keep_alive = lambda: setattr(Handler, "protocol_version", "HTTP/1.1")
    yield state
    state.released.set()
    service.shutdown()
    service.server_close()
    thread.join()


def send(handler, code, headers, body=b""):
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def status(code, **headers):
    return lambda handler, state: send(handler, code, {"Content-Length": 0, **headers})


def plain(body, **headers):
    """All of `body`, as from a server that knows no Range."""
    return lambda handler, state: send(handler, 200, {"Content-Length": len(body), **headers}, body)


def ranged(body, tag='"one"'):
    """`body` from the byte asked for on."""

    def answer(handler, state):
        if not handler.headers["Range"]:
            return send(handler, 200, {"Content-Length": len(body), "ETag": tag}, body)
        start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(body):
            return send(handler, 416, {"Content-Length": 0})
        extent = f"bytes {start}-{len(body) - 1}/{len(body)}"
        send(handler, 206, {"Content-Length": len(body) - start, "Content-Range": extent, "ETag": tag}, body[start:])

    return answer


def reset(body, count, tag='"one"'):
    """The first `count` bytes of `body`, then a TCP reset."""

    def answer(handler, state):
        send(handler, 200, {"Content-Length": len(body), "ETag": tag}, body[:count])
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(handler.connection.detach())

    return answer


def stall(body, count):
    """The first `count` bytes of `body`, then silence."""

    def answer(handler, state):
        send(handler, 200, {"Content-Length": len(body), "ETag": '"one"'}, body[:count])
        state.released.wait()

    return answer


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def ranges(server):
    return [header for _, header in server.requests]


def python(code, *arguments):
    """A second Python in the project's folder, running `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    )


def hear_interrupts():
    """A shell makes the tests ignore Ctrl-C if it starts them in the background. The new process must not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# One file


def test_reset_connection_is_continued_where_it_broke(server, tmp_path):
    server.answers["/a"] = [reset(DATA, 200_000), ranged(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "new" / "a", **QUICK)
    assert (tmp_path / "new" / "a").read_bytes() == DATA
    first, second = ranges(server)
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= 200_000
    assert names_in(tmp_path / "new") == ["a"]


def test_last_attempt_names_url_reason_path_and_keeps_the_part(server, tmp_path):
    server.answers["/a"] = [reset(DATA, 200_000)]
    with pytest.raises(downloads.DownloadError) as caught:
        downloads.download(f"{server.url}/a", tmp_path / "a", attempts=3, **QUICK)
    assert isinstance(caught.value, UserError)
    message = str(caught.value)
    assert f"({os.strerror(errno.ECONNRESET)})" in message
    assert f"{server.url}/a" in message and str(tmp_path / "a") in message and "\n" not in message
    assert len(server.requests) == 3
    assert names_in(tmp_path) == ["a.part", "a.part.tag"]


def test_stalled_server_is_asked_again(server, tmp_path):
    server.answers["/a"] = [stall(DATA, 100_000), ranged(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", **{**QUICK, "timeout": 2.0})
    assert (tmp_path / "a").read_bytes() == DATA
    assert ranges(server) == [None, "bytes=100000-"]


@pytest.mark.parametrize("code", [403, 404, 410])
def test_refusal_is_final(server, tmp_path, code):
    server.answers["/a"] = [status(code)]
    with pytest.raises(downloads.DownloadError, match=str(code)) as caught:
        downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    assert caught.value.refused
    assert len(server.requests) == 1
    assert names_in(tmp_path) == []


def test_busy_server_is_asked_again_after_growing_pauses(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(downloads.time, "sleep", pauses.append)
    server.answers["/a"] = [status(503), status(429), status(500), plain(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "new" / "a", **{**QUICK, "back_off": 0.5})
    assert (tmp_path / "new" / "a").read_bytes() == DATA
    assert pauses == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("size", [None, len(DATA)])
def test_short_file_is_never_taken(server, tmp_path, size):
    headers = {"Content-Length": len(DATA)} if size is None else {}
    server.answers["/a"] = [lambda handler, state: send(handler, 200, headers, DATA[:-1])]
    with pytest.raises(downloads.DownloadError, match="ended after 299,999 bytes"):
        downloads.download(f"{server.url}/a", tmp_path / "a", size=size, attempts=2, **QUICK)
    assert not (tmp_path / "a").exists()
    assert len(server.requests) == 2


def test_chunked_file_cut_off_is_never_taken(server, tmp_path):
    chunk = b"%x\r\n%b\r\n" % (len(DATA), DATA)
    headers = {"Transfer-Encoding": "chunked"}
    server.answers["/cut"] = [lambda handler, state: send(handler, 200, headers, chunk)]
    server.answers["/whole"] = [lambda handler, state: send(handler, 200, headers, chunk + b"0\r\n\r\n")]
    with pytest.raises(downloads.DownloadError):
        downloads.download(f"{server.url}/cut", tmp_path / "cut", attempts=2, **QUICK)
    downloads.download(f"{server.url}/whole", tmp_path / "whole", **QUICK)
    assert not (tmp_path / "cut").exists()
    assert (tmp_path / "whole").read_bytes() == DATA


def test_file_without_length_or_empty_is_never_taken(server, tmp_path):
    server.answers["/unknown"] = [lambda handler, state: send(handler, 200, {}, DATA)]
    server.answers["/empty"] = [plain(b"")]
    for name in ("unknown", "empty"):
        with pytest.raises(downloads.DownloadError):
            downloads.download(f"{server.url}/{name}", tmp_path / name, attempts=1, **QUICK)
    assert names_in(tmp_path) == []


def test_announced_length_other_than_size_leaves_the_part_alone(server, tmp_path):
    (tmp_path / "a.part").write_bytes(DATA[:1000])
    (tmp_path / "a.part.tag").write_text('"one"')
    server.answers["/a"] = [plain(DATA + b"more"), ranged(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", size=len(DATA), **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA
    assert ranges(server) == ["bytes=1000-", "bytes=1000-"]


def test_longer_file_is_tried_twice_and_deleted(server, tmp_path):
    server.answers["/a"] = [lambda handler, state: send(handler, 200, {"ETag": '"one"'}, DATA + b"more")]
    with pytest.raises(downloads.DownloadError, match="longer"):
        downloads.download(f"{server.url}/a", tmp_path / "a", size=len(DATA), **QUICK)
    assert ranges(server) == [None, None]
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.part").exists()


@pytest.mark.parametrize(("bound", "headers"), [("size", {}), ("limit", {"Transfer-Encoding": "chunked"})])
def test_file_without_end_does_not_fill_the_disk(server, tmp_path, bound, headers):
    cut_off = threading.Event()
    chunk = b"%x\r\n%b\r\n" % (len(DATA), DATA)

    def endless(handler, state):
        try:
            send(handler, 200, headers, chunk)
            for _ in range(1000):
                handler.wfile.write(chunk)
        except ConnectionError:
            cut_off.set()

    server.answers["/a"] = [endless]
    with pytest.raises(downloads.DownloadError, match="longer"):
        downloads.download(f"{server.url}/a", tmp_path / "a", **{bound: len(DATA)}, **QUICK)
    wait_until(cut_off.is_set)


@pytest.mark.parametrize("announced", [True, False])
def test_no_more_than_the_limit_is_fetched(server, tmp_path, announced):
    chunk = b"%x\r\n%b\r\n" % (len(DATA), DATA)
    chunked = {"Transfer-Encoding": "chunked"}
    server.answers["/a"] = [
        plain(DATA) if announced else lambda handler, state: send(handler, 200, chunked, chunk + b"0\r\n\r\n")
    ]
    with pytest.raises(downloads.DownloadError, match="longer than 299,999 bytes"):
        downloads.download(f"{server.url}/a", tmp_path / "a", limit=len(DATA) - 1, **QUICK)
    assert names_in(tmp_path) == []
    downloads.download(f"{server.url}/a", tmp_path / "a", limit=len(DATA), **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA


def trickle(begin, piece=b"a"):
    """What `begin` sends, then a piece every tenth of a second until the client hangs up."""

    def answer(handler, state):
        try:
            begin(handler)
            while not state.released.wait(0.1):
                handler.wfile.write(piece)
        except ConnectionError:
            state.hung_up.set()

    return answer


SLOW = {
    "body": trickle(lambda handler: send(handler, 200, {"Content-Length": len(DATA)})),
    "chunks": trickle(lambda handler: send(handler, 200, {"Transfer-Encoding": "chunked"}), b"1\r\na\r\n"),
    "length of a chunk": trickle(lambda handler: send(handler, 200, {"Transfer-Encoding": "chunked"}), b"0"),
    "status": trickle(lambda handler: None),
    "headers": trickle(lambda handler: handler.wfile.write(b"HTTP/1.0 200 OK\r\nname: ")),
    "redirect": trickle(lambda handler: send(handler, 302, {"Location": "/slow"})),
}


@pytest.mark.parametrize("kind", SLOW)
def test_server_that_sends_a_byte_now_and_then_is_given_up(server, tmp_path, kind):
    server.hung_up = threading.Event()
    server.answers = {"/a": [SLOW[kind]], "/slow": [SLOW["body"]]}
    begun = time.monotonic()
    with pytest.raises(downloads.DownloadError, match="slower than 5,000 bytes a second"):
        downloads.download(f"{server.url}/a", tmp_path / "a", attempts=1, **{**QUICK, "timeout": 1.5})
    assert time.monotonic() - begun < 30
    wait_until(server.hung_up.is_set)
    assert not (tmp_path / "a").exists()


def test_server_that_is_fast_enough_may_take_longer_than_the_timeout(server, tmp_path):
    def answer(handler, state):
        send(handler, 200, {"Content-Length": len(DATA)})
        for start in range(0, len(DATA), len(DATA) // 8):
            time.sleep(0.3)
            handler.wfile.write(DATA[start : start + len(DATA) // 8])

    server.answers["/a"] = [answer]
    downloads.download(f"{server.url}/a", tmp_path / "a", attempts=1, **{**QUICK, "timeout": 2.0})
    assert (tmp_path / "a").read_bytes() == DATA


def test_no_file_is_without_a_limit(server, tmp_path, monkeypatch):
    """The body has no end, and nobody said how long it may be."""
    monkeypatch.setattr(downloads.download, "__defaults__", limited_defaults(1_000_000))
    chunk = b"%x\r\n%b\r\n" % (len(DATA), DATA)

    def endless(handler, state):
        with contextlib.suppress(ConnectionError):
            send(handler, 200, {"Transfer-Encoding": "chunked"}, chunk)
            while not state.released.is_set():
                handler.wfile.write(chunk)

    server.answers["/a"] = [endless]
    ((_, reason),) = downloads.download_all([(f"{server.url}/a", tmp_path / "a")], 1, **QUICK)
    assert reason == "it is longer than 1,000,000 bytes"
    assert names_in(tmp_path) == []


def limited_defaults(limit):
    """The defaults of `download` with another limit than LARGEST, which takes a while to fetch."""
    assert downloads._LIMIT in downloads.download.__defaults__
    return tuple(limit if value == downloads._LIMIT else value for value in downloads.download.__defaults__)


def test_file_of_known_size_may_be_larger_than_the_limit(server, tmp_path):
    server.answers["/a"] = [ranged(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", size=len(DATA), limit=10, **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA


def test_wrong_digest_is_tried_twice_and_deleted(server, tmp_path):
    server.answers["/a"] = [ranged(OTHER)]
    with pytest.raises(downloads.DownloadError, match="SHA-256"):
        downloads.download(f"{server.url}/a", tmp_path / "a", size=len(DATA), sha256=DIGEST, **QUICK)
    assert ranges(server) == [None, None]
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.part").exists()


def test_damaged_part_is_mended_by_the_digest(server, tmp_path):
    (tmp_path / "a.part").write_bytes(OTHER[:1000])
    server.answers["/a"] = [ranged(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", sha256=DIGEST.upper(), **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA
    assert ranges(server) == ["bytes=1000-", None]


@pytest.mark.parametrize("content", [DATA, OTHER])
def test_complete_part_needs_its_digest_only(server, tmp_path, content):
    (tmp_path / "a.part").write_bytes(content)
    server.answers["/a"] = [ranged(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", size=len(DATA), sha256=DIGEST, **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA
    assert ranges(server) == ([] if content == DATA else [None])


def test_server_without_range_starts_over(server, tmp_path):
    server.answers["/a"] = [reset(DATA, 200_000), plain(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA
    assert ranges(server)[1] is not None


def test_file_changed_on_the_server_starts_over(server, tmp_path):
    server.answers["/a"] = [reset(OTHER, 200_000, tag='"old"'), ranged(DATA, tag='"new"')]
    downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA
    assert len(server.requests) == 3


def test_part_of_an_unknown_version_is_not_continued(server, tmp_path):
    (tmp_path / "a.part").write_bytes(OTHER[:1000])
    server.answers["/a"] = [ranged(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", size=len(DATA), **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA
    assert ranges(server) == [None]


def test_tag_of_an_earlier_part_is_not_kept(server, tmp_path):
    (tmp_path / "a.part.tag").write_text('"one"')
    headers = {"Content-Length": len(OTHER)}
    server.answers["/a"] = [lambda handler, state: send(handler, 200, headers, OTHER[:1000]), ranged(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA
    assert ranges(server) == [None, None]


@pytest.mark.parametrize("extent", ["bytes 500-299999/300000", "bytes 1000-299999/*", None])
def test_another_part_than_asked_for_starts_over(server, tmp_path, extent):
    (tmp_path / "a.part").write_bytes(DATA[:1000])
    (tmp_path / "a.part.tag").write_text('"one"')
    headers = {"Content-Length": 299_000, "ETag": '"one"'} | ({"Content-Range": extent} if extent else {})
    server.answers["/a"] = [lambda handler, state: send(handler, 206, headers, OTHER[1000:]), ranged(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA
    assert ranges(server) == ["bytes=1000-", None]


def test_part_longer_than_the_file_starts_over(server, tmp_path):
    (tmp_path / "a.part").write_bytes(DATA + OTHER)
    (tmp_path / "a.part.tag").write_text('"one"')
    server.answers["/a"] = [ranged(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA
    assert ranges(server) == ["bytes=600000-", None]


def test_redirect_is_followed_and_keeps_the_range(server, tmp_path):
    server.answers["/a"] = [status(302, Location="/b")]
    server.answers["/b"] = [reset(DATA, 200_000), ranged(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA
    assert [path for path, _ in server.requests] == ["/a", "/b", "/a", "/b"]
    assert server.requests[3][1] == server.requests[2][1] is not None


def test_web_page_in_place_of_the_file_is_never_taken(server, tmp_path):
    server.answers["/a"] = [plain(b"<html>please log in</html>", **{"Content-Type": "text/html; charset=utf-8"})]
    with pytest.raises(downloads.DownloadError, match="web page"):
        downloads.download(f"{server.url}/a", tmp_path / "a", attempts=2, **QUICK)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("scheme", ["file", "ftp", "data", ""])
def test_only_http_and_https_are_fetched(tmp_path, scheme):
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(downloads.DownloadError, match="only http and https"):
        downloads.download(f"{scheme}:{tmp_path}/secret", tmp_path / "a", **QUICK)
    assert names_in(tmp_path) == ["secret"]


@pytest.mark.parametrize(
    "url", ["http://[::1/a", "http:///a", "http://1:x/", f"http://{64 * 'a'}.com/a", "http://*.com/"]
)
def test_malformed_url_is_refused(tmp_path, url):
    with pytest.raises(downloads.DownloadError) as caught:
        downloads.download(url, tmp_path / "a", **QUICK)
    assert caught.value.refused


def test_spaces_and_letters_beyond_ascii_are_quoted(server, tmp_path):
    server.answers["/a%20b/%C3%A9.jpg"] = [plain(DATA)]
    downloads.download(f"{server.url}/a b/\u00e9.jpg", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA


@pytest.mark.parametrize("place", ["file:///etc/hostname", "data:,text", "ftp://127.0.0.1/a"])
def test_redirect_away_from_http_is_refused(server, tmp_path, place):
    server.answers["/a"] = [status(302, Location=place)]
    with pytest.raises(downloads.DownloadError, match=f"only http and https .*{place}") as caught:
        downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    assert caught.value.refused
    assert len(server.requests) == 1
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("place", ["/a", "http://[::1/a"])
def test_redirect_in_a_circle_or_to_no_address_is_refused(server, tmp_path, place):
    server.answers["/a"] = [status(302, Location=place)]
    with pytest.raises(downloads.DownloadError) as caught:
        downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    assert caught.value.refused
    assert len(server.requests) < 50


@pytest.mark.parametrize(
    ("host", "refused"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("[::1]", True),
        ("10.1.2.3", True),
        ("192.168.0.1", True),
        ("169.254.169.254", True),  # where clouds keep their secrets
        ("[::ffff:127.0.0.1]", True),
        ("[fe80::1]", True),
        ("0.0.0.0", True),
        ("2130706433", True),  # 127.0.0.1 as one number
        ("8.8.8.8", False),
        ("images.invalid", False),
    ],
)
def test_redirect_from_a_public_address_into_the_own_network_is_refused(server, tmp_path, monkeypatch, host, refused):
    """The server is the proxy of all hosts: so it answers for the public ones, and sees what is asked of the others.

    The name that is unknown is so everywhere: some networks have an address for any name.
    """
    find = socket.getaddrinfo

    def find_known(name, *more, **options):
        if name == "images.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return find(name, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", find_known)
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    server.answers = {"http://1.1.1.1/a": [status(302, Location=f"http://{host}/b")], f"http://{host}/b": [plain(DATA)]}
    if not refused:
        return downloads.download("http://1.1.1.1/a", tmp_path / "a", **QUICK)
    with pytest.raises(downloads.DownloadError, match="leads to http://.*/b, which is not public") as caught:
        downloads.download("http://1.1.1.1/a", tmp_path / "a", **QUICK)
    assert caught.value.refused
    assert [path for path, _ in server.requests] == ["http://1.1.1.1/a"]
    assert names_in(tmp_path) == []


def test_body_of_a_redirect_is_not_read(server, tmp_path):
    """Which could have no end, and fill the memory."""
    ended = threading.Event()

    def endless(handler, state):
        try:
            send(handler, 302, {"Location": "/b"}, DATA)
            for _ in range(100):
                handler.wfile.write(DATA)
        except ConnectionError:
            ended.set()

    server.answers = {"/a": [endless], "/b": [plain(DATA)]}
    downloads.download(f"{server.url}/a", tmp_path / "a", attempts=1, **QUICK)
    wait_until(ended.is_set)


def test_compressed_body_is_neither_asked_for_nor_decoded(server, tmp_path):
    packed = gzip.compress(DATA)
    coded = {"ETag": '"one"', "Content-Encoding": "gzip", "Content-Length": len(packed) - 1000}
    extent = f"bytes 1000-{len(packed) - 1}/{len(packed)}"
    server.answers["/whole"] = [plain(packed, **{"Content-Encoding": "gzip"})]
    server.answers["/rest"] = [
        lambda handler, state: send(handler, 206, {**coded, "Content-Range": extent}, packed[1000:])
    ]
    (tmp_path / "rest.part").write_bytes(packed[:1000])
    (tmp_path / "rest.part.tag").write_text('"one"')
    for name in ("whole", "rest"):
        downloads.download(f"{server.url}/{name}", tmp_path / name, attempts=1, **QUICK)
        assert (tmp_path / name).read_bytes() == packed
    assert [headers["Accept-Encoding"] for headers in server.headers] == ["identity", "identity"]


def test_requests_name_the_program(server, tmp_path):
    server.answers["/a"] = [plain(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    downloads.download(f"{server.url}/a", tmp_path / "b", contact="me@example.org", **QUICK)
    name = "image-captioning-with-visual-attention/1.0"
    agents = [headers["User-Agent"] for headers in server.headers]
    assert (
        agents[0].startswith(f"{name} (+contact: see the README.md")
        and agents[1] == f"{name} (+contact: me@example.org)"
    )


def test_proxy_of_the_environment_is_used(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    server.answers["http://images.invalid/a"] = [plain(DATA)]
    downloads.download("http://images.invalid/a", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA


@pytest.mark.parametrize("number", range(3))
def test_truncated_range_is_continued_once_more(server, tmp_path, number):
    """With a Content-Length that promises more, one that lies, and none at all."""
    (tmp_path / "a.part").write_bytes(DATA[:1000])
    (tmp_path / "a.part.tag").write_text('"one"')
    headers = {"ETag": '"one"', "Content-Range": "bytes 1000-299999/300000"}
    headers |= [{"Content-Length": 299_000}, {"Content-Length": 99_000}, {}][number]
    server.answers["/a"] = [lambda handler, state: send(handler, 206, headers, DATA[1000:100_000]), ranged(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA
    assert ranges(server) == ["bytes=1000-", "bytes=100000-"]


@pytest.mark.parametrize("count", [0, 1000])
def test_silent_server_is_given_up_after_the_timeout(server, tmp_path, count):
    server.answers["/a"] = [stall(DATA, count) if count else lambda handler, state: state.released.wait()]
    begun = time.monotonic()
    with pytest.raises(downloads.DownloadError, match="timed out"):
        downloads.download(f"{server.url}/a", tmp_path / "a", attempts=2, **{**QUICK, "timeout": 1.0})
    assert time.monotonic() - begun < 30
    assert len(server.requests) == 2


def test_broken_answer_is_a_failed_attempt(server, tmp_path):
    server.answers["/a"] = [lambda handler, state: handler.wfile.write(b"no HTTP at all\r\n\r\n"), plain(DATA)]
    downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA


def test_connection_is_kept_from_file_to_file(server, tmp_path):
    server.keep_alive()
    chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(DATA), DATA)
    server.answers["/0"] = [lambda handler, state: send(handler, 200, {"Transfer-Encoding": "chunked"}, chunk)]
    server.answers["/1"] = [plain(DATA)]
    server.answers["/2"] = [status(404)]
    server.answers["/3"] = [status(302, Location="/1")]
    server.answers["/4"] = [ranged(DATA)]
    (tmp_path / "4.part").write_bytes(DATA[:1000])
    (tmp_path / "4.part.tag").write_text('"one"')
    for number in (0, 1, 3, 4):
        downloads.download(f"{server.url}/{number}", tmp_path / str(number), **QUICK)
        assert (tmp_path / str(number)).read_bytes() == DATA
    with pytest.raises(downloads.DownloadError):
        downloads.download(f"{server.url}/2", tmp_path / "2", **QUICK)
    assert len(server.requests) == 6
    assert len(server.connections) == 1


def test_connection_that_the_server_closed_is_made_anew(server, tmp_path):
    def answer_and_close(handler, state):
        plain(DATA)(handler, state)
        handler.close_connection = True

    server.keep_alive()
    server.answers["/a"] = [answer_and_close]
    for number in range(3):
        downloads.download(f"{server.url}/a", tmp_path / str(number), **QUICK)
        assert (tmp_path / str(number)).read_bytes() == DATA
    assert len(server.connections) == 3


def test_file_already_there_costs_no_request(server, tmp_path):
    server.answers["/a"] = [plain(DATA)]
    (tmp_path / "a").write_bytes(OTHER)
    downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    downloads.download(f"{server.url}/a", tmp_path / "a", size=len(OTHER), sha256=DIGEST, **QUICK)
    assert server.requests == []
    (tmp_path / "a").write_bytes(OTHER[:-1])
    downloads.download(f"{server.url}/a", tmp_path / "a", size=len(DATA), **QUICK)
    assert (tmp_path / "a").read_bytes() == DATA


def test_full_disk_is_the_users_error_and_stops_everything(server, tmp_path):
    server.answers["/a"] = [ranged(DATA)]
    with full_disk(100_000), pytest.raises(UserError, match="cannot write .*MB free") as caught:
        downloads.download(f"{server.url}/a", tmp_path / "a", **QUICK)
    assert not isinstance(caught.value, downloads.DownloadError)
    assert len(server.requests) == 1
    with full_disk(100_000), pytest.raises(UserError, match="cannot write"):
        downloads.download_all([(f"{server.url}/a", tmp_path / "b")], 1, **QUICK)


@pytest.mark.slow
def test_killed_download_is_continued_by_the_next_run(server, tmp_path):
    server.answers["/a"] = [stall(DATA, 200_000), ranged(DATA)]
    path, part = tmp_path / "a", tmp_path / "a.part"
    code = "import sys; from support import downloads; downloads.download(sys.argv[1], sys.argv[2], timeout=600.0)"
    with python(code, f"{server.url}/a", path) as process:
        try:
            wait_until(lambda: part.exists() and part.stat().st_size)
        finally:
            process.kill()
    begun = part.stat().st_size
    downloads.download(f"{server.url}/a", path, **QUICK)
    assert path.read_bytes() == DATA
    assert ranges(server) == [None, f"bytes={begun}-"]


# Many files


def test_one_missing_file_among_good_ones(server, tmp_path):
    jobs = [(f"{server.url}/{number}", tmp_path / f"{number}.jpg") for number in range(30)]
    for number in range(30):
        server.answers[f"/{number}"] = [plain(DATA[number : number + 1000])]
    del server.answers["/7"]
    assert downloads.download_all(jobs, 4, **QUICK) == [(tmp_path / "7.jpg", "HTTP status 404")]
    for number in set(range(30)) - {7}:
        assert (tmp_path / f"{number}.jpg").read_bytes() == DATA[number : number + 1000]
    server.requests.clear()
    assert len(downloads.download_all(jobs, 4, **QUICK)) == 1
    assert server.requests == [("/7", None)]


def test_each_thread_makes_one_connection(server, tmp_path):
    server.keep_alive()
    jobs = [(f"{server.url}/{number}", tmp_path / str(number)) for number in range(60)]
    server.answers = {f"/{number}": [plain(DATA[number : number + 1000])] for number in range(60)}
    assert downloads.download_all(jobs, 4, **QUICK) == []
    assert len(server.requests) == 60
    assert len(server.connections) <= 4
    for number in range(60):
        assert (tmp_path / str(number)).read_bytes() == DATA[number : number + 1000]


def test_many_missing_files_do_not_stop_the_others(server, tmp_path):
    jobs = [(f"{server.url}/{number}", tmp_path / str(number)) for number in range(60)]
    server.answers["/59"] = [plain(DATA)]
    assert len(downloads.download_all(jobs, 4, **QUICK)) == 59
    assert (tmp_path / "59").read_bytes() == DATA


def test_file_that_cannot_be_written_stops_everything(server, tmp_path):
    server.answers = {f"/{number}": [plain(DATA)] for number in range(500)}
    (tmp_path / "taken").write_text("")
    jobs = [(f"{server.url}/{number}", tmp_path / "taken" / str(number)) for number in range(500)]
    with pytest.raises(UserError, match="cannot write .*choose another") as caught:
        downloads.download_all(jobs, 2, **QUICK)
    assert not isinstance(caught.value, downloads.DownloadError)
    assert len(server.requests) == 0


def test_nothing_reachable_stops_early(server, tmp_path):
    jobs = [(f"{server.url}/{number}", tmp_path / str(number)) for number in range(500)]
    server.answers = {f"/{number}": [status(503)] for number in range(500)}
    with pytest.raises(UserError, match="in a row failed.*503.*same command again"):
        downloads.download_all(jobs, 2, attempts=2, **QUICK)
    assert len(server.requests) < 200


def test_all_are_tried_where_none_gives_up(server, tmp_path):
    server.answers = {f"/{number}": [status(503)] for number in range(30)}
    jobs = [(f"{server.url}/{number}", tmp_path / str(number)) for number in range(30)]
    assert len(downloads.download_all(jobs, 4, attempts=1, give_up=None, **QUICK)) == 30


@pytest.mark.parametrize("count", [12, 300])
@pytest.mark.parametrize("code", [401, 403, 429, 503])
def test_most_files_refused_stop_where_most_are_needed(server, tmp_path, code, count):
    """Every third file is served, as by a server that allows a few requests a minute: few in a row are refused."""
    jobs = [(f"{server.url}/{number}", tmp_path / str(number)) for number in range(count)]
    server.answers = {f"/{number}": [status(code)] for number in range(count)}
    server.answers |= {f"/{number}": [plain(DATA[:1000])] for number in range(2, count, 3)}
    with pytest.raises(UserError, match=rf"were refused or failed, such as .*{code}.*run the same command again later"):
        downloads.download_all(jobs, 2, need_most=True, attempts=1, **QUICK)
    assert len(server.requests) < 60
    assert len(downloads.download_all(jobs, 2, attempts=1, **QUICK)) == count // 3 * 2


def test_most_files_missing_do_not_stop_though_most_are_needed(server, tmp_path):
    jobs = [(f"{server.url}/{number}", tmp_path / str(number)) for number in range(60)]
    server.answers = {f"/{number}": [plain(DATA[:100])] for number in range(20)} | {"/59": [status(403)]}
    assert len(downloads.download_all(jobs, 4, need_most=True, **QUICK)) == 40


def test_closed_port_stops_early(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a"
        with pytest.raises(UserError, match="in a row failed.*refused"):
            downloads.download_all([(url, tmp_path / str(number)) for number in range(40)], 4, **QUICK)


def test_fewer_files_than_that_are_reported_one_by_one(server, tmp_path):
    server.answers["/a"] = [status(503)]
    assert downloads.download_all([(f"{server.url}/a", tmp_path / "a")], 4, **QUICK) == [
        (tmp_path / "a", "HTTP status 503")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("pause", "number"), [(0.0, signal.SIGINT), (1.0, signal.SIGTERM)])
def test_interrupt_does_not_wait_for_open_connections(server, tmp_path, pause, number):
    """At the first request, while threads are still starting, and when the main thread waits for the first result."""
    server.answers = {f"/{number}": [stall(DATA, 1000)] for number in range(50)}
    code = (
        "import sys; from support import downloads, process; sys.excepthook = process.end_process\n"
        "jobs = [(f'{sys.argv[1]}/{number}', f'{sys.argv[2]}/{number}') for number in range(50)]\n"
        "process.run_script(lambda argv: downloads.download_all(jobs, 40, timeout=600.0))"
    )
    with python(code, server.url, tmp_path) as process:
        wait_until(lambda: server.requests)
        time.sleep(pause)
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert len(server.requests) <= 40


# Zip files


def make_zip(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, content in members.items():
            target.writestr(name, content)
    return path


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def test_members_are_unpacked_as_they_are(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"train/": b"", "train/1.jpg": DATA, "train/sub/2.jpg": OTHER, "n": b""})
    downloads.unpack(archive, tmp_path / "out")
    assert files_below(tmp_path / "out") == ["n", "train/1.jpg", "train/sub/2.jpg"]
    assert (tmp_path / "out" / "train" / "1.jpg").read_bytes() == DATA
    assert (tmp_path / "out" / "train" / "sub" / "2.jpg").read_bytes() == OTHER


def test_only_wanted_members_are_unpacked(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"annotations/a.json": b"a", "annotations/b.json": b"b"})
    downloads.unpack(archive, tmp_path / "out", wanted=lambda name: name.endswith("/b.json"))
    assert files_below(tmp_path / "out") == ["annotations/b.json"]


def test_second_unpacking_writes_what_is_missing_only(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"kept": DATA, "short": DATA, "gone": DATA})
    out = tmp_path / "out"
    downloads.unpack(archive, out)
    before = (out / "kept").stat()
    (out / "short").write_bytes(DATA[:10])
    (out / "gone").unlink()
    downloads.unpack(archive, out)
    assert ((out / "kept").stat().st_ino, (out / "kept").stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (out / "short").read_bytes() == (out / "gone").read_bytes() == DATA


@pytest.mark.parametrize(
    "name", ["/absolute", "../up", "a/../../up", "C:/drive", "C:drive", "..\\up", "\\absolute", "//host/share/a", "."]
)
def test_member_outside_the_folder_refuses_the_archive(tmp_path, name):
    archive = make_zip(tmp_path / "a.zip", {"good": b"good", name: b"evil"})
    with pytest.raises(UserError, match="leaves the folder") as caught:
        downloads.unpack(archive, tmp_path / "deep" / "out")
    assert str(archive) in str(caught.value) and repr(name) in str(caught.value)
    assert files_below(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO])
def test_link_refuses_the_archive(tmp_path, kind):
    link = zipfile.ZipInfo("link")
    link.external_attr = (kind | 0o777) << 16
    archive = make_zip(tmp_path / "a.zip", {"good": b"good", link: b"/etc"})
    with pytest.raises(UserError, match="'link' is a link"):
        downloads.unpack(archive, tmp_path / "out")
    assert files_below(tmp_path) == ["a.zip"]


def test_archive_larger_than_the_free_disk_is_refused(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", {"a": DATA})
    room = types.SimpleNamespace(free=len(DATA) - 1)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda folder: room)
    with pytest.raises(UserError, match="MB free"):
        downloads.unpack(archive, tmp_path / "out")
    assert files_below(tmp_path) == ["a.zip"]
    room.free = len(DATA)
    downloads.unpack(archive, tmp_path / "out")


def test_truncated_archive_says_delete_it(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"a": DATA})
    archive.write_bytes(archive.read_bytes()[:-1000])
    with pytest.raises(UserError, match="a.zip is damaged .*delete it and run the same command again"):
        downloads.unpack(archive, tmp_path / "out")
    assert files_below(tmp_path) == ["a.zip"]


def test_damaged_member_is_not_written(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"a": DATA, "b": OTHER}, zipfile.ZIP_STORED)
    content = bytearray(archive.read_bytes())
    content[-len(OTHER) // 2] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        downloads.unpack(archive, tmp_path / "out")
    assert files_below(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("flags", [0x0001, 0x0800])
def test_encrypted_or_misnamed_member_says_delete_it(tmp_path, flags):
    archive = make_zip(tmp_path / "a.zip", {"name": DATA})
    content = bytearray(archive.read_bytes().replace(b"name", b"n\xffme"))
    struct.pack_into("<H", content, 6, flags)
    struct.pack_into("<H", content, content.rindex(b"PK\x01\x02") + 8, flags)
    archive.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        downloads.unpack(archive, tmp_path / "out")
    assert files_below(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("declared", [1000, len(DATA) + 1000])
def test_member_of_another_size_than_declared_is_not_written(tmp_path, declared):
    archive = make_zip(tmp_path / "a.zip", {"a": DATA})
    content = bytearray(archive.read_bytes())
    struct.pack_into("<I", content, content.rindex(b"PK\x01\x02") + 24, declared)
    archive.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        downloads.unpack(archive, tmp_path / "out")
    assert files_below(tmp_path) == ["a.zip"]


def test_missing_archive_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="a.zip"):
        downloads.unpack(tmp_path / "a.zip", tmp_path / "out")
