# SPDX-License-Identifier: Apache-2.0
"""The HTTP server: `/`, `/metrics`, `/-/healthy`, `/-/ready`. What clients can use is bounded.

In: a listening socket, `Metrics`, the access rules. Out: responses. A connection carries one request. At most
`CONNECTIONS` are open at a time, each for at most `SECONDS`. When all are taken, the oldest connection without a
request makes room, so idle clients cannot keep scrapers out.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from ebpf_mig import __version__
from ebpf_mig.exporter.metrics import Metrics

CONNECTIONS = 40
SECONDS = 10.0
"""Also the Retry-After of the 503. Prometheus's default scrape time-out is 10 s."""
GZIP_LEVEL = 1
"""A tenth of the bytes for a millisecond. Higher levels cost more time and save little."""

_PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ebpf-mig exporter</title></head>
<body><h1>ebpf-mig exporter</h1><p>Version {__version__}: the downtime of every live migration on this node.</p>
<ul><li><a href="/metrics">Metrics</a></li><li><a href="/-/healthy">Healthy</a></li>
<li><a href="/-/ready">Ready</a></li></ul></body></html>
"""
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\nRetry-After: 10\r\n\r\n"


class _Connection(msgspec.Struct):
    """An open connection: since when (monotonic, seconds), and whether its request has been read."""

    since: float
    asked: bool = False


Authorise = Callable[[str | None], bool]
"""Takes the Authorization header. Returns whether the client may read."""


class Web(TCPServer):
    """Serves from a socket that already listens, until `shutdown()`."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, metrics: Metrics) -> None:
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.metrics = metrics
        self.tls: ssl.SSLContext | None = None
        self.authorise: Authorise | None = None
        self._open: dict[socket.socket, _Connection] = {}
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread for the connection if there is room."""
        with self._lock:
            idle = self._room()
            full = len(self._open) >= CONNECTIONS
            if not full:
                self._open[request] = _Connection(time.monotonic())
        if idle is not None:
            self._cut(idle, "idle")
        if full:
            self.metrics.rejected("too-many")
            with contextlib.suppress(OSError):
                request.setblocking(False)
                if self.tls is None:
                    request.send(_BUSY)
            self.shutdown_request(request)
            return
        threading.Thread(target=self._serve, args=(request, client_address), daemon=True).start()

    def _room(self) -> socket.socket | None:
        """If all places are taken, frees that of the oldest connection without a request, and returns it."""
        if len(self._open) < CONNECTIONS:
            return None
        waiting = next((request for request, connection in self._open.items() if not connection.asked), None)
        if waiting is not None:
            del self._open[waiting]
        return waiting

    def _cut(self, request: socket.socket, reason: str) -> None:
        self.metrics.rejected(reason)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def asked(self, request: socket.socket) -> None:
        """Marks the connection as not idle: its request has been read."""
        with self._lock:
            if request in self._open:
                self._open[request].asked = True

    def service_actions(self) -> None:
        """Cuts connections that have lasted too long, even busy ones."""
        now = time.monotonic()
        with self._lock:
            late = [request for request, connection in self._open.items() if now - connection.since > SECONDS]
            for request in late:
                del self._open[request]
        for request in late:
            self._cut(request, "too-slow")

    def drain(self, seconds: float = 5.0) -> None:
        """Waits until open requests are answered, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while self._open and time.monotonic() < deadline:
            time.sleep(0.02)

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        """Answers one connection. A client's misbehaviour affects only its own."""
        wrapped: socket.socket = request
        try:
            # The client may go away, not use TLS, or be cut off.
            with contextlib.suppress(OSError, ValueError):
                request.settimeout(SECONDS)
                if self.tls is not None:
                    wrapped = self.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
                    with self._lock:
                        connection = self._open.pop(request, None)
                        if connection is None:
                            return  # it was cut off meanwhile
                        self._open[wrapped] = connection
                    wrapped.do_handshake()
                self.finish_request(wrapped, client_address)
        except Exception:  # a bug only fails this request, and is counted
            self.metrics.rejected("failed")
        finally:
            with self._lock:
                self._open.pop(wrapped, None)
                self._open.pop(request, None)
            self.shutdown_request(wrapped)


def _encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """The exposition format that the client asks for; plain text if the header cannot be parsed."""
    try:
        return choose_encoder(accept[:1000])
    except Exception:  # the library that parses the header trusts it
        return choose_encoder("")


def _takes_gzip(accept: str) -> bool:
    """Whether the header Accept-Encoding names gzip with a quality above 0 (RFC 9110, 12.5.3)."""
    for part in accept[:1000].lower().split(","):
        name, _, parameter = part.partition(";")
        if name.strip() == "gzip":
            return not re.fullmatch(r"\s*q=0(\.0{0,3})?\s*", parameter)
    return False


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Web
    protocol_version = "HTTP/1.0"
    server_version = "ebpf-mig"
    sys_version = ""

    def do_GET(self) -> None:
        """Answers from memory."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        self.server.asked(self.connection)
        try:
            self._page(body=body)
        except OSError:
            raise  # the client is gone
        except Exception:
            self._send(500, "text/plain", b"internal error\n", body)
            raise

    def _page(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if self.server.authorise is not None and not self.server.authorise(self.headers.get("Authorization")):
            self._send(401, "text/plain", b"unauthorized\n", body, {"WWW-Authenticate": 'Basic realm="ebpf-mig"'})
        elif path == "/":
            self._send(200, "text/html; charset=utf-8", _PAGE.encode(), body)
        elif path == "/metrics":
            begin = time.monotonic()
            encode, kind = _encoder(self.headers.get("Accept", ""))
            text = self.server.metrics.text(encode)
            self.server.metrics.scrape_seconds.set(time.monotonic() - begin)
            more = {"Vary": "Accept, Accept-Encoding"}
            if _takes_gzip(self.headers.get("Accept-Encoding", "")):
                text, more["Content-Encoding"] = gzip.compress(text, GZIP_LEVEL), "gzip"
            self._send(200, kind, text, body, more)
        elif path == "/-/healthy":
            self._state("healthy", self.server.metrics.dead, body)
        elif path == "/-/ready":
            self._state("ready", self.server.metrics.unready, body)
        else:
            self._send(404, "text/plain", b"not found\n", body)

    def _state(self, word: str, why_not: str, body: bool) -> None:
        text = f"not {word}: {why_not}\n" if why_not else f"{word}\n"
        self._send(503 if why_not else 200, "text/plain; charset=utf-8", text.encode(), body)

    def _send(self, code: int, kind: str, text: bytes, body: bool, more: dict[str, str] | None = None) -> None:
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": str(len(text)), "Connection": "close"}
        headers |= {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'"}
        for name, value in (headers | (more or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(text)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Answers in plain text, 405 for an unknown method. Does not echo the request."""
        if code == 501:
            self._send(405, "text/plain", b"method not allowed\n", True, {"Allow": "GET, HEAD"})
        else:
            self._send(code, "text/plain", b"bad request\n", True)

    def log_message(self, format: str, *args: Any) -> None:
        """Does not log request lines."""
