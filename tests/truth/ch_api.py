# SPDX-License-Identifier: Apache-2.0
"""Cloud Hypervisor's HTTP API, event monitor and log, as far as the truth machine plays them for a given version.

In: a UNIX socket's path and a function that answers. Out: responses. One thread serves all requests in turn, so a call
that blocks also blocks the others. Bodies are read as by serde: an unknown field is ignored, a known one of a wrong
type is refused. Facts: vmm/src/api/http (v52, v53); error bodies are a JSON array from v47, plain text before.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SENDS = {"local": bool, "downtime_ms": int, "timeout_s": int, "connections": int}
NEWER = {"tls_dir": str, "memory_mode": str}
"""Since v53, for senders and receivers."""
_LENGTH = re.compile(rb"(?i)content-length: *(\d+)")


class RefusedError(Exception):
    """A request that is answered with an error: the chain of reasons, outermost first."""

    def __init__(self, status: int, *chain: str) -> None:
        super().__init__(": ".join(chain))
        self.status, self.chain = status, chain


def fields(manner: str, call: str) -> dict[str, type]:
    """The fields that this version knows in a call's body, besides the URL."""
    newer = {} if manner in {"v46", "v52"} else NEWER
    older = {} if manner == "v46" else SENDS
    return (older | newer if call == "vm.send-migration" else newer) | {"local": bool}


def read_body(manner: str, call: str, raw: bytes) -> dict[str, Any]:
    """The body's fields. Like serde, it checks them in their order; RefusedError for a wrong one."""
    url = "destination_url" if call == "vm.send-migration" else "receiver_url"
    known = fields(manner, call) | {url: str}
    body: dict[str, Any] = {}
    for name, value in json.loads(raw).items():
        if name in known and type(value) is not known[name]:
            was = f"integer `{value}`" if isinstance(value, int) else "map"
            raise RefusedError(
                400, "Failed to deserialize JSON", f"invalid type: {was}, expected {known[name].__name__}"
            )
        body[name] = value
    return body


class Monitor:
    """The event monitor's file and the log. Time stamps count from the start of the process."""

    def __init__(self, events: str, log: str) -> None:
        self._start = time.monotonic_ns()
        self._events, self._log = Path(events), Path(log)
        for path in (self._events, self._log):
            path.write_text("")

    def event(self, name: str) -> None:
        """Writes an event as event_monitor/src/lib.rs does."""
        secs, nanos = divmod(time.monotonic_ns() - self._start, 10**9)
        record = {"timestamp": {"secs": secs, "nanos": nanos}, "source": "vm", "event": name, "properties": None}
        _append(self._events, json.dumps(record, indent=2) + "\n\n")

    def log(self, line: str) -> None:
        """Writes a log line with the default prefix."""
        since = (time.monotonic_ns() - self._start) / 1e9
        _append(self._log, f"cloud-hypervisor: {since:.6f}s: <vmm> DEBUG:vmm/src/lib.rs:1 -- {line}\r\n")


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


Handler = Callable[[str, bytes], Any]


class Server:
    """Serves `answer(call, body)` on a UNIX socket. It returns the body of the response, None for an empty one."""

    def __init__(self, path: str, manner: str, answer: Handler) -> None:
        self._manner, self._answer = manner, answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(8)
        threading.Thread(target=self._serve, name="http-server", daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            with client:
                asked = _request(client)
                if asked:
                    client.sendall(self._reply(*asked))

    def _reply(self, method: str, path: str, body: bytes) -> bytes:
        call = path.removeprefix("/api/v1/")
        try:
            if path == call or method not in {"GET", "PUT"}:
                raise RefusedError(404, "Not Found")
            answer = self._answer(call, body)
        except RefusedError as error:
            plain = self._manner == "v46"
            chain = ["Error from API", *error.chain] if error.status >= 500 else list(error.chain)
            text = ": ".join(chain) if plain else json.dumps(chain)
            return _http(error.status, text.encode())
        return _http(204, b"") if answer is None else _http(200, json.dumps(answer).encode())


def _request(client: socket.socket) -> tuple[str, str, bytes] | None:
    asked = b""
    while part := client.recv(65536):
        asked += part
        head, end, body = asked.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if end and len(body) >= (int(length[1]) if length else 0):
            method, path = head.split(b" ", 2)[:2]
            return method.decode(), path.decode(), body
    return None


def _http(status: int, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status} \r\nServer: Cloud Hypervisor API\r\nContent-Length: {len(body)}\r\n"
    return (head + "Content-Type: application/json\r\n\r\n").encode() + body


def ping(manner: str) -> dict[str, Any]:
    """The answer to vmm.ping."""
    version = manner.removeprefix("v") + ".0.0"
    return {"build_version": f"v{version}", "version": version, "pid": os.getpid(), "features": []}
