# SPDX-License-Identifier: Apache-2.0
"""The tables of a `Run`.

In: a breakdown, or an `Analysis` with the events behind it. Out: `Table`s. All instants are ns from the begin of the
window, as in the breakdown. Other units are in the column name. Values that were not measured are null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

import msgspec

from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.result import Analysis
from ebpf_mig.analysis.stacks import observe
from ebpf_mig.breakdown import Breakdown, Side, Stretch
from ebpf_mig.errors import UsageError
from ebpf_mig.library.table import STRINGS, Row, Table, Unsigned
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import AnyEvent, Ioctl, OffCpu
from ebpf_mig.recording.kinds import BY_TYPE, KINDS, Kind

_I64 = (1 << 63) - 1

PHASES = {
    "phase": str,
    "side": str,
    "duration_ns": int,
    "share": float,
    "spans": int,
    "begin": int,
    "end": int,
    "bound_ns": int,
}
VCPUS = {"vcpu": int, "kick_ns": int, "stop": int, "start": int, "blackout_ns": int, "bound_ns": int}
PASSES = {
    "pass": int,
    "begin": int,
    "kernel_ns": int,
    "user_ns": int,
    "user_off_cpu_ns": int,
    "walk_ns": int,
    "flush_ns": int,
    "copy_ns": int,
    "other_ns": int,
    "pages": int,
    "pages_at_most": int,
    "bytes": int,
    "send_ns": int,
    "blocked_ns": int,
    "dirty_pages_per_s": int,
    "outside_share": float,
    "outside_longest_ns": int,
    "baseline_share": float,
}
_TCP = ("busy_us", "rwnd_limited_us", "sndbuf_limited_us", "resolution_us", "retransmits", "bytes_retrans", "rtt_us")
SOCKETS = {
    "role": str,
    "bytes": int,
    "calls": int,
    "in_call_ns": int,
    "copy_ns": int,
    "blocked_ns": int,
    "between_ns": int,
    "local": str,
    "remote": str,
    **dict.fromkeys(_TCP, int),
}
_OPTIONAL = (
    "off_cpu_ns", "slots_lock_ns", "mmu_lock_ns", "other_lock_ns", "spin_ns", "walk_ns", "flush_ns", "copy_ns",
)  # fmt: skip
IOCTLS = {
    "begin": int,
    "end": int,
    "duration_ns": int,
    "side": str,
    "pid": int,
    "tid": int,
    "thread": str,
    "ioctl": str,
    "fd": int,
    "slot": Unsigned,
    "addr": Unsigned,
    "size": Unsigned,
    "flags": Unsigned,
    "ret": int,
    **dict.fromkeys(_OPTIONAL, int),
}
WAITS = {
    "begin": int,
    "end": int,
    "duration_ns": int,
    "side": str,
    "pid": int,
    "tid": int,
    "thread": str,
    "preempted": bool,
    "stack": STRINGS,
}
STACKS = {
    "kind": str,
    "side": str,
    "phase": str,
    "thread": str,
    "duration_ns": int,
    "count": int,
    "stack": STRINGS,
}
EVENTS = {"kind": str, "begin": int, "end": int, "side": str, "pid": int, "tid": int, "fields": str}


def phases(b: Breakdown) -> Table:
    """One row per phase."""
    return Table(
        PHASES,
        lambda: [
            {
                "phase": p.phase.value,
                "side": p.side.value,
                "duration_ns": p.duration_ns,
                "share": p.duration_ns / b.window_ns if p.duration_ns is not None and b.window_ns else None,
                "spans": len(p.spans),
                "begin": p.spans[0][0] if p.spans else None,
                "end": p.spans[-1][1] if p.spans else None,
                "bound_ns": p.bound_ns,
            }
            for p in b.phases
        ],
    )


def vcpus(b: Breakdown) -> Table:
    """One row per vCPU."""
    return Table(VCPUS, lambda: [{name: getattr(v, name) for name in VCPUS} for v in b.vcpus])


def passes(b: Breakdown) -> Table:
    """One row per pre-copy pass."""

    def rows() -> list[Row]:
        found: list[Row] = []
        for number, one in enumerate(b.dirty_log.passes, 1):
            parts = one.split.parts if one.split is not None else {}
            row: Row = {name: getattr(one, name, None) for name in PASSES}
            row |= {"pass": number, **{f"{part}_ns": parts.get(part) for part in ("walk", "flush", "copy", "other")}}
            row |= {"outside_share": _share(one.brownout), "baseline_share": _share(one.baseline)}
            row["outside_longest_ns"] = _longest(one.brownout)
            found.append(row)
        return found

    return Table(PASSES, rows)


def _share(stretch: Stretch | None) -> float | None:
    """The share of time that the vCPUs together were outside KVM_RUN."""
    if stretch is None or not stretch.vcpus or not stretch.duration_ns:
        return None
    return sum(v.outside_ns for v in stretch.vcpus) / stretch.duration_ns / len(stretch.vcpus)


def _longest(stretch: Stretch | None) -> int | None:
    return max((v.longest_gap_ns for v in stretch.vcpus), default=None) if stretch is not None else None


def sockets(b: Breakdown) -> Table:
    """One row per migration socket, side and direction."""

    def rows() -> list[Row]:
        found: list[Row] = []
        for use in b.sockets:
            row: Row = {name: getattr(use, name, None) for name in SOCKETS}
            row |= {name: (use.tcp_info or {}).get(name) for name in _TCP}
            row |= {"local": use.local or None, "remote": use.remote or None}
            found.append(row)
        return found

    return Table(SOCKETS, rows)


def ioctls(analysis: Analysis) -> Table:
    """One row per KVM ioctl, in order of time."""

    def row(side: Side, process: Process, call: Ioctl) -> Row:
        optional = ((name, getattr(call, name)) for name in _OPTIONAL)
        return {
            **_times(call.begin_ns, call.end_ns, analysis.origin_ns),
            **_thread(side, process, call.tid),
            "ioctl": kvm.name_of(call.cmd),
            **{name: getattr(call, name) for name in ("fd", "slot", "addr", "size", "flags", "ret")},
            **{name: value if value >= 0 else None for name, value in optional},
        }

    return Table(IOCTLS, lambda: _in_order([row(s, p, i) for s, p in _processes(analysis) for i in p.ioctls]))


def waits(analysis: Analysis) -> Table:
    """One row per recorded wait off the CPU, in order of time."""

    def row(side: Side, process: Process, wait: OffCpu) -> Row:
        return {
            **_times(wait.begin_ns, wait.end_ns, analysis.origin_ns),
            **_thread(side, process, wait.tid),
            "preempted": wait.preempted,
            "stack": list(wait.stack),
        }

    return Table(WAITS, lambda: _in_order([row(s, p, w) for s, p in _processes(analysis) for w in p.off_cpu]))


def stacks(analysis: Analysis) -> Table:
    """One row per kernel stack in the window, by kind, side, phase and thread; the sums are the recording's."""
    return Table(
        STACKS,
        lambda: [
            {
                "kind": row.kind.value,
                "side": row.side.value,
                "phase": row.phase,
                "thread": row.thread,
                "duration_ns": row.duration_ns,
                "count": row.count,
                "stack": list(row.frames),
            }
            for row in observe(analysis)
        ],
    )


def _processes(analysis: Analysis) -> list[tuple[Side, Process]]:
    traced = analysis.traced
    return [(traced.side_of(process), process) for process in traced.material.processes.values()]


def _sides(analysis: Analysis) -> list[tuple[Process, Side]]:
    known = ((analysis.traced.source, Side.SOURCE), (analysis.traced.destination, Side.DESTINATION))
    return [(process, side) for process, side in known if process is not None]


def _side_at(sides: Sequence[tuple[Process, Side]], pid: int, at_ns: int) -> Side:
    """The side of a process; after an execve(2) it can be the other one."""
    of_pid = [(process.born.at_ns if process.born else 0, side) for process, side in sides if process.pid == pid]
    return max(((since, side) for since, side in of_pid if since <= at_ns), default=(0, Side.UNKNOWN))[1]


def _times(begin: int, end: int, origin: int) -> Row:
    return {
        "begin": begin - origin if begin else None,
        "end": end - origin if end else None,
        "duration_ns": end - begin if begin and end else None,
    }


def _thread(side: Side, process: Process, tid: int) -> Row:
    thread = process.threads.get(tid)
    return {"side": side.value, "pid": process.pid, "tid": tid, "thread": thread.name if thread else None}


def _in_order(rows: list[Row]) -> list[Row]:
    """Sorted by begin; rows whose begin was not seen come first."""
    return sorted(rows, key=lambda row: (row["begin"] is not None, row["begin"]))


class Events(Table):
    """All events: time, process and the fields as JSON. `of` has the fields of one kind as columns."""

    def __init__(self, analysis: Analysis, events: Sequence[AnyEvent]) -> None:
        super().__init__(EVENTS, self._all)
        self._origin = analysis.origin_ns
        self._sides = _sides(analysis)
        self._events = events

    def kinds(self) -> dict[str, int]:
        """Number of events of each kind, by its name in docs/recording.md."""
        found: dict[str, int] = {}
        for event in self._events:
            name = type(event).__name__
            found[name] = found.get(name, 0) + 1
        return dict(sorted(found.items()))

    def of(self, kind: str) -> Table:
        """The events of one kind, for example `Transfer`, in order of time, with one column per field. UsageError for
        an unknown kind.
        """
        known = next((one for one in KINDS if one.event.__name__ == kind), None)
        if known is None:
            names = ", ".join(sorted(one.event.__name__ for one in KINDS))
            raise UsageError(f"there is no event {kind!r}", f"choose one of {names}")
        columns = {name: _column(known, name) for name in known.event.__struct_fields__}
        first = next(iter(known.instants), None)

        def rows() -> list[Row]:
            found = [self._fields(known, event) for event in self._events if type(event) is known.event]
            return sorted(found, key=lambda row: (row[first] is not None, row[first])) if first else found

        return Table(columns, rows)

    def _all(self) -> list[Row]:
        rows: list[Row] = []
        for event in self._events:
            fields = self._fields(BY_TYPE[type(event)], event)
            instants = [fields.pop(name) for name in BY_TYPE[type(event)].instants]
            pid = fields.pop("pid", None)
            begun = next((at for name in BY_TYPE[type(event)].instants if (at := getattr(event, name))), 0)
            side = _side_at(self._sides, pid, begun).value if isinstance(pid, int) else None
            own: Row = {"kind": type(event).__name__, "side": side, "pid": pid, "tid": fields.pop("tid", None)}
            rows.append(
                own
                | {
                    "begin": instants[0] if instants else None,
                    "end": instants[1] if len(instants) > 1 else None,
                    "fields": msgspec.json.encode(fields).decode(),
                }
            )
        return _in_order(rows)

    def _fields(self, kind: Kind, event: AnyEvent) -> Row:
        """The fields of an event: instants relative to the begin of the window, null for unknown values."""
        row: Row = {}
        for name in kind.event.__struct_fields__:
            value: Any = getattr(event, name)
            if name in kind.instants:
                value = value - self._origin if value else None
            elif name in kind.ranges and kind.ranges[name].least == -1 and value == -1:
                value = None
            elif isinstance(value, tuple):
                value = [str(item) for item in value]  # such a column holds text
            elif isinstance(value, dict):
                value = msgspec.json.encode(value, order="sorted").decode()
            row[name] = value
        return row


def _column(kind: Kind, name: str) -> Any:
    """The column type of a field."""
    hint = next(field.type for field in msgspec.structs.fields(kind.event) if field.name == name)
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if plain is int:
        return Unsigned if kind.ranges[name].most > _I64 else int
    if plain is bool:
        return bool
    return STRINGS if get_origin(plain) is tuple else str
