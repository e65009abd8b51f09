# SPDX-License-Identifier: Apache-2.0
"""Reads one migration's figures from Cloud Hypervisor's log, on either side.

In: a log file and a start offset, since one log may cover many migrations. Out: its own figures in ms by name,
and its reason for a failure. Fields are found by key, so their order does not matter.
Lines: vmm/src/lib.rs and vm-migration/src/context.rs (v52 to v54).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ebpf_mig.vmm.base import RemoteEnd

LOG_MOST_BYTES = 1 << 24
"""Bytes read from the log's end. With -vv the VMM logs a line for each dirty range."""
MOST_THERE_BYTES = 1 << 20
"""Bytes read from the log of a VMM on another host."""

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


@dataclass(frozen=True)
class LogPlace:
    """A log file, and how long it was when the migration began."""

    path: str
    offset: int
    there: RemoteEnd | None = None
    """The host of the file; None: this one."""

    @classmethod
    def now(cls, path: str, there: RemoteEnd | None = None) -> LogPlace:
        """The file's present end; 0 if the file does not exist yet."""
        if there is not None:
            return cls(path, _size_there(there, path), there)
        try:
            return cls(path, Path(path).stat().st_size)
        except OSError:
            return cls(path, 0)

    def lines(self) -> list[str]:
        """The text written since then; empty if the log cannot be read."""
        if self.there is not None:
            end = _size_there(self.there, self.path)
            since = end - self.offset if self.offset <= end else end
            return self.there.output("tail", "-c", str(min(since, MOST_THERE_BYTES)), self.path).splitlines()
        try:
            with Path(self.path).open("rb") as file:
                end = file.seek(0, 2)
                begin = self.offset if self.offset <= end else 0
                file.seek(max(begin, end - LOG_MOST_BYTES))
                return file.read(LOG_MOST_BYTES).decode(errors="replace").splitlines()
        except OSError:
            return []

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


def _size_there(there: RemoteEnd, path: str) -> int:
    size = there.output("wc", "-c", path).split()
    return int(size[0]) if size and re.fullmatch(r"\d{1,18}", size[0], re.ASCII) else 0
