# SPDX-License-Identifier: Apache-2.0
"""Cloud Hypervisor's HTTP API over its UNIX socket.

In: the path of an API socket. Out: answers as Python values; refusals as VmmError in the VMM's own words, which
are a JSON array of strings since v47 and plain text before. One connection a call: a blocking call blocks only itself.
Facts: vmm/src/api/http/mod.rs (v53), docs/api.md.
"""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

from ebpf_mig.errors import VmmError
from ebpf_mig.linux import procfs
from ebpf_mig.linux.sockets import peer_pid

ANSWER_BYTES = 1 << 20
_QUICK_S = 5.0
_MARKER, _NO_URL = "ebpf-mig", 4711
_URL_OF = {"vm.send-migration": "destination_url", "vm.receive-migration": "receiver_url"}
_REMEDY = "start Cloud Hypervisor with --api-socket path=PATH and give that PATH"


class RefusedError(VmmError):
    """The VMM answered, and the answer was no."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Api:
    """One VMM's API socket; safe to use from several threads."""

    def __init__(self, path: str, role: str) -> None:
        self.path, self.role = path, role

    def call(
        self, method: str, name: str, body: dict[str, Any] | None = None, timeout_s: float | None = _QUICK_S
    ) -> Any:
        """The decoded answer, None if it is empty; VmmError if there is none or it is a refusal."""
        connection = _UnixConnection(self.path, timeout_s)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method, f"/api/v1/{name}", None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            data = answer.read(ANSWER_BYTES)
        except TimeoutError as error:
            raise VmmError(f"the {self.role} at {self.path} does not answer {name}") from error
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise VmmError(f"cannot use {self.path} as the {self.role}'s API socket: {why}", _REMEDY) from error
        except http.client.HTTPException as error:
            why = (
                "it closed the connection"
                if isinstance(error, http.client.RemoteDisconnected)
                else "it does not speak HTTP"
            )
            raise VmmError(f"cannot use {self.path} as the {self.role}'s API socket: {why}", _REMEDY) from error
        finally:
            connection.close()
        if answer.status >= 300:
            raise RefusedError(f"the {self.role} refuses {name}: {_refusal(data) or f'status {answer.status}'}")
        return _decoded(data, self.path) if data else None

    def ping(self) -> tuple[int, str]:
        """(pid as this host sees it, version). The peer's credentials win over the pid in the VMM's own namespace."""
        answer = self.call("GET", "vmm.ping")
        version = str(answer.get("version", "")) if isinstance(answer, dict) else ""
        if not version:
            raise VmmError(f"{self.path} does not answer like Cloud Hypervisor", _REMEDY)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(self.path)
            peer = peer_pid(probe)
        own = int(answer.get("pid", 0))
        return (peer if procfs.holds_kvm(peer) or not own else own), version

    def state(self) -> str:
        """The VM's state (`Running`, `Paused`, ...), empty if there is no VM."""
        try:
            answer = self.call("GET", "vm.info")
        except RefusedError:
            return ""
        return str(answer.get("state", "")) if isinstance(answer, dict) else ""

    def knows(self, name: str, field: str) -> bool | None:
        """Whether a call that takes JSON knows a field; None if its answer does not tell.

        Unknown fields are ignored without a word, known ones of the wrong type are refused while the body is being
        read (serde), before anything is done. So both this field and the URL are of a wrong type, and the refusal
        is about the first of them that is known.
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


def _decoded(data: bytes, path: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise VmmError(f"{path} does not answer like Cloud Hypervisor", _REMEDY) from error
