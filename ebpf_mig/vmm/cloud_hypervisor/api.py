# SPDX-License-Identifier: Apache-2.0
"""Cloud Hypervisor's HTTP API over its UNIX socket.

In: the path of an API socket. Out: answers as Python values; refusals as VmmError in the VMM's own words, which are a
JSON array of strings since v47 and plain text before. Each call has its own connection, so a blocking call blocks only
itself. Facts: vmm/src/api/http/mod.rs (v53), docs/api.md.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from typing import Annotated, Any, TypeVar

import msgspec

from ebpf_mig.errors import VmmError
from ebpf_mig.linux import procfs
from ebpf_mig.linux.sockets import peer_pid

ANSWER_BYTES = 1 << 20
_QUICK_S = 5.0
_MARKER, _NO_URL = "ebpf-mig", 4711
_URL_OF = {"vm.send-migration": "destination_url", "vm.receive-migration": "receiver_url"}
_REMEDY = "start Cloud Hypervisor with --api-socket path=PATH and give that PATH"


class RefusedError(VmmError):
    """The VMM refused a request."""


class _Ping(msgspec.Struct):
    """The fields that we use of `VmmPingResponse` in vmm/src/api/mod.rs."""

    version: Annotated[str, msgspec.Meta(min_length=1)]
    pid: Annotated[int, msgspec.Meta(ge=0, lt=1 << 30)] = 0


class _Info(msgspec.Struct):
    state: str = ""


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

    def __init__(self, path: str, role: str) -> None:
        self.path, self.role = path, role

    def call(
        self, method: str, name: str, body: dict[str, Any] | None = None, timeout_s: float | None = _QUICK_S
    ) -> Any:
        """The decoded answer; None if it is empty. VmmError if there is no answer or it is a refusal."""
        data = self._exchange(method, name, body, timeout_s)
        try:
            return json.loads(data) if data else None
        except (ValueError, RecursionError) as error:
            raise self._invalid_answer() from error

    def _exchange(self, method: str, name: str, body: dict[str, Any] | None, timeout_s: float | None) -> bytes:
        """The answer's body, of at most ANSWER_BYTES, within a total of `timeout_s`."""
        connection = _UnixConnection(self.path, timeout_s)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method, f"/api/v1/{name}", None if body is None else json.dumps(body), headers)
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
            raise self._invalid_answer()
        if answer.status >= 300:
            raise RefusedError(f"the {self.role} refuses {name}: {_refusal(data) or f'status {answer.status}'}")
        return data

    def _typed(self, method: str, name: str, kind: type[_Answer]) -> _Answer:
        """The answer of a call, decoded as the given type."""
        data = self._exchange(method, name, None, _QUICK_S)
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise self._invalid_answer() from error

    def _unusable(self, name: str, connection: _UnixConnection, error: Exception) -> VmmError:
        if connection.late or isinstance(error, TimeoutError):
            return VmmError(f"the {self.role} at {self.path} does not answer {name}")
        why = "it does not speak HTTP"
        if isinstance(error, http.client.RemoteDisconnected):
            why = "it closed the connection"
        elif isinstance(error, OSError):
            why = error.strerror or type(error).__name__
        return VmmError(f"cannot use {self.path} as the {self.role}'s API socket: {why}", _REMEDY)

    def _invalid_answer(self) -> VmmError:
        return VmmError(f"{self.path} does not answer like Cloud Hypervisor", _REMEDY)

    def ping(self) -> tuple[int, str]:
        """(pid on this host, version). The peer's credentials take precedence over the pid in the VMM's own
        namespace.
        """
        answer = self._typed("GET", "vmm.ping", _Ping)
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(_QUICK_S)
                probe.connect(self.path)
                peer = peer_pid(probe)
        except OSError as error:
            raise VmmError(f"cannot use {self.path} as the {self.role}'s API socket: {error.strerror}") from error
        return (peer if procfs.holds_kvm(peer) or not answer.pid else answer.pid), answer.version[:64]

    def state(self) -> str:
        """The VM's state (`Running`, `Paused`, ...), empty if there is no VM."""
        try:
            return self._typed("GET", "vm.info", _Info).state[:64]
        except RefusedError:
            return ""

    def knows(self, name: str, field: str) -> bool | None:
        """Whether a call that takes JSON knows a field; None if its answer does not show it.

        The VMM silently ignores unknown fields. It refuses known fields of a wrong type while it parses the body
        (serde), before it acts. So the request has a wrong type for both this field and the URL, and the refusal names
        the first of them that the VMM knows.
        """
        try:
            self.call("PUT", name, {field: {_MARKER: 0}, _URL_OF.get(name, "destination_url"): _NO_URL})
        except RefusedError as error:
            words = str(error)
            if str(_NO_URL) in words:
                return False
            return True if _MARKER in words or "invalid type" in words else None
        return None


def _refusal(data: bytes) -> str:
    text = data.decode(errors="replace").strip()
    try:
        parts = json.loads(text)
    except (ValueError, RecursionError):
        return text[:500]
    return ": ".join(str(part) for part in parts)[:500] if isinstance(parts, list) else text[:500]
