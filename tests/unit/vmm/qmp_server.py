# SPDX-License-Identifier: Apache-2.0
"""A QMP monitor that misbehaves on demand, like a socket that is not QEMU's, or a faulty QEMU."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GREETING = (
    b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}\r\n'
)
VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "Debian"}

Reply = dict[str, Any] | bytes | None
"""The answer to a command: the `return` or `error` member, raw bytes, or nothing at all."""
Talk = Callable[["Connection"], None]


class Connection:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.commands: list[dict[str, Any]] = []
        self.closed = threading.Event()
        """Set when the conversation is over. With `answer`, it is over when the client has closed."""

    def event(self, name: str, data: object = None, stamp: object = "now") -> None:
        """Sends an event, by default with the current time."""
        if stamp == "now":
            wall = time.time_ns()
            stamp = {"seconds": wall // 10**9, "microseconds": wall % 10**9 // 1000}
        self.socket.sendall(json.dumps({"event": name, "data": data, "timestamp": stamp}).encode() + b"\r\n")

    def read_all(self) -> bytes:
        """The bytes that arrive until the client closes."""
        return b"".join(iter(lambda: self.socket.recv(65536), b""))

    def answer(self, replies: Callable[[str], Reply]) -> None:
        """Answers commands until the client closes."""
        for command in self._incoming():
            self.commands.append(command)
            reply = replies(command["execute"])
            if isinstance(reply, bytes):
                self.socket.sendall(reply)
            elif reply is not None:
                echoed = {key: command[key] for key in ("id",) if key in command}
                self.socket.sendall(json.dumps(reply | echoed).encode() + b"\r\n")

    def _incoming(self) -> Iterator[dict[str, Any]]:
        """Commands, which need not end with a newline (QMP is a stream of JSON objects)."""
        text = ""
        while data := self.socket.recv(65536):
            text += data.decode()
            while text.strip():
                try:
                    command, end = json.JSONDecoder().raw_decode(text.lstrip())
                except ValueError:
                    break
                text = text.lstrip()[end:]
                yield command


def refusal(text: str) -> Reply:
    """An error reply."""
    return {"error": {"class": "GenericError", "desc": text}}


def replies(pid: int, **special: Reply | Callable[[], Reply]) -> Callable[[str], Reply]:
    """What a QEMU whose vCPU thread is `pid` says; keywords (`_` for `-`) override answers."""
    usual: dict[str, Reply] = {
        "query-version": {"return": VERSION},
        "query-cpus-fast": {"return": [{"thread-id": pid}]},
        "query-status": {"return": {"status": "running"}},
        "query-migrate": {"return": {}},
    }
    by_name = {name.replace("_", "-") if name != "migrate_cancel" else name: value for name, value in special.items()}

    def reply(command: str) -> Reply:
        value = by_name.get(command, usual.get(command, {"return": {}}))
        return value() if callable(value) else value

    return reply


@contextlib.contextmanager
def serve(path: Path, talk: Talk) -> Iterator[list[Connection]]:
    """Listens at `path` and runs `talk` for each client in turn; yields the connections so far."""
    connections: list[Connection] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                connection = Connection(sock)
                connections.append(connection)
                try:
                    talk(connection)
                finally:
                    connection.closed.set()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield connections
    finally:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def qemu(pid: int, **special: Reply | Callable[[], Reply]) -> Talk:
    """A monitor that greets and answers."""

    def talk(connection: Connection) -> None:
        connection.socket.sendall(GREETING)
        connection.answer(replies(pid, **special))

    return talk
