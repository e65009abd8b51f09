# SPDX-License-Identifier: Apache-2.0
"""Reads Firecracker's own times of the calls of one snapshot from its log.

In: a log file (`--log-path`, level Info) and a start offset. Out: times in us by the name that Firecracker's metrics
have for them: `pause_vm`, `full_create_snapshot`, `diff_create_snapshot`, `load_snapshot`, `resume_vm` as the API
counts, and the same with `vmm_` before it as the VMM's own thread counts. The log has `vmm_load_snapshot` only at
level Debug. Lines: src/vmm/src/rpc_interface.rs and src/firecracker/src/api_server/mod.rs (v1.13 to v1.16).
"""

from __future__ import annotations

import re

from ebpf_mig.vmm import log_place

_CALLS = {
    "pause vm": "pause_vm",
    "resume vm": "resume_vm",
    "create full snapshot": "full_create_snapshot",
    "create diff snapshot": "diff_create_snapshot",
    "load snapshot": "load_snapshot",
}
_TOOK = re.compile(rf"'({'|'.join(_CALLS)})' (VMM action|API request) took (\d{{1,12}}) us\.", re.ASCII)
NAMES = frozenset(prefix + name for name in _CALLS.values() for prefix in ("", "vmm_"))


class LogPlace(log_place.LogPlace):
    """A log file, and how long it was when the snapshot began."""

    def figures(self) -> dict[str, int]:
        """The VMM's own times in us, the last of each."""
        found: dict[str, int] = {}
        for line in self.lines():
            for call, kind, us in _TOOK.findall(line):
                found[("vmm_" if kind == "VMM action" else "") + _CALLS[call]] = int(us)
        return found
