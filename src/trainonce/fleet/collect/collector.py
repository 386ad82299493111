"""The collector: takes reports over HTTP, and shows them to Prometheus.

`POST /v1/report` takes a report, `GET /metrics` shows all, `GET /healthz` says that it lives. Every
request but the last needs the token, if there is one. Requests are bounded in size, time and
number, so that a client that lies, stalls or floods costs the others nothing.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import socketserver
import ssl
import threading
from collections import Counter
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from trainonce.errors import ConfigError
from trainonce.fleet.collect.book import Book, RefusedError
from trainonce.fleet.collect.message import MAX_BYTES
from trainonce.fleet.collect.metrics import CONTENT_TYPE, render
from trainonce.fleet.wire import is_loopback

if TYPE_CHECKING:
    from pathlib import Path

_REQUEST_S = 10.0
_REQUEST_IN_ALL_S = 30.0
_MAX_CLIENTS = 64
_MAX_OF_ONE_ADDRESS = 16
_STATUS = {
    "token": HTTPStatus.UNAUTHORIZED,
    "size": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "content": HTTPStatus.UNPROCESSABLE_ENTITY,
    "impostor": HTTPStatus.CONFLICT,
    "rate": HTTPStatus.TOO_MANY_REQUESTS,
    "full": HTTPStatus.INSUFFICIENT_STORAGE,
    "request": HTTPStatus.BAD_REQUEST,
}


class Collector(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """An HTTP server over a `Book`.

    Args:
        address: Host and port to listen on; port 0 takes a free one.
        book: Keeps what comes.
        token: What clients must show; empty on loopback only.
        tls: Certificate and key, for HTTPS.

    Raises:
        ConfigError: The address cannot be listened on, wants a token, or the certificate is none.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        book: Book,
        *,
        token: str = "",
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        if not token and not is_loopback(address[0]):
            raise ConfigError(
                f"listening on {address[0]} is beyond loopback and needs a token",
                hint="pass --token-file, or listen on 127.0.0.1",
            )
        self.book = book
        self.token = token
        self._context = None if tls is None else _context(*tls)
        self._served: Counter[str] = Counter()
        self._lock = threading.Lock()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        try:
            super().__init__(address, _Handler)
        except (OSError, OverflowError, ValueError) as error:  # the last for ports and names
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"cannot listen on {address[0]}:{address[1]}: {why}",
                hint="give this host's own address, and a port no one else uses",
            ) from error

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve one client on a thread of its own, if not too many are being served."""
        address = client_address[0]
        with self._lock:
            free = (
                self._served.total() < _MAX_CLIENTS and self._served[address] < _MAX_OF_ONE_ADDRESS
            )
            if free:
                self._served[address] += 1
        if not free:
            self.book.refuse("rate")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one client. The handshake is here: who stalls it stalls this thread only."""
        timer = None
        try:
            request.settimeout(_REQUEST_S)
            if self._context is not None:
                request = self._context.wrap_socket(
                    request, server_side=True, do_handshake_on_connect=False
                )
            # A byte now and then would keep each single wait below its limit.
            timer = threading.Timer(_REQUEST_IN_ALL_S, _cut, (request,))
            timer.daemon = True
            timer.start()
            if isinstance(request, ssl.SSLSocket):
                request.do_handshake()
            super().process_request_thread(request, client_address)
        except (OSError, ValueError):
            self.book.refuse("request")
            self.shutdown_request(request)
        finally:
            if timer is not None:
                timer.cancel()
            with self._lock:
                self._served[client_address[0]] -= 1
                self._served += Counter()  # forget those that are at 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Count a client that left or stalled in the middle; it is no error of ours."""
        self.book.refuse("request")


class _Handler(BaseHTTPRequestHandler):
    timeout = _REQUEST_S
    protocol_version = "HTTP/1.0"
    server_version = "trainonce"
    sys_version = ""

    def do_GET(self) -> None:
        """Show the metrics, or that the collector lives."""
        if self.path == "/healthz":
            self._answer(HTTPStatus.OK, "ok\n")
        elif not self._is_allowed():
            self._refuse(RefusedError("token", "the token is missing or wrong"))
        elif self.path == "/metrics":
            self._answer(HTTPStatus.OK, render(self._collector.book), CONTENT_TYPE)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "there are /metrics, /v1/report and /healthz\n")

    def do_POST(self) -> None:
        """Take a report."""
        try:
            if not self._is_allowed():
                raise RefusedError("token", "the token is missing or wrong")
            if self.path != "/v1/report":
                raise RefusedError("request", "reports go to /v1/report")
            text = self.headers.get("Content-Length", "")
            if not text.isdigit():
                raise RefusedError("request", "Content-Length is missing")
            if len(text) > 10 or int(text) > MAX_BYTES:
                raise RefusedError("size", f"at most {MAX_BYTES} bytes are taken")
            data = self.rfile.read(int(text))
            if len(data) < int(text):
                raise RefusedError("request", "the report ended early")
            self._collector.book.take(data, self.client_address[0])
        except RefusedError as error:
            self._refuse(error)
            return
        self._answer(HTTPStatus.NO_CONTENT, "")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the metrics count."""

    @property
    def _collector(self) -> Collector:
        assert isinstance(self.server, Collector)
        return self.server

    def _is_allowed(self) -> bool:
        token = self._collector.token
        shown = self.headers.get("Authorization", "")
        return not token or hmac.compare_digest(shown.encode(), f"Bearer {token}".encode())

    def _refuse(self, error: RefusedError) -> None:
        self._collector.book.refuse(error.reason)
        self._answer(_STATUS[error.reason], error.message + "\n")

    def _answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        data = text.encode()
        with contextlib.suppress(OSError):  # it left before we answered
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)


def _cut(request: socket.socket) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{certificate} and {key} are no certificate and key: {error}") from error
    return context
