# SPDX-License-Identifier: Apache-2.0
"""Cloud Hypervisor's HTTP API over its UNIX socket.

In: the path of an API socket. Out: answers as Python values; refusals as VmmError in the VMM's own words, which are a
JSON array of strings since v47 and plain text before. Facts: vmm/src/api/http/mod.rs (v53), docs/api.md.
"""

from __future__ import annotations

import json
from typing import Annotated

import msgspec

from ebpf_mig.linux import descriptors
from ebpf_mig.vmm import unix_http
from ebpf_mig.vmm.unix_http import RefusedError

_MARKER, _NO_URL = "ebpf-mig", 4711
_URL_OF = {"vm.send-migration": "destination_url", "vm.receive-migration": "receiver_url"}


class _Ping(msgspec.Struct):
    """The fields that we use of `VmmPingResponse` in vmm/src/api/mod.rs."""

    version: Annotated[str, msgspec.Meta(min_length=1)]
    pid: Annotated[int, msgspec.Meta(ge=0, lt=1 << 30)] = 0


class _Info(msgspec.Struct):
    state: str = ""


class Api(unix_http.Api):
    """One VMM's API socket; safe to use from several threads."""

    title = "Cloud Hypervisor"
    root = "/api/v1/"
    remedy = "start Cloud Hypervisor with --api-socket path=PATH and give that PATH"

    def ping(self) -> tuple[int, str]:
        """(pid on this host, version). The peer's credentials take precedence over the pid in the VMM's own
        namespace.
        """
        answer = self.typed("GET", "vmm.ping", _Ping)
        peer = self.creator()
        return (peer if descriptors.holds_kvm(peer) or not answer.pid else answer.pid), answer.version[:64]

    def state(self) -> str:
        """The VM's state (`Running`, `Paused`, ...), empty if there is no VM."""
        try:
            return self.typed("GET", "vm.info", _Info).state[:64]
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

    def reason(self, data: bytes) -> str:
        """The parts of a refusal, joined."""
        text = super().reason(data)
        try:
            parts = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return ": ".join(str(part) for part in parts) if isinstance(parts, list) else text
