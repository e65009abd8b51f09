# SPDX-License-Identifier: Apache-2.0
"""Whether the guest was handed to a new program on the same host that keeps its memory: QEMU's CPR.

In: the two processes, the switchover, when dirty logging was switched on. Out: yes or no, and how many descriptors were
passed. The new program is a second process, or the same one after execve(2).

QEMU (migration/migration.c, migration/cpr*.c, 10.0 to 11.1) stops the guest before it begins to migrate. Memory, and
with VFIO devices much else, stays in descriptors: they are inherited over execve(2), or sent through a UNIX socket. The
migration's own stream has the state only. A paused guest that migrates in the usual way has its memory sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.switchover import Switchover
from ebpf_mig.breakdown import LiveUpdate, Phase, PhaseName
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import SEND, Transfer

PAGE = 4096
LEAST_BYTES_PER_PAGE = 8
"""Every page that is sent needs a header of this size, also one that is all zero (migration/ram.c, multifd.c)."""


def took_place(
    source: Process,
    destination: Process | None,
    found: Switchover | None,
    logged_from: int | None,
    sends: Sequence[Transfer],
) -> bool:
    """Whether this is a live update. `logged_from`: when dirty logging was last switched on. `sends`: what the source
    sent for the migration."""
    if destination is not None and destination.born is not None:
        return True
    if found is None or logged_from is None or logged_from < found.stop:
        return False
    memory = max((size for _, size in source.places.values()), default=0)
    sent = sum(t.bytes for t in sends if t.begin_ns >= found.stop)
    return sent < memory // PAGE * LEAST_BYTES_PER_PAGE and descriptors_passed(source, destination, found.stop) > 0


def descriptors_passed(source: Process, destination: Process | None, until: int) -> int:
    """Number of descriptors that the source sent to the destination before `until`; to anybody if that is unknown."""
    peers = destination.sockets.keys() if destination is not None else ()
    found = 0
    for transfer in source.transfers:
        if not transfer.descriptors or transfer.direction != SEND or transfer.begin_ns >= until:
            continue
        socket = source.sockets.get(transfer.socket)
        if destination is None or socket is None or not socket.peer or socket.peer in peers:
            found += transfer.descriptors
    return found


def describe(
    source: Process | None, destination: Process | None, phases: Sequence[Phase], origin: int, stop: int | None
) -> LiveUpdate:
    """What was passed, and what KVM did during the start-up. `phases` are relative to `origin`."""
    inherited = destination is not None and destination.born is not None
    passed = None
    if source is not None and stop is not None and not inherited:
        passed = descriptors_passed(source, destination, stop)
    spans = [(origin + b, origin + e) for p in phases if p.phase == PhaseName.STARTUP for b, e in p.spans]
    if not spans or destination is None:
        return LiveUpdate(descriptors=passed, setup_ns=None)
    took: Counter[str] = Counter()
    for ioctl in destination.ioctls:
        for begin, end in spans:
            took[kvm.name_of(ioctl.cmd)] += max(0, min(ioctl.end_ns, end) - max(ioctl.begin_ns, begin))
    slowest = max(took, key=lambda name: (took[name], name), default="")
    return LiveUpdate(descriptors=passed, setup_ns=sum(took.values()), slowest=slowest, slowest_ns=took[slowest])
