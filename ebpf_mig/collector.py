# SPDX-License-Identifier: Apache-2.0
"""Joins the events of a recording into one migration.

In: a header and events in any order. Out: the `Breakdown`. Pure: the same events give the same result.

The story, top to bottom: take the events apart by process; tell source from destination; find the switchover,
the migration's sockets and its fetches; book every instant of the window to a phase; describe the dirty log,
the sockets, the witnesses; say how far all this can be relied upon.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import NamedTuple

from ebpf_mig.analysis import (
    completeness,
    dirty_log,
    fetch_split,
    flight,
    pause,
    phases,
    roles,
    sockets,
    waits,
    witnesses,
)
from ebpf_mig.analysis import postcopy as served
from ebpf_mig.analysis import process as processes
from ebpf_mig.analysis.attribution import attribute
from ebpf_mig.analysis.completeness import measured
from ebpf_mig.analysis.dirty_log import Burst
from ebpf_mig.analysis.migration import Case, locate, postcopy
from ebpf_mig.analysis.passes import DirtyLogRows
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.source_work import PAGE, Work
from ebpf_mig.analysis.waits import Party
from ebpf_mig.breakdown import (
    IMMEDIATE,
    Breakdown,
    Clock,
    DirtyLog,
    Endpoint,
    FinalFetch,
    Migration,
    Phase,
    Vcpu,
    Wait,
    Wire,
    Witness,
)
from ebpf_mig.join import error_bounds
from ebpf_mig.recording.events import AnyEvent, Header
from ebpf_mig.vmm.cloud_hypervisor import log_parts

_tid = attrgetter("tid")


def analyse(header: Header, events: Iterable[AnyEvent], *, truncated: bool = False, unknown: int = 0) -> Breakdown:
    """The breakdown of the migration in a recording.

    `truncated`: the recording was cut off. `unknown`: how many of its events this version cannot read.
    """
    return placed(header, events, truncated=truncated, unknown=unknown).breakdown


class Placed(NamedTuple):
    """A breakdown, and what ties it to the world outside the recording."""

    breakdown: Breakdown
    origin_ns: int
    """Its instant 0 on CLOCK_MONOTONIC of the recording's host."""
    connection: str
    """The migration's TCP connection, see `sockets.connection`; empty if there is none."""


def placed(header: Header, events: Iterable[AnyEvent], *, truncated: bool = False, unknown: int = 0) -> Placed:
    """As `analyse`, with when and over which connection."""
    with _uncollected():
        return _placed(header, events, truncated, unknown)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: the analysis makes no cycles, and each full collection walks all its lists."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _placed(header: Header, events: Iterable[AnyEvent], truncated: bool, unknown: int) -> Placed:
    material = processes.split(header, events)
    case = Case(material, *roles.assign(material.processes.values()))
    locate(case)
    window, parts, work = attribute(case)
    wires = flight.observe(case, window, work)
    origin = window[0] if window else case.since
    breakdown = Breakdown(
        migration=_migration(case, window),
        window_ns=window[1] - window[0] if window else None,
        blackout_ns=_blackout(case),
        blackout=_blackout_span(case, origin),
        phases=parts,
        vcpus=_vcpus(case, origin),
        dirty_log=_dirty_log(case, origin, parts, work),
        sockets=sockets.usage(case.channels, case.source, case.destination, window) if window else [],
        wire=wires,
        waits=_waits(case, window, parts),
        witnesses=_witnesses(case, window, parts, wires),
        completeness=completeness.completeness(material, case.source, case.destination, truncated, unknown, window),
        clock=Clock(),
        notes=_notes(case, window, work),
        pausing=pause.observe(case.source, case.switchover),
        postcopy=served.observe(case),
    )
    if header.remote is not None:
        breakdown = error_bounds.bounded(breakdown, header.remote, origin)
    return Placed(breakdown, origin, sockets.connection(case.source, case.destination, case.channels))


def _mode(case: Case) -> str:
    if case.source is None:
        return "unknown"
    if postcopy(case):
        return "postcopy"
    if case.bursts or dirty_log.switched_on(case.source, None) is not None:
        return "precopy"
    return "local" if case.switchover and case.channels.transport == "unix" else "unknown"


def _migration(case: Case, window: tuple[int, int] | None) -> Migration:
    target = next((p.target for p in (case.source, case.destination) if p and p.target), None)
    return Migration(
        vmm=target.vmm if target else "",
        vmm_version=target.vmm_version if target else "",
        mode=_mode(case),
        transport=case.channels.transport,
        connections=case.channels.connections,
        result=completeness.result(case.material, case.switchover),
        source=_endpoint(case, case.source),
        destination=_endpoint(case, case.destination),
        total_ns=window[1] - case.began if window and case.began is not None else None,
    )


def _endpoint(case: Case, process: Process | None) -> Endpoint | None:
    if process is None:
        return None
    remote = case.material.header.remote
    if remote is not None and process.pid == remote.pid:
        return Endpoint(host=remote.host, pid=remote.own_pid)
    return Endpoint(host=case.material.header.host, pid=process.pid)


def _blackout(case: Case) -> int | None:
    found = case.switchover
    return found.first_start - found.stop if found and found.first_start is not None else None


def _blackout_span(case: Case, origin: int) -> tuple[int, int] | None:
    found = case.switchover
    if found is None or found.first_start is None:
        return None
    return found.stop - origin, found.first_start - origin


def _vcpus(case: Case, origin: int) -> list[Vcpu]:
    found = case.switchover
    stops = found.stops if found else {}
    starts = found.starts if found else {}
    if found is None and case.source is None and case.destination is not None:
        lines = case.destination.vcpus.items()
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


def _dirty_log(case: Case, origin: int, parts: list[Phase], work: Work | None) -> DirtyLog:
    bursts, found = case.bursts or [], case.switchover
    if case.source is None:
        return DirtyLog(mode="none", slots=[], passes=[], final=None, fetches=[])
    stop = found.stop if found else None
    until = found.first_start if found and found.first_start is not None else 1 << 63
    rows = DirtyLogRows(
        case.source,
        bursts,
        stop,
        case.sends,
        origin,
        page=case.material.header.page_size or PAGE,
        since=case.material.header.begin_ns,
        brownout=measured(case.material, "brownout"),
    )
    last = rows.last(until)
    took = {part.phase: part.duration_ns for part in parts}
    logging = dirty_log.switched_on(case.source, stop) is not None
    final = None
    if work is not None and (last or work.memory):
        final = FinalFetch(
            kernel_ns=took["fetch.kernel"],
            user_ns=took["fetch.user"],
            pages=_pages(rows, last),
            bytes=sum(t.bytes for t in work.memory if stop is not None and t.begin_ns >= stop),
            send_ns=took["memory.send"],
            user_off_cpu_ns=rows.user_off_cpu([s for part in parts if part.phase == "fetch.user" for s in part.spans]),
            split=fetch_split.split([i for burst in last for i in burst.ioctls], rows.samples),
            rearm=rows.rearm(until),
        )
    return DirtyLog(
        mode=dirty_log.mode(bursts, logging, stop),
        slots=dirty_log.slots(case.source, bursts),
        passes=rows.passes(),
        final=final,
        fetches=rows.final(until),
        logging=rows.logging((stop, until) if stop is not None else None),
    )


def _pages(rows: DirtyLogRows, last: list[Burst]) -> int | None:
    """Ring entries of the fetches in the blackout; None with a bitmap."""
    found = [rows.returned(b, rows.bursts[at - 1] if at else None) for at, b in enumerate(rows.bursts) if b in last]
    known = [count for count in found if count is not None]
    return sum(known) if known and len(known) == len(found) else None


def _witnesses(
    case: Case, window: tuple[int, int] | None, parts: list[Phase], wires: list[Wire] | None
) -> list[Witness]:
    if case.switchover is None:
        return []
    pids = (case.source.pid if case.source else None, case.destination.pid if case.destination else None)
    found = witnesses.gather(case.material.marks, case.switchover, pids)
    paused = pause.observe(case.source, case.switchover)
    own = log_parts.explained(found, case, window, paused.kicked_late_ns if paused else 0)
    return own + log_parts.gather(case, window, parts, wires)


def _waits(case: Case, window: tuple[int, int] | None, parts: list[Phase]) -> list[Wait] | None:
    """None if sleeping was not traced."""
    if window is None or not measured(case.material, "off-cpu"):
        return None
    parties: list[Party] = []
    if case.source is not None:
        senders = frozenset(map(_tid, case.sends))
        drivers = dirty_log.fetchers(case.source) & senders or senders
        aborted = case.switchover is not None and case.switchover.kind == "aborted"
        parties.append(Party(case.source, "both" if aborted else "source", drivers, senders))
    if case.destination is not None:
        receivers = frozenset(map(_tid, case.receives))
        restorers = frozenset(i.tid for i in case.destination.ioctls if phases.is_restore(i))
        parties.append(Party(case.destination, "destination", receivers & restorers or receivers))
    return waits.gather(parties, parts, window[0])


def _notes(case: Case, window: tuple[int, int] | None, work: Work | None) -> list[str]:
    notes = [*case.notes, *case.material.header.notes]
    if window is not None and case.source is None:
        notes.append("the source was not traced: the window begins with the destination's first restore work")
    elif window is not None and case.switchover is not None and case.switchover.kind == "stopped":
        notes.append("no vCPU was seen to start on the destination: the window ends with the last that was seen")
    if work is not None and work.folded:
        notes.append("sends in the blackout were recorded as one run: where memory ends and state begins is estimated")
    notes += _unseen_sends(case)
    notes += _spinning(case)
    for side, process in (("source", case.source), ("destination", case.destination)):
        if process is None or window is None:
            continue
        took = [
            (index, end - begin)
            for index, line in process.vcpus.items()
            for begin, end in line.immediate
            if window[0] <= begin <= window[1]
        ]
        if took:
            notes.append(_immediate_note(side, took))
    return notes


def _unseen_sends(case: Case) -> list[str]:
    """Sends without a system call that we follow: how many bytes, or that there may be some."""
    hidden = sum(t.bytes for t in case.sends if t.hidden)
    if hidden:
        return [
            f"{hidden} bytes were sent past the system calls that are followed (io_uring, say): their durations "
            "are unknown"
        ]
    blind = case.source is not None and not measured(case.material, "hidden-sends")
    if blind and case.bursts and not case.sends:
        return ["no send was seen: this kernel does not show those by io_uring and the like, nor anything shows RDMA"]
    return []


def _spinning(case: Case) -> list[str]:
    """A receiver whose sender is gone gets nothing from each call; one that does not notice asks for ever."""
    vain = max((t.failed for t in case.receives if not t.calls), default=0)
    if not vain:
        return []
    return [f"the destination's last {vain} receive calls got nothing: the other end is gone, and it keeps asking"]


def _immediate_note(side: str, took: list[tuple[int, int]]) -> str:
    """One line for all KVM_RUN calls that returned at once: (vCPU, ns inside)."""
    vcpus = sorted({index for index, _ in took})
    named = ", ".join(map(str, vcpus[:8])) + (f" and {len(vcpus) - 8} more" if len(vcpus) > 8 else "")
    longest = max(ns for _, ns in took) / 1000
    calls = f"{len(took)} KVM_RUN" + ("s" if len(took) > 1 else "")
    return f"{calls} of the {side}'s vCPU {named} returned -EINTR within {longest:.1f} us{IMMEDIATE}"
