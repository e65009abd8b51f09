# SPDX-License-Identifier: Apache-2.0
"""Keeps the kernel's records undecoded while a guest is stopped, so that our process leaves the CPUs to the VMMs.

In: records as they arrive, and whether a guest runs. Out: the records to decode now, in the order of their arrival; at
once, the events at which a blackout may begin or end.

Records are held from a kick until a vCPU enters KVM_RUN, and some time after, so that the other vCPUs can start, too.
They are due at once if the kick turns out not to have stopped the guest, or after `MOST_HELD_NS`; also with a new
carrier or an execve(2), since other processes may have to be traced then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from ebpf_mig.probes.records import decode
from ebpf_mig.recording.events import AnyEvent, Exec, Kick, Socket, VcpuEnter
from ebpf_mig.recording.kinds import BY_TYPE
from ebpf_mig.recording.layout import WORD

MOST_HELD_NS = 200_000_000
"""How long a record is held at most. The live view, and the decision that a migration is over, wait for them."""
LEAVING_NS = 20_000_000
"""How long a kicked vCPU may take to leave KVM_RUN. So long nothing is concluded from its being inside."""
STARTING_NS = 10_000_000
"""How long records are held after a vCPU has entered."""


def _head(kind: type) -> bytes:
    """The first bytes of the records of a kind."""
    record = BY_TYPE[kind].record
    assert record is not None  # noqa: S101 - a kind that comes from the kernel
    return record.number.to_bytes(WORD, sys.byteorder)


_KICK, _ENTER = _head(Kick), _head(VcpuEnter)
_PRESSING = {_head(Socket), _head(Exec)}


class Backlog:
    """The records that are not decoded yet. Call `add` with all that arrive, then `take`."""

    def __init__(self, runs: Callable[[int], bool]) -> None:
        """`runs`: whether a vCPU of a process is inside KVM_RUN now."""
        self._runs = runs
        self._records: list[bytes] = []
        self._kicked: dict[int, int] = {}
        """By process that may have stopped its guest: when its latest kick arrived."""
        self._oldest_ns = 0
        """When the first of the records arrived."""
        self._started_ns = 0
        """When a vCPU last entered KVM_RUN."""
        self._pressing = False

    def add(self, records: Sequence[bytes], now_ns: int) -> list[AnyEvent]:
        """Takes records. Returns the kicks and the entries into KVM_RUN among them, which `take` returns again."""
        edges: list[AnyEvent] = []
        for record in records:
            kind = record[:WORD]
            if kind == _KICK:
                edges.append(kick := decode(record))
                pid: int = kick.pid  # type: ignore[union-attr]
                self._kicked[pid] = now_ns
            elif kind == _ENTER:
                edges.append(decode(record))
                self._kicked.clear()
                self._started_ns = now_ns
            elif kind in _PRESSING:
                self._pressing = True
        self._oldest_ns = self._oldest_ns if self._records else now_ns
        self._records += records
        return edges

    @property
    def holds(self) -> bool:
        """Whether records are held: what was returned so far is not all that happened."""
        return bool(self._records)

    def take(self, now_ns: int) -> list[bytes] | None:
        """The records to decode now; None while they are held."""
        if not self._pressing and self._holds(now_ns):
            return None
        return self.release()

    def release(self) -> list[bytes]:
        """All records, held or not."""
        self._pressing = False
        records, self._records = self._records, []
        return records

    def forget(self, pid: int) -> None:
        """Waits no longer for the guest of this process."""
        self._kicked.pop(pid, None)

    def _holds(self, now_ns: int) -> bool:
        if now_ns - self._oldest_ns >= MOST_HELD_NS:
            self._kicked.clear()
            self._started_ns = 0
        for pid, kicked_ns in list(self._kicked.items()):
            if now_ns - kicked_ns >= LEAVING_NS and self._runs(pid):
                del self._kicked[pid]
        return bool(self._kicked) or now_ns - self._started_ns < STARTING_NS
