# SPDX-License-Identifier: Apache-2.0
"""Reads one migration's figures from Cloud Hypervisor's log, on either side.

In: a log file and a start offset, since one log may cover many migrations. Out: its own figures in ms by name,
and its reason for a failure. Fields are found by key, so their order does not matter.
Lines: vmm/src/lib.rs and vm-migration/src/context.rs (v52 to v54).
"""

from __future__ import annotations

import re

from ebpf_mig.vmm import log_place

_TOTAL = re.compile(r"Migration completed after \S+ with a downtime of (\d{1,12})ms", re.ASCII)
_STATE_TO_RESUME = re.compile(r"Receiving final state and resuming the VM took (\d{1,12})ms", re.ASCII)
_FAILED = re.compile(r"Migration failed: (.{1,500})")
_PART = re.compile(r"\b([a-z_]+)[:=](\d{1,12})ms", re.ASCII)
_PARTS = {
    "Downtime breakdown:": ("final_iter", "state", "send_state", "complete"),
    "Migration (incoming):": ("recv_snapshot", "restore", "resume"),
    "Precopy complete:": ("overhead",),
}
"""The keys that are read, per line. `overhead` is the part of the final iteration that is not its transfer."""


class LogPlace(log_place.LogPlace):
    """A log file, and how long it was when the migration began."""

    def figures(self) -> dict[str, int]:
        """The VMM's own figures in ms by name, the last of each.

        `downtime` and, where it logs at debug level, `final_iter`, `overhead`, `state`, `send_state`, `complete` of the
        source; `recv_snapshot`, `restore`, `resume`, `state_to_resume` of the destination.
        """
        found: dict[str, int] = {}
        for line in self.lines():
            if total := _TOTAL.search(line):
                found["downtime"] = int(total[1])
            if took := _STATE_TO_RESUME.search(line):
                found["state_to_resume"] = int(took[1])
            for start, wanted in _PARTS.items():
                if start in line:
                    found |= {name: int(ms) for name, ms in _PART.findall(line) if name in wanted}
        return found

    def failure(self) -> str:
        """The logged reason of the failure (v53 and later); empty if there is none."""
        found = [match[1].strip() for line in self.lines() if (match := _FAILED.search(line))]
        return found[-1][:500] if found else ""
