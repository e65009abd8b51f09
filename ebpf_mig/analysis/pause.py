# SPDX-License-Identifier: Apache-2.0
"""When each vCPU stopped and started, how long the VMM took to stop them, and then to notice that they had stopped.

In: the source's kicks, calls and waits. Out: rows of the breakdown. A VMM that polls every millisecond for the stop of
its vCPUs adds this notice delay to the blackout (Cloud Hypervisor: vmm/src/cpu.rs, `pause`).
"""

from __future__ import annotations

from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.process import Process, begun
from ebpf_mig.analysis.switchover import Switchover
from ebpf_mig.breakdown import Pausing, Vcpu
from ebpf_mig.recording.events import OffCpu

BEFORE_NS = 1_000_000
"""If the kicking thread got its CPU back this soon before its first kick, the kick was late."""


def driver(source: Process, found: Switchover) -> int | None:
    """The thread that requested the stop; None if none of its kicks were seen."""
    asked = any(k.tid == found.stopper for k in source.kicks if found.requested <= k.at_ns <= found.stop)
    return found.stopper if asked else None


def observe(source: Process | None, found: Switchover | None, waits_traced: bool) -> Pausing | None:
    """The pause's duration and notice delay; None unless a kick and a later call of the kicking thread were seen."""
    if source is None or found is None:
        return None
    tid = driver(source, found)
    ioctl = next((i.begin_ns for i in begun(source.ioctls, found.stop) if i.tid == tid), None)
    transfer = next((t.begin_ns for t in begun(source.transfers, found.stop) if t.tid == tid), None)
    acts = [at for at in (ioctl, transfer) if at is not None]
    if tid is None or not acts:
        return None
    noticed = min(acts)
    if not waits_traced:
        return Pausing(
            stop_ns=found.stop - found.requested,
            noticed_ns=noticed - found.stop,
            naps=None,
            asleep_ns=None,
            polling=None,
            kicked_late_ns=None,
        )
    naps = [w for w in source.off_cpu if w.tid == tid and not w.preempted and w.end_ns > found.requested]
    naps = [w for w in naps if w.begin_ns < noticed]
    return Pausing(
        stop_ns=found.stop - found.requested,
        noticed_ns=noticed - found.stop,
        naps=len(naps),
        asleep_ns=sum(min(w.end_ns, noticed) - max(w.begin_ns, found.stop) for w in naps if w.end_ns > found.stop),
        polling=any("nanosleep" in name for w in naps for name in w.stack),
        kicked_late_ns=sum(w.end_ns - w.begin_ns for w in _before(source, found, tid)),
    )


def _before(source: Process, found: Switchover, tid: int) -> list[OffCpu]:
    """The thread's last preemption before the pause request, if it ended just before it."""
    waits = [w for w in source.off_cpu if w.preempted and w.tid == tid and w.end_ns <= found.requested]
    return [w for w in waits[-1:] if found.requested - w.end_ns <= BEFORE_NS]


def vcpus(traced: TracedMigration, origin: int) -> list[Vcpu]:
    """A row for each vCPU that was seen to stop or to start, relative to `origin`, ns."""
    found = traced.switchover
    stops = found.stops if found else {}
    starts = found.starts if found else {}
    if found is None and traced.source is None and traced.destination is not None:
        lines = traced.destination.vcpus.items()
        starts = {index: line.first_run for index, line in lines if line.first_run is not None}
    rows: list[Vcpu] = []
    for index in sorted(stops.keys() | starts.keys()):
        stop, start = stops.get(index), starts.get(index)
        kick = found.kicks.get(index) if found else None
        rows.append(
            Vcpu(
                vcpu=index,
                kick_ns=stop - kick if stop is not None and kick is not None and kick <= stop else None,
                stop=None if stop is None else stop - origin,
                start=None if start is None else start - origin,
                blackout_ns=start - stop if stop is not None and start is not None and start >= stop else None,
            )
        )
    return rows
