# SPDX-License-Identifier: Apache-2.0
"""The activity of each thread, vCPU, socket and memslot over time: the data of every report with a time axis.

In: an `Analysis`. Out: a `View` of lanes. Times are CLOCK_MONOTONIC ns as recorded; `origin_ns` is instant 0 of the
breakdown. Trace viewers cannot show overlapping slices, so slices of one lane never overlap, whatever the recording
contains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ebpf_mig.analysis import dirty_log, lost_cpu
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.analysis.process import Process, key_of
from ebpf_mig.analysis.result import Analysis
from ebpf_mig.analysis.spans import FOREVER
from ebpf_mig.analysis.vcpu import Timeline
from ebpf_mig.breakdown import Side, SwitchoverKind
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import RECEIVE, SEND, Ioctl, OffCpu, Transfer

Args = dict[str, int | str]
Thread = tuple[Side, int, int]
"""Side, pid, tid: the thread that calls execve(2) in a live update is on both sides."""
IN_FLIGHT = "bytes in flight, at most"
"""Counted from the begin of a send to the end of the receive: what is still in a send buffer is in it, too."""


@dataclass(slots=True)
class Slice:
    """An activity with a begin and an end. `starts` and `ends` are the ids of flows that leave it and arrive at it."""

    begin_ns: int
    end_ns: int
    name: str
    args: Args = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Lane:
    """One row of a timeline."""

    side: Side
    pid: int
    tid: int
    """0 if the lane does not belong to a thread."""
    kind: str
    """vcpu, ioctl, socket, wait, slot, segment or mark. Slices of the last two have no length."""
    name: str
    slices: list[Slice] = field(default_factory=list)
    what: str = ""
    """The name below the thread's own name; the whole name if there is no thread."""

    def __post_init__(self) -> None:
        self.what = self.what or self.name


@dataclass(slots=True)
class Counter:
    """A value that grows or changes: (ns, value) in order."""

    side: Side
    pid: int
    name: str
    points: list[tuple[int, int]]


@dataclass(slots=True)
class View:
    """A recording as lanes, by side. The source's lanes come first."""

    origin_ns: int
    begin_ns: int
    end_ns: int
    lanes: list[Lane]
    counters: list[Counter]
    flows: int
    """The number of flows; their ids begin at 1."""
    threads: dict[Thread, str] = field(default_factory=dict)
    """Names of threads."""


def view(analysis: Analysis) -> View:
    """The lanes of a recording. Deterministic: the same events give the same lanes in the same order."""
    traced = analysis.traced
    material = traced.material
    known = [(traced.source, Side.SOURCE), (traced.destination, Side.DESTINATION)]
    others = [(p, Side.UNKNOWN) for p in material.processes.values() if p not in (traced.source, traced.destination)]
    parties = [(process, side) for process, side in [*known, *others] if process is not None]
    instants = [at for process, _ in parties for at in _instants(process)] + [m.at_ns for m in material.marks]
    instants = [at for at in instants if at > 0] or [material.header.begin_ns]
    begin, end = min(instants), max(instants)
    found = View(analysis.origin_ns, begin, end, [], [], 0)
    for process, side in parties:
        found.threads |= {(side, process.pid, tid): thread.name for tid, thread in process.threads.items()}
        found.lanes += _vcpu_lanes(process, side, begin, end)
        found.lanes += _thread_lanes(process, side)
        found.lanes += _slot_lanes(process, side)
        found.lanes += _segment_lanes(process, side)
        marks = [
            Slice(m.at_ns, m.at_ns, m.name, _mark_args(m.detail, m.value))
            for m in material.marks
            if m.pid == process.pid
        ]
        if marks:
            found.lanes.append(Lane(side, process.pid, 0, "mark", "reported by the VMM", marks))
        found.counters += _counters(traced, process, side)
    _tie(found, traced)
    return found


def _instants(process: Process) -> Iterable[int]:
    calls: Sequence[Ioctl | Transfer | OffCpu]
    for calls in (process.ioctls, process.transfers, process.off_cpu):
        for call in calls:
            yield call.begin_ns
            yield call.end_ns
    for line in process.vcpus.values():
        for gap in line.gaps:
            yield from (at for at in (gap.begin, gap.end) if at is not None)


def _mark_args(detail: str, value: int) -> Args:
    return ({"detail": detail} if detail else {}) | ({"value": value} if value else {})


def _vcpu_lanes(process: Process, side: Side, begin: int, end: int) -> Iterable[Lane]:
    for index, line in process.vcpus.items():
        runs = [Slice(b, e, "runs the guest") for b, e in running(line, begin, end)]
        yield Lane(side, process.pid, line.tid, "vcpu", f"vCPU {index}", apart(runs))


def running(line: Timeline, begin: int, end: int) -> Iterable[tuple[int, int]]:
    """The stretches between `begin` and `end` in which the vCPU ran guest code, as far as they were recorded."""
    since: int | None = begin
    for gap in line.gaps:
        if gap.begin is not None and since is not None and gap.begin > since:
            yield since, gap.begin
        since = gap.end
    if since is not None and end > since:
        yield since, end


def _thread_lanes(process: Process, side: Side) -> Iterable[Lane]:
    lanes: dict[tuple[int, int, str], Lane] = {}

    def lane(tid: int, order: int, kind: str, what: str) -> list[Slice]:
        thread = process.threads.get(tid)
        name = f"{thread.name if thread else 'thread'} {tid}" if tid else "queued"
        made = lanes.setdefault((tid, order, what), Lane(side, process.pid, tid, kind, f"{name} {what}", what=what))
        return made.slices

    for call in process.ioctls:
        lane(call.tid, 0, "ioctl", "ioctls").append(
            Slice(call.begin_ns, call.end_ns, kvm.name_of(call.cmd), _ioctl_args(call))
        )
    for transfer in process.transfers:
        word = "receives" if transfer.direction == RECEIVE else "sends"
        what = f"{word} on fd {transfer.fd}" if transfer.tid else word
        lane(transfer.tid, 1, "socket", what).append(
            Slice(transfer.begin_ns, transfer.end_ns, word.removesuffix("s"), _transfer_args(transfer))
        )
    for wait in process.off_cpu:
        if wait.begin_ns > 0:
            lane(wait.tid, 2, "wait", "off the CPU").extend(_off_cpu_slices(process, wait))
    for key in sorted(lanes):
        lanes[key].slices = apart(lanes[key].slices)
        yield lanes[key]


def _off_cpu_slices(process: Process, wait: OffCpu) -> Iterable[Slice]:
    """The sleep, and the time after it, or after a preemption, in which the thread could run and had no CPU."""
    for begin, end, stack in lost_cpu.parts(process, wait):
        if stack is wait.stack:
            args: Args = {"in": _deepest(stack), "stack": " < ".join(stack)} if stack else {}
            yield Slice(begin, end, "sleep", args)
        else:
            yield Slice(begin, end, "runnable, not running", {"why": stack[0].strip("()")})


def _deepest(stack: Sequence[str]) -> str:
    return next((frame for frame in stack if "schedule" not in frame), stack[0] if stack else "")


def _ioctl_args(call: Ioctl) -> Args:
    args: Args = {"fd": call.fd, "return": call.ret}
    if dirty_log.is_dirty_log(call) or call.size:
        args["slot"] = call.slot
    match kvm.name_of(call.cmd):
        case "CLEAR_DIRTY_LOG":
            args |= {"first_page": call.addr, "pages": call.size}
        case "SET_USER_MEMORY_REGION" | "SET_USER_MEMORY_REGION2":
            args |= {"flags": call.flags, "guest_address": call.addr, "bytes": call.size}
    optional = (
        ("off_cpu_ns", call.off_cpu_ns),
        ("slots_lock_ns", call.slots_lock_ns),
        ("mmu_lock_ns", call.mmu_lock_ns),
    )
    return args | {name: value for name, value in optional if value > 0}


def _transfer_args(transfer: Transfer) -> Args:
    args: Args = {"bytes": transfer.bytes, "calls": transfer.calls, "in_call_ns": transfer.in_call_ns}
    return args | ({"failed": transfer.failed} if transfer.failed else {})


def _slot_lanes(process: Process, side: Side) -> Iterable[Lane]:
    lanes: dict[int, Lane] = {}
    for call in process.ioctls:
        if dirty_log.is_dirty_log(call):
            made = lanes.setdefault(call.slot, Lane(side, process.pid, 0, "slot", f"memslot {_slot(call.slot)}"))
            args = _ioctl_args(call)
            args["tid"] = call.tid
            made.slices.append(Slice(call.begin_ns, call.end_ns, kvm.name_of(call.cmd), args))
    for key in sorted(lanes):
        lanes[key].slices = apart(lanes[key].slices)
        yield lanes[key]


def _segment_lanes(process: Process, side: Side) -> Iterable[Lane]:
    """TCP segments as they arrived, one lane for each socket."""
    lanes: dict[int, Lane] = {}
    for one in process.segments:
        made = lanes.setdefault(one.socket, Lane(side, process.pid, 0, "segment", f"segments on socket {one.socket}"))
        name = "data arrives" if one.payload else "acknowledgement arrives"
        args: Args = {
            "bytes": one.payload,
            "acked": one.acked,
            "in_flight": one.in_flight,
            "unsent": one.unsent,
            "window": one.window,
        }
        made.slices.append(Slice(one.at_ns, one.at_ns, name, args))
    for key in sorted(lanes):
        yield lanes[key]


def _slot(slot: int) -> str:
    space = slot >> 16
    return f"{slot & 0xFFFF}" + (f" of space {space}" if space else "")


def apart(slices: Iterable[Slice]) -> list[Slice]:
    """The slices in order of time and without overlap: each begins no earlier than the previous one ended."""
    ordered = sorted(slices, key=lambda s: (s.begin_ns, s.end_ns, s.name))
    last = 0
    for one in ordered:
        one.begin_ns = max(one.begin_ns, last)
        one.end_ns = last = max(one.end_ns, one.begin_ns)
    return ordered


def _counters(traced: TracedMigration, process: Process, side: Side) -> Iterable[Counter]:
    """Bytes of the migration that a side has sent or received so far, over all its connections; on the source also
    those that are on their way. What was written to a file is not: the destination may map it.
    """
    wanted = SEND if side == Side.SOURCE else RECEIVE
    moved = sorted((t.end_ns, t.bytes) for t in traced.transfers(process) if t.direction == wanted)
    if moved:
        yield Counter(side, process.pid, f"migration bytes {'sent' if wanted == SEND else 'received'}", _summed(moved))
    taken = [t for t in traced.transfers(traced.destination) if t.direction == RECEIVE]
    if moved and taken and side == Side.SOURCE and traced.snapshot is None:
        given = [(t.begin_ns, t.bytes) for t in traced.transfers(process) if t.direction == SEND]
        between = _summed(sorted([*given, *((t.end_ns, -t.bytes) for t in taken)]))
        # What left before tracing began can arrive later; fewer than none are not on their way.
        yield Counter(side, process.pid, IN_FLIGHT, [(at, max(value, 0)) for at, value in between])


def _summed(changes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    total = 0
    points: list[tuple[int, int]] = []
    for at, change in changes:
        total += change
        points.append((at, total))
    return points


def _tie(found: View, traced: TracedMigration) -> None:
    """Adds flows: from each vCPU's stop to its start, and from sends in the blackout to the receives of their last
    byte; with several connections, or bytes that were not seen, only from the last send.
    """
    switch = traced.switchover
    if switch is None or switch.kind != SwitchoverKind.COMPLETED:
        return
    lanes = {(lane.side, lane.name): lane for lane in found.lanes if lane.kind == "vcpu"}
    for index, stop in switch.stops.items():
        start = switch.starts.get(index)
        old, new = lanes.get((Side.SOURCE, f"vCPU {index}")), lanes.get((Side.DESTINATION, f"vCPU {index}"))
        if old is None or new is None or start is None:
            continue
        before = next((s for s in old.slices if s.end_ns == stop), None)
        after = next((s for s in new.slices if s.begin_ns == start), None)
        _flow(found, before, after)
    limit = switch.first_start if switch.first_start is not None else FOREVER
    sent, taken = (list(_moves(found, traced, *way)) for way in ((Side.SOURCE, SEND), (Side.DESTINATION, RECEIVE)))
    single = len(traced.channels.source) == len(traced.channels.destination) == 1
    if single and _bytes(sent) == _bytes(taken) > 0:
        stop = max(switch.stops.values(), default=0)
        for before, after in _by_position(sent, taken):
            if stop <= before.end_ns <= limit:
                _flow(found, before, after)
        return
    last = max((s for s in sent if s.end_ns <= limit), key=lambda s: s.end_ns, default=None)
    if last is not None:
        _flow(found, last, min((s for s in taken if s.end_ns >= last.begin_ns), key=lambda s: s.end_ns, default=None))


def _bytes(moves: Iterable[Slice]) -> int:
    return sum(int(one.args["bytes"]) for one in moves)


def _by_position(sent: list[Slice], taken: list[Slice]) -> Iterable[tuple[Slice, Slice]]:
    """Each send, and the receive in which its last byte arrived: both sides count the same stream."""
    takers = iter(sorted(taken, key=lambda s: s.end_ns))
    after, arrived, position = None, 0, 0
    for before in sorted(sent, key=lambda s: s.end_ns):
        position += int(before.args["bytes"])
        while arrived < position and (after := next(takers, None)) is not None:
            arrived += int(after.args["bytes"])
        if after is not None and before.args["bytes"]:
            yield before, after


def _moves(found: View, traced: TracedMigration, side: Side, direction: int) -> Iterable[Slice]:
    """The slices of a side's transfers on the migration's sockets."""
    process = traced.source if side == Side.SOURCE else traced.destination
    keys = traced.channels.source if side == Side.SOURCE else traced.channels.destination
    fds = {(t.tid, t.fd) for t in (process.transfers if process else ()) if key_of(t) in keys}
    word = "sends" if direction == SEND else "receives"
    for lane in found.lanes:
        if lane.side == side and lane.kind == "socket":
            for tid, fd in fds:
                if lane.tid == tid and lane.name.endswith(f" {word} on fd {fd}"):
                    yield from lane.slices


def _flow(found: View, before: Slice | None, after: Slice | None) -> None:
    if before is not None and after is not None:
        found.flows += 1
        before.starts.append(found.flows)
        after.ends.append(found.flows)
