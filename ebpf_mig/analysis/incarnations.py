# SPDX-License-Identifier: Apache-2.0
"""One process before and after its execve(2): the same pid, but other threads and another VM.

In: the events of one process by stream, its `Exec` events. Out: the streams of each program, in order. A program that
did nothing with KVM, such as a shell that starts the VMM, is no program of its own.

An event belongs to the program in which its earliest instant lies. Events without one, and accounts that were read
later, belong to the program in which their thread was seen.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ebpf_mig.recording import events as ev
from ebpf_mig.recording.kinds import KINDS, Kind

Streams = Mapping[str, list[Any]]
_READ_LATER: dict[type, tuple[str, ...]] = {ev.VcpuState: ("enter_ns", "exit_ns"), ev.PageFaults: ()}
"""The instants that say when it happened, for events with another that says when it was read."""


class Incarnation(NamedTuple):
    """What one program did."""

    streams: dict[str, list[Any]]
    born: ev.Exec | None
    """The execve(2) that began it; None: it ran before."""


def split(streams: Streams) -> list[Incarnation]:
    """The programs of a process that used KVM, in order; all in one if fewer than two did."""
    execs: list[ev.Exec] = streams.get("execs", [])
    whole = [Incarnation(dict(streams), None)]
    if not execs:
        return whole
    begins = [found.at_ns for found in execs]
    parts: list[dict[str, list[Any]]] = [defaultdict(list) for _ in range(len(execs) + 1)]
    homes: dict[int, set[int]] = defaultdict(set)
    late: list[tuple[str, Any]] = []
    for kind in KINDS:
        for event in streams.get(kind.stream, ()) if kind.stream else ():
            at = event.at_ns if isinstance(event, ev.Exec) else _earliest(kind, event)
            if at is None:
                late.append((kind.stream, event))
                continue
            place = bisect_right(begins, at)
            parts[place][kind.stream].append(event)
            if tid := getattr(event, "tid", 0):
                homes[tid].add(place)
    for stream, event in late:
        for place in sorted(homes.get(getattr(event, "tid", 0), {0})):
            parts[place][stream].append(event)
    return _joined(parts, execs) or whole


def _earliest(kind: Kind, event: Any) -> int | None:
    """When it began; None if that is not known, or was read later than it happened."""
    names = _READ_LATER.get(type(event), kind.instants)
    return min((at for name in names if (at := getattr(event, name))), default=None)


def _joined(parts: Iterable[dict[str, list[Any]]], execs: list[ev.Exec]) -> list[Incarnation]:
    """Programs without KVM are added to the next one; at the end, to the last."""
    found: list[Incarnation] = []
    kept: dict[str, list[Any]] = {}
    for part, born in zip(parts, [None, *execs], strict=True):
        _add(kept, part)
        if part.get("ioctls") or part.get("enters") or part.get("exits"):
            found.append(Incarnation(kept, born if found or (born and born.had_vm) else None))
            kept = {}
    if found:
        _add(found[-1].streams, kept)
    return found


def _add(streams: dict[str, list[Any]], more: Streams) -> None:
    for name, events in more.items():
        streams.setdefault(name, []).extend(events)
