# SPDX-License-Identifier: Apache-2.0
"""Splits the events of a recording by process, repaired and in time order.

In: a recording, its events in any order. Out: a `Material`: one `Process` for each traced pid, the marks, the ending.

Events come from a file and can contain anything. A call without a begin, or with a begin after its end, becomes a call
of length 0, so that later steps never see a negative duration. Events are sorted by all their fields, so that the
result does not depend on the order of the input.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter, eq
from typing import Any, TypeVar

import msgspec

from ebpf_mig.analysis import incarnations
from ebpf_mig.analysis.process import Process
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.file import Recording
from ebpf_mig.recording.kinds import KINDS


@dataclass(frozen=True)
class Material:
    """A recording split by process."""

    header: ev.Header
    processes: dict[int, Process]
    """By pid. One that called execve(2) and then has another VM is two: the later one has a key that is no pid."""
    marks: list[ev.Mark]
    ending: ev.Ending | None
    costs: list[ev.OwnCost]
    truncated: bool
    """The recording was cut off."""
    unknown: int
    """The number of events that this version cannot read."""
    hops: dict[int, Process] = field(default_factory=dict)
    """The processes that pass the migration's bytes on, by pid. They are not in `processes`."""
    hop_names: dict[int, str] = field(default_factory=dict)
    """Their names."""
    own_runs: list[ev.OwnRuns] = field(default_factory=list)
    own_rates: list[ev.OwnRates] = field(default_factory=list)
    own_turns: list[ev.OwnTurn] = field(default_factory=list)
    """Each in order of its instants."""

    def absent(self, signal: str) -> bool:
        """Whether the recording reports that the signal could not be traced."""
        return self.header.attach.get(signal, "").startswith("absent")

    def ended_ns(self, pid: int) -> int | None:
        """When a process was first seen to have ended, while others were traced; None if it was not."""
        return next((mark.at_ns for mark in self.marks if mark.name == ev.ENDED and mark.pid == pid), None)

    def ended_together(self, one: Process | None, other: Process | None) -> bool:
        """Whether both ended between two looks of a busy tracer: a manager may have ended them after a success."""
        if one is None or other is None:
            return False
        ended = self.ended_ns(one.pid)
        return ended is not None and ended == self.ended_ns(other.pid)

    def traced(self, signal: str) -> bool:
        """Whether the signal was traced. False if the recording does not mention it."""
        return not self.header.attach.get(signal, "absent").startswith("absent")


_key = msgspec.structs.astuple
_NO_PID = 1 << 34
"""Added to a pid to make a key. No kernel assigns such a number, and joining makes none (`joining.merge`)."""


def split(recording: Recording) -> Material:
    """Splits a recording by process. Linear except for the sorting."""
    by_kind: dict[type, list[Any]] = defaultdict(list)
    for event in recording.events:
        by_kind[type(event)].append(event)
    streams: dict[int, dict[str, list[Any]]] = defaultdict(dict)
    for kind in KINDS:
        if not kind.stream:
            continue
        by_pid: dict[int, list[Any]] = defaultdict(list)
        for event in by_kind.pop(kind.event, ()):
            by_pid[event.pid].append(event)
        for pid, found in by_pid.items():
            streams[pid][kind.stream] = _in_order(kind.event, _repaired(kind.event, found))
    targets = {target.pid: target for target in reversed(recording.header.targets)}
    pids = sorted(targets.keys() | streams.keys())
    processes = {
        pid + number * _NO_PID: Process(pid, targets.get(pid), **found, born=born)
        for pid in pids
        for number, (found, born) in enumerate(incarnations.split(streams.get(pid, {})))
    }
    marks: list[ev.Mark] = by_kind[ev.Mark]
    endings: list[ev.Ending] = by_kind[ev.Ending]
    costs: list[ev.OwnCost] = by_kind[ev.OwnCost]
    marks.sort(key=_key)
    costs.sort(key=_key)
    names = {mark.pid: mark.detail for mark in marks if mark.name == ev.HOP and mark.pid not in targets}
    hops = {pid: processes.pop(pid) for pid in names if pid in processes}
    truncated, unknown = recording.truncated, recording.unknown
    return Material(
        recording.header, processes, marks, _last(endings), costs, truncated, unknown, hops, names,
        sorted(by_kind[ev.OwnRuns], key=lambda runs: (runs.at_ns, _key(runs))),
        sorted(by_kind[ev.OwnRates], key=_key),
        sorted(by_kind[ev.OwnTurn], key=_key),
    )  # fmt: skip


def _tcp_key(event: ev.TcpInfo) -> tuple[int, int, list[tuple[str, int]]]:
    return event.at_ns, event.socket, sorted(event.values.items())


_Event = TypeVar("_Event", bound=ev.Event)


def _in_order(kind: type, events: list[_Event]) -> list[_Event]:
    """Sorted by all fields: first by the first field, then equal ones by the rest.

    Sorting by a tuple of all fields at once would take as much memory again as the events.
    """
    all_fields: Callable[[Any], Any] = _tcp_key if kind is ev.TcpInfo else _key
    first = attrgetter(kind.__struct_fields__[0])  # type: ignore[attr-defined]
    events.sort(key=first)
    keys = list(map(first, events))
    done = 0
    for at in itertools.compress(itertools.count(), map(eq, keys, itertools.islice(keys, 1, None))):
        if at >= done:
            done = bisect_right(keys, keys[at])
            events[at:done] = sorted(events[at:done], key=all_fields)
    return events


def _repaired(kind: type, events: list[Any]) -> list[Any]:
    """A call with a missing or invalid begin gets its end as its begin. Negative sizes and times become 0."""
    if kind in (ev.Ioctl, ev.Call):
        return [i if 0 < i.begin_ns <= i.end_ns else msgspec.structs.replace(i, begin_ns=i.end_ns) for i in events]
    if kind is ev.Transfer:
        return [
            t if 0 < t.begin_ns <= t.end_ns and t.in_call_ns >= 0 and t.bytes >= 0 else _repaired_transfer(t)
            for t in events
        ]
    return events


def _repaired_transfer(event: ev.Transfer) -> ev.Transfer:
    length = event.end_ns - event.begin_ns
    return msgspec.structs.replace(
        event,
        begin_ns=event.begin_ns if event.begin_ns > 0 and length >= 0 else event.end_ns,
        in_call_ns=max(0, event.in_call_ns),
        bytes=max(0, event.bytes),
    )


def _last(endings: list[ev.Ending]) -> ev.Ending | None:
    def order(ending: ev.Ending) -> tuple[int, str, bytes]:
        return ending.at_ns, ending.reason, msgspec.json.encode(ending, order="deterministic")

    return max(endings, key=order, default=None)
