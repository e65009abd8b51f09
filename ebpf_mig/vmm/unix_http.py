# SPDX-License-Identifier: Apache-2.0
"""HTTP over a UNIX socket: what VMMs with such an API have in common.

In: the path of an API socket. Out: the body of an answer, checked by type, size and total time; a VmmError of one line
for everything else. Each call has its own connection, so a blocking call blocks only itself. A VMM subclasses `Api`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from typing import Any, ClassVar, TypeVar

import msgspec

from ebpf_mig.errors import VmmError
from ebpf_mig.linux.sockets import peer_pid

ANSWER_BYTES = 1 << 20
QUICK_S = 5.0
"""Total time for a call that does not block; s."""
_REASON_CHARACTERS = 500


class RefusedError(VmmError):
    """The VMM refused a request."""


_Answer = TypeVar("_Answer", bound=msgspec.Struct)


class _UnixConnection(http.client.HTTPConnection):
    """One call with a total time-out. A per-read time-out would not stop a peer that sends one byte per second."""

    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path
        self.late = False
        self._clock = threading.Timer(timeout_s or 0, self._end) if timeout_s is not None else None

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
        self._peer = self.sock
        if self._clock is not None:
            self._clock.daemon = True
            self._clock.start()

    def _end(self) -> None:
        self.late = True
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
        super().close()


class Api:
    """One VMM's API socket; safe to use from several threads."""

    title: ClassVar[str]
    """The VMM's name in text."""
    root: ClassVar[str]
    """What stands before a call's name in the request: `/api/v1/`."""
    remedy: ClassVar[str]
    """What to do if the socket is not that of a VMM."""

    def __init__(self, path: str, role: str) -> None:
        self.path, self.role = path, role

    def call(
        self, method: str, name: str, body: dict[str, Any] | None = None, timeout_s: float | None = QUICK_S
    ) -> Any:
        """The decoded answer; None if it is empty. VmmError if there is no answer or it is a refusal."""
        _, data = self.exchange(method, name, body, timeout_s)
        try:
            return json.loads(data) if data else None
        except (ValueError, RecursionError) as error:
            raise self.invalid_answer() from error

    def exchange(
        self, method: str, name: str, body: dict[str, Any] | None, timeout_s: float | None
    ) -> tuple[int, bytes]:
        """The answer's status, below 300, and its body, of at most ANSWER_BYTES, within a total of `timeout_s`."""
        connection = _UnixConnection(self.path, timeout_s)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method, self.root + name, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            data = answer.read(ANSWER_BYTES + 1)
            if connection.late:
                raise TimeoutError
        except (OSError, http.client.HTTPException, ValueError) as error:
            # ValueError: a chunk's or a body's length of thousands of digits, a NUL in the path.
            raise self._unusable(name, connection, error) from error
        finally:
            connection.close()
        if len(data) > ANSWER_BYTES:
            raise self.invalid_answer()
        if answer.status >= 300:
            reason = self.reason(data)[:_REASON_CHARACTERS] or f"status {answer.status}"
            raise RefusedError(f"the {self.role} refuses {name}: {reason}")
        return answer.status, data

    def typed(self, method: str, name: str, kind: type[_Answer]) -> _Answer:
        """The answer of a quick call, decoded as the given type."""
        _, data = self.exchange(method, name, None, QUICK_S)
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise self.invalid_answer() from error

    def reason(self, data: bytes) -> str:
        """The VMM's own words in the body of a refusal."""
        return data.decode(errors="replace").strip()

    def creator(self) -> int:
        """The pid that created the socket; 0 if it cannot be seen from here."""
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(QUICK_S)
                probe.connect(self.path)
                return peer_pid(probe)
        except OSError as error:
            raise VmmError(f"cannot use {self.path} as the {self.role}'s API socket: {error.strerror}") from error

    def _unusable(self, name: str, connection: _UnixConnection, error: Exception) -> VmmError:
        if connection.late or isinstance(error, TimeoutError):
            return VmmError(f"the {self.role} at {self.path} does not answer {name}")
        why = "it does not speak HTTP"
        if isinstance(error, http.client.RemoteDisconnected):
            why = "it closed the connection"
        elif isinstance(error, OSError):
            why = error.strerror or type(error).__name__
        return VmmError(f"cannot use {self.path} as the {self.role}'s API socket: {why}", self.remedy)

    def invalid_answer(self) -> VmmError:
        """The error for an answer that the VMM would not give."""
        return VmmError(f"{self.path} does not answer like {self.title}", self.remedy)
