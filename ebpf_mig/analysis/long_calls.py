# SPDX-License-Identifier: Apache-2.0
"""KVM ioctls that took long in the window.

In: both sides, the window's phases. Out: the long ioctls of the threads that drive the migration, with the phases in
which they delay it. KVM works in them, or sleeps; the waits tell which. Calls of the dirty log are not among them:
they have phases of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ebpf_mig.analysis.waits import Party, extent, phases_of
from ebpf_mig.breakdown import Phase, PhaseName, Side
from ebpf_mig.linux import kvm
from ebpf_mig.recording.thresholds import LONG_WAIT_NS


@dataclass(frozen=True, slots=True)
class LongCall:
    """An ioctl of which LONG_WAIT_NS or more lie in the window."""

    begin: int
    end: int
    side: Side
    thread: str
    """Name and tid."""
    name: str
    """As `kvm.name_of`."""
    phases: tuple[PhaseName, ...]
    """The phases in which it delays the migration."""


def long_calls(parties: Sequence[Party], phases: Sequence[Phase], origin: int) -> list[LongCall]:
    """The long ioctls of all sides, in order for each thread; absolute."""
    first, last = extent(phases, origin)
    found: list[LongCall] = []
    for party in parties:
        near = [
            i for i in party.process.ioctls if i.begin_ns < last and i.end_ns - max(i.begin_ns, first) >= LONG_WAIT_NS
        ]
        for i in near:
            names = phases_of(party, i.tid, phases)
            if names and i.cmd not in kvm.DIRTY_LOG:
                name = kvm.name_of(i.cmd)
                found.append(LongCall(i.begin_ns, i.end_ns, party.side, party.thread(i.tid), name, names))
    return found
