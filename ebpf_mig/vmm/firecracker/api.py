# SPDX-License-Identifier: Apache-2.0
"""Firecracker's HTTP API over its UNIX socket.

In: the path of an API socket. Out: answers as Python values; refusals as VmmError in the VMM's own words, which are in
`fault_message`. One thread of the VMM serves all connections: during a call, no other is answered.
Facts: src/firecracker/src/api_server (v1.13 to v1.16).
"""

from __future__ import annotations

import http
import json
from typing import Annotated, Any, Literal

import msgspec

from ebpf_mig.errors import VmmError
from ebpf_mig.linux import procfs
from ebpf_mig.vmm import unix_http

NOT_STARTED, PAUSED, RUNNING = "Not started", "Paused", "Running"
MIB = 1 << 20


class Instance(msgspec.Struct):
    """`InstanceInfo`, the answer of GET /."""

    app_name: Literal["Firecracker"]
    state: Literal["Not started", "Paused", "Running"]
    vmm_version: Annotated[str, msgspec.Meta(min_length=1)]


class _Machine(msgspec.Struct):
    """The field that we use of the answer of GET /machine-config."""

    mem_size_mib: Annotated[int, msgspec.Meta(ge=1, lt=1 << 40)]


class Api(unix_http.Api):
    """One VMM's API socket; safe to use from several threads."""

    title = "Firecracker"
    root = "/"
    remedy = "start Firecracker with --api-sock PATH and give that PATH"

    def instance(self) -> Instance:
        """Its state and version."""
        return self.typed("GET", "", Instance)

    def memory_bytes(self) -> int:
        """The guest's memory."""
        return self.typed("GET", "machine-config", _Machine).mem_size_mib * MIB

    def pid(self) -> int:
        """Its pid on this host; VmmError if it cannot be seen from here."""
        pid = self.creator()
        if not pid or not procfs.is_alive(pid):
            raise VmmError(f"the {self.role}'s process cannot be seen: it is in another pid namespace", "run as root")
        return pid

    def pause(self, timeout_s: float | None) -> None:
        """Stops the vCPUs; has no effect on a paused VM."""
        self._command("PATCH", "vm", {"state": "Paused"}, timeout_s)

    def resume(self, timeout_s: float | None) -> None:
        """Starts the vCPUs; has no effect on a running VM."""
        self._command("PATCH", "vm", {"state": "Resumed"}, timeout_s)

    def create(self, body: dict[str, Any], timeout_s: float | None) -> None:
        """Writes a snapshot of the paused VM."""
        self._command("PUT", "snapshot/create", body, timeout_s)

    def load(self, body: dict[str, Any], timeout_s: float | None) -> None:
        """Loads a snapshot. If that fails the process ends, unless it refused before it began."""
        self._command("PUT", "snapshot/load", body, timeout_s)

    def _command(self, method: str, name: str, body: dict[str, Any], timeout_s: float | None) -> None:
        """A call whose only answer is 204, without a body."""
        if self.exchange(method, name, body, timeout_s) != (http.HTTPStatus.NO_CONTENT, b""):
            raise self.invalid_answer()

    def reason(self, data: bytes) -> str:
        """The `fault_message` of a refusal."""
        text = super().reason(data)
        try:
            fault = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return str(fault.get("fault_message", text)) if isinstance(fault, dict) else text
