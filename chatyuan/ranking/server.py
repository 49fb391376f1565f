"""The local page: four static files and four calls, for this machine only unless told otherwise.

What protects annotations from other web pages open in the same browser: the Host header must name
the address that we listen on (a foreign name that resolves to it is DNS rebinding), calls need
JSON, the same Origin and no cross-site fetch. The page may load nothing but its own files.
"""

import contextlib
import errno
import http.server
import importlib.resources
import json
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from chatyuan import ranking
from chatyuan.errors import UserError
from chatyuan.ranking.desk import Desk, Refused

FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/words.js": ("words.js", "text/javascript"),
}
CALLS = ("start", "next", "previous", "save")
MAX_BODY = 64 * 1024  # bytes; the longest request is a name, a category and K numbers
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOCAL = ("127.0.0.1", "localhost", "::1")


class Server(http.server.ThreadingHTTPServer):
    """Serves one desk."""

    daemon_threads = True
    block_on_close = False  # a browser keeps its connections open
    allow_reuse_port = False

    desk: Desk  # to be set before `serve_forever`
    between: Callable[[], None] | None = None  # called a few times a second by `serve_forever`

    def __init__(self, host: str, port: int) -> None:
        """Binds.

        Args:
            host: address to listen on, by which browsers must ask for the page; 127.0.0.1 is
                reached as localhost, too.
            port: 0 = any that is free.

        Raises:
            UserError: the port is taken, or the address is not of this machine.
        """
        self.names = {host.lower(), *(LOCAL if host in LOCAL else ())}
        folder = importlib.resources.files(ranking)
        self.files = {path: ((folder / name).read_bytes(), kind)
                      for path, (name, kind) in FILES.items()}  # fmt: skip
        if host in ("", "0.0.0.0", "::"):
            raise UserError(
                f"rank.Config.host = {host!r} is every address of this machine; name the one by "
                "which the page is to be reached, so that others can be refused."
            )
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OverflowError as error:
            raise UserError(f"rank.Config.port = {port} is not in 0..65535.") from error
        except OSError as error:
            raise UserError(_unbound(host, port, error)) from error

    def service_actions(self) -> None:
        """Called by `serve_forever` in its thread, between requests."""
        if self.between is not None:
            self.between()

    @property
    def url(self) -> str:
        """Where the page is."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in str(host) else host}:{port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of a request is no event; all else is told."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _unbound(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} of {host} is in use; if that is this stage, its page is at "
            f"http://{host}:{port}/. Choose another port: --gin.rank.Config.port={port + 1} "
            "(0 = any that is free)."
        )
    if error.errno == errno.EACCES:
        return f"rank.Config.port = {port}: {error.strerror}; take one above 1023."
    return f"rank.Config.host = {host} cannot be listened on: {error.strerror or error}."


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "chatyuan", ""
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds of silence after which a connection is closed

    def do_GET(self) -> None:
        """A file of the page."""
        if self._foreign():
            return
        path = urlsplit(self.path).path
        if path not in self.server.files:
            self._refuse(404, "not_found")
            return
        body, kind = self.server.files[path]
        self._answer(200, body, f"{kind}; charset=utf-8")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """A call: JSON in, JSON out."""
        if self._foreign():
            return
        request = self._body()
        if request is None:
            return
        call = urlsplit(self.path).path.removeprefix("/api/")
        if call not in CALLS:
            self._refuse(404, "not_found")
            return
        try:
            self._json(200, _called(self.server.desk, call, request))
        except Refused as error:
            self._refuse(409 if str(error) == "closed" else 400, str(error))
        except OSError as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            self._refuse(507, "not_saved", error.strerror or str(error))

    def _foreign(self) -> bool:
        """Whether the request comes from elsewhere; then it has been answered."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        with contextlib.suppress(ValueError):
            if (urlsplit(f"//{host}").hostname or "").lower() in self.server.names:
                site = self.headers.get("Sec-Fetch-Site", "none")
                same = origin is None or origin.lower() == f"http://{host}".lower()
                if same and (self.command == "GET" or site in ("none", "same-origin")):
                    return False
        self._refuse(403, "foreign")
        return True

    def _body(self) -> Mapping[str, Any] | None:
        """The object of a call; None = refused."""
        if self.headers.get_content_type() != "application/json":
            self._refuse(415, "not_json")
            return None
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._refuse(411, "no_length")
            return None
        if len(length) > 9 or int(length) > MAX_BODY:
            self._refuse(413, "too_large")
            return None
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            self._refuse(400, "not_json")
            return None
        return request

    def _refuse(self, status: int, error: str, detail: str = "") -> None:
        self.close_connection = True  # a body may be there that nobody read
        self._json(status, {"error": error, "detail": detail})

    def _json(self, status: int, value: Mapping[str, Any]) -> None:
        # Lone surrogates in a name stay escapes; the page's own texts are valid.
        self._answer(status, json.dumps(value).encode("ascii"), "application/json")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for what matters."""


def _called(desk: Desk, call: str, request: Mapping[str, Any]) -> dict[str, Any]:
    if call == "start":
        return desk.start()
    if call == "save":
        return desk.save(request)
    if call == "previous":
        return desk.previous(request.get("annotator"), request.get("item"))
    return desk.next(request.get("annotator"), request.get("leaving"))
