# SPDX-License-Identifier: Apache-2.0
"""Analyses a recording: makes the breakdown of one migration from its events.

In: a recording, its events in any order. Out: an `Analysis` with the `Breakdown`. Pure: the same events give the same
result.

The steps in order: split the events by process; assign source and destination; find the switchover, the migration's
sockets and its fetches; assign every instant of the window to a phase; describe the dirty log, the sockets and the
witnesses; state how reliable the result is; name what dominates.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from ebpf_mig import vmm
from ebpf_mig.analysis import bandwidth as link
from ebpf_mig.analysis import (
    completeness,
    condensed,
    diagnosis,
    dirty_log,
    drivers,
    faults,
    fetch_split,
    hops,
    live_update,
    lost_cpu,
    notes,
    outcome,
    own_cost,
    own_time,
    pairing,
    pause,
    postcopy,
    sockets,
    throttle,
    waits,
    wire,
    witnesses,
)
from ebpf_mig.analysis.attributed import Attribution
from ebpf_mig.analysis.attribution import attribute
from ebpf_mig.analysis.dirty_log import Burst
from ebpf_mig.analysis.material import split
from ebpf_mig.analysis.migration import TracedMigration, identify
from ebpf_mig.analysis.passes import DirtyLogRows
from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.result import Analysis
from ebpf_mig.analysis.source_work import PAGE
from ebpf_mig.analysis.spans import FOREVER
from ebpf_mig.analysis.uncollected import uncollected
from ebpf_mig.breakdown import (
    Breakdown,
    Clock,
    Completeness,
    DirtyLog,
    DirtyLogMode,
    Endpoint,
    FinalFetch,
    LiveUpdate,
    ManagerWait,
    Migration,
    Mode,
    Pausing,
    Phase,
    PhaseName,
    Result,
    Side,
    Span,
    Stolen,
    Throttled,
    Transport,
    Wire,
    Witness,
)
from ebpf_mig.joining import error_bounds
from ebpf_mig.recording.budget import TooLargeError
from ebpf_mig.recording.coalesce import read_coalesced, read_whole_or_coalesced
from ebpf_mig.recording.condense import read_condensed
from ebpf_mig.recording.events import FORWARDER, KEEPER, NEIGHBOUR
from ebpf_mig.recording.file import Recording


@uncollected()
def analyse(recording: Recording) -> Analysis:
    """The migration in a recording: its breakdown, and the data that it was made from."""
    traced = identify(split(recording), vmm.mark_names())
    attribution = attribute(traced)
    window = attribution.window
    origin = window[0] if window else traced.since
    wires = wire.observe(traced, window, attribution.work)
    slept = drivers.sleeps(traced, attribution)
    pausing = pause.observe(traced.source, traced.switchover, traced.material.traced("off-cpu"))
    breakdown = Breakdown(
        migration=_migration(traced, window),
        window_ns=window[1] - window[0] if window else None,
        blackout_ns=_blackout(traced),
        blackout=_blackout_span(traced, origin),
        phases=attribution.phases,
        vcpus=pause.vcpus(traced, origin),
        dirty_log=_dirty_log(traced, origin, attribution),
        sockets=sockets.usage(traced.channels, traced.source, traced.destination, window) if window else [],
        wire=wires,
        waits=None if slept is None else waits.longest(slept, attribution.phases, origin),
        witnesses=_witnesses(traced, attribution, wires, pausing),
        completeness=_completeness(traced, attribution),
        clock=Clock(),
        notes=notes.gather(traced, window, attribution.work),
        pausing=pausing,
        postcopy=postcopy.observe(traced),
        page_faults=faults.observe(traced),
        live_update=_live_update(traced, attribution.phases, origin),
        throttled=_throttled(traced),
        management=_management(traced, attribution),
        stolen=_stolen(traced, window),
        hops=hops.observe(traced, origin),
    )
    if recording.header.remote is not None:
        breakdown = error_bounds.bounded(breakdown, recording.header.remote, origin)
    calls = drivers.long_calls(traced, attribution)
    breakdown = replace(breakdown, diagnosis=diagnosis.diagnose(breakdown, slept, calls, link.observe(traced), origin))
    connection = sockets.connection(traced.source, traced.destination, traced.channels)
    return Analysis(breakdown, traced, attribution, origin, connection)


def analyse_file(path: str, prepared: Callable[[Recording], Recording] = lambda recording: recording) -> Analysis:
    """The migration in a file. What far calls of a long recording sum up to is known, but not each of them.

    So it is not for reports with a time axis. All others are those of all events, to the byte, unless the recording
    takes more memory than the size of its file justifies. `prepared` is applied to what was read, which may be twice.
    """
    try:
        found = read_condensed(path)
    except TooLargeError:
        return analyse(prepared(read_coalesced(path)))
    analysis = analyse(prepared(found.recording))
    if condensed.is_exact(analysis, found):
        return analysis
    del found, analysis  # both can be large
    return analyse(prepared(read_whole_or_coalesced(path)))


def _mode(traced: TracedMigration, result: Result) -> Mode:
    if traced.live_update:
        return Mode.CPR
    if result == Result.SAVED and outcome.kept(traced):
        return Mode.SNAPSHOT
    if traced.loaded_again:
        return Mode.RESTORE
    if traced.source is None:
        return Mode.RESTORE if traced.restored is not None else Mode.UNKNOWN
    if traced.snapshot is not None:
        return Mode.SNAPSHOT
    if traced.postcopy:
        return Mode.POSTCOPY
    if traced.bursts or dirty_log.switched_on(traced.source, None) is not None:
        return Mode.PRECOPY
    shared = traced.switchover is not None and traced.channels.transport == Transport.UNIX
    return Mode.LOCAL if shared else Mode.UNKNOWN


def _migration(traced: TracedMigration, window: Span | None) -> Migration:
    target = next((p.target for p in (traced.source, traced.destination) if p and p.target), None)
    result = outcome.result(traced)
    return Migration(
        vmm=target.vmm if target else _recognised(traced),
        vmm_version=target.vmm_version if target else "",
        mode=_mode(traced, result),
        transport=traced.channels.transport,
        connections=_connections(traced),
        result=result,
        paused_before=outcome.paused_before(traced),
        paused_after=outcome.paused_after(traced),
        stopped_early=outcome.stopped_early(traced),
        pairing=pairing.observe(traced),
        source=_endpoint(traced, traced.source),
        destination=_endpoint(traced, traced.destination),
        total_ns=window[1] - traced.began if window and traced.began is not None else None,
        through=_through(traced),
    )


def _through(traced: TracedMigration) -> list[str]:
    """Who holds the other ends of the carriers, each process once."""
    marks = [mark for mark in traced.material.marks if mark.name in (NEIGHBOUR, FORWARDER, KEEPER)]
    ends = ((traced.source, traced.channels.source), (traced.destination, traced.channels.destination))
    found = [m.detail for side, keys in ends if side for m in marks if m.pid == side.pid and m.value in keys]
    return list(dict.fromkeys(found))


def _connections(traced: TracedMigration) -> int | None:
    found = traced.channels.connections
    return found if found or traced.channels.transport == Transport.NONE else None


def _completeness(traced: TracedMigration, attribution: Attribution) -> Completeness:
    window, material = attribution.window, traced.material
    tracing = own_time.observe(material, window, attribution.phases)
    cost = own_cost.of(tracing) if tracing else own_cost.observe(material, window, attribution.phases)
    found, saved = traced.switchover, traced.snapshot is not None or outcome.result(traced) == Result.SAVED
    here = saved and found is not None and found.first_start is not None
    alone = here or traced.loaded_again or (traced.source is None and traced.restored is not None)
    sides = traced.source, traced.destination
    return completeness.completeness(
        material,
        *sides,
        window,
        traced.sends,
        cost,
        tracing,
        alone=alone,
        loaded_again=traced.loaded_again,
        through_files=saved or traced.restored is not None,
    )


def _stolen(traced: TracedMigration, window: Span | None) -> list[Stolen] | None:
    sides = ((Side.SOURCE, traced.source), (Side.DESTINATION, traced.destination))
    return lost_cpu.stolen(sides, window) if window else None


def _throttled(traced: TracedMigration) -> Throttled | None:
    found = traced.switchover
    return throttle.observe(traced.source, traced.since, found.requested, found.stopper) if found else None


def _management(traced: TracedMigration, attribution: Attribution) -> list[ManagerWait] | None:
    window = attribution.window
    if window is None or (PhaseName.MANAGEMENT in traced.unmeasured and not attribution.managed):
        return None
    return [
        ManagerWait(side=w.side, begin=w.begin - window[0], duration_ns=w.end - w.begin, commands=w.commands)
        for w in attribution.managed
    ]


def _live_update(traced: TracedMigration, parts: list[Phase], origin: int) -> LiveUpdate | None:
    if not traced.live_update:
        return None
    stop = traced.switchover.stop if traced.switchover is not None else None
    return live_update.describe(traced.source, traced.destination, parts, origin, stop)


def _recognised(traced: TracedMigration) -> str:
    """The VMM according to the process name, for processes that were added after tracing began; empty if unknown."""
    sides = [process for process in (traced.source, traced.destination) if process is not None]
    names = (process.threads[process.pid].name for process in sides if process.pid in process.threads)
    return next(filter(None, map(vmm.vmm_named, names)), "")


def _endpoint(traced: TracedMigration, process: Process | None) -> Endpoint | None:
    if process is None:
        return None
    remote = traced.material.header.remote
    if remote is not None and process.pid == remote.pid:
        return Endpoint(host=remote.host, pid=remote.own_pid)
    return Endpoint(host=traced.material.header.host, pid=process.pid)


def _blackout(traced: TracedMigration) -> int | None:
    found = traced.switchover
    return found.first_start - found.stop if found and found.first_start is not None else None


def _blackout_span(traced: TracedMigration, origin: int) -> tuple[int, int] | None:
    found = traced.switchover
    if found is None or found.first_start is None:
        return None
    return found.stop - origin, found.first_start - origin


def _dirty_log(traced: TracedMigration, origin: int, attribution: Attribution) -> DirtyLog:
    parts, work = attribution.phases, attribution.work
    bursts, found = traced.bursts, traced.switchover
    if traced.source is None:
        return DirtyLog(mode=DirtyLogMode.UNKNOWN, slots=[], passes=[], final=None, fetches=[])
    stop = found.stop if found else None
    until = found.first_start if found and found.first_start is not None else FOREVER
    rows = DirtyLogRows(
        traced.source,
        bursts,
        stop,
        traced.sends,
        origin,
        page=traced.material.header.page_size or PAGE,
        since=traced.material.header.begin_ns,
        brownout=notes.vcpus_accounted(traced),
        sends_known=bool(traced.sends) or not traced.material.absent("socket"),
    )
    last = rows.last(until)
    of = {part.phase: part for part in parts}
    logging = dirty_log.switched_on(traced.source, stop) is not None
    final = None
    if work is not None and (last or work.memory):
        final = FinalFetch(
            kernel_ns=of[PhaseName.FETCH_KERNEL].duration_ns,
            user_ns=of[PhaseName.FETCH_USER].duration_ns,
            pages=_pages(rows, last),
            bytes=sum(t.bytes for t in work.memory if stop is not None and t.begin_ns >= stop)
            if rows.sends_known
            else None,
            send_ns=of[PhaseName.MEMORY_SEND].duration_ns,
            user_off_cpu_ns=rows.user_off_cpu(of[PhaseName.FETCH_USER].spans),
            split=fetch_split.split([i for burst in last for i in burst.ioctls], rows.samples),
            rearm=rows.rearm(until),
        )
    return DirtyLog(
        mode=DirtyLogMode.UNKNOWN
        if traced.material.absent("dirty-log") and not bursts
        else dirty_log.mode(bursts, logging, stop),
        slots=dirty_log.slots(traced.source, bursts),
        passes=rows.passes(),
        final=final,
        fetches=rows.final(until),
        logging=rows.logging((stop, until) if stop is not None else None),
    )


def _pages(rows: DirtyLogRows, last: list[Burst]) -> int | None:
    """The number of ring entries that the fetches in the blackout returned; None with a bitmap."""
    wanted = set(map(id, last))
    found = [
        rows.returned(b, rows.bursts[at - 1] if at else None) for at, b in enumerate(rows.bursts) if id(b) in wanted
    ]
    known = [count for count in found if count is not None]
    return sum(known) if known and len(known) == len(found) else None


def _witnesses(
    traced: TracedMigration, attribution: Attribution, wires: list[Wire] | None, pausing: Pausing | None
) -> list[Witness]:
    if traced.switchover is None:
        return []
    pids = (traced.source.pid if traced.source else None, traced.destination.pid if traced.destination else None)
    late_ns = (pausing.kicked_late_ns or 0) if pausing else 0
    found = witnesses.gather(traced.material.marks, vmm.mark_names(), traced.switchover, pids)
    for adapter in vmm.adapters():
        found = adapter.witness.rows(traced, attribution, found, wires, late_ns)
    return found
