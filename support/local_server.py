"""A folder of static files on 127.0.0.1, for the browser of this machine alone."""

import functools
import http.server
import os

from support.errors import UserError

_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # with the next one, the page may use threads
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-store",  # a page that was exported anew is seen at once: dates here are whole seconds
}
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | _TYPES

    def end_headers(self):
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args):
        """Nothing is printed for each request."""


class _Server(http.server.ThreadingHTTPServer):
    allow_reuse_address = os.name == "posix"  # on Windows it would let two servers have one port
    daemon_threads = True


def make_server(folder, port):
    """An HTTP server of a folder on 127.0.0.1, listening already.

    Args:
      port: int, 0 for any that is free.

    Raises:
      UserError: the port is in use, or may not be used.
    """
    try:
        return _Server(("127.0.0.1", port), functools.partial(_Handler, directory=os.fspath(folder)))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"port {port} cannot be had ({reason}): give another one behind --serve") from None


def serve(server):
    """Print the address of a server, as `make_server` returns it, and serve until Ctrl-C."""
    print(f"open http://127.0.0.1:{server.server_port}/ in a browser; Ctrl-C ends this", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
