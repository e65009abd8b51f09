# SPDX-License-Identifier: Apache-2.0
"""Reads a long recording in little memory: sums stand for what a waiting destination received.

In: a recording's blocks. Out: a `Condensed`: the recording, and the stretches of time that the sums cover.

Before its guest runs, a destination only receives, and each of its calls is an event, as in a blackout. Of a long
pre-copy these are most events, and a report needs only their sums. So the receives of one thread on one socket become
one event per block of the file, and so do the TCP segments of one socket; of those with sequence numbers, the first and
the last one stay. Other events stay as they are, and so do those of a process that does anything with KVM within NEAR
blocks, and all within NEAR blocks of an ioctl that switches dirty logging on (a migration begins) or reads or writes
vCPU state (a switchover). `analysis/condensed.py` checks afterwards that the report cannot depend on what the sums
hide.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter, lt
from typing import Any

from msgspec.structs import force_setattr, replace

from ebpf_mig.linux import kvm
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.budget import Budget
from ebpf_mig.recording.coalesce import NEAR, of_the_switchover, run_of
from ebpf_mig.recording.file import Recording, RecordingReader, too_many

ACTS = frozenset({ev.Ioctl, ev.VcpuEnter, ev.VcpuExit, ev.VcpuState, ev.VcpuSpan, ev.Exec})
"""What a process does with KVM, or to itself. One that waits does none of it."""
_SUMMED = (ev.Transfer, ev.Segment)
_Kinds = dict[type, list[Any]]
"""The events of a block by their type."""
_REPEATED = {ev.Ioctl: ("pid", "tid", "cmd"), ev.Transfer: ("pid", "tid", "socket"), ev.OffCpu: ("pid", "tid")}
"""Fields of frequent events that have few values. A number of its own takes 32 bytes in each event."""
_EVERYBODY = -1
_LEAST = 2
"""A single event need not be summed up."""
_MOST = 1 << 62
"""The largest sum that an event can hold."""

_MOST_AHEAD = 1 << 30
"""Sequence numbers have 32 bits: numbers that are further apart cannot be compared safely."""

_at = attrgetter("at_ns")


@dataclass
class Condensed:
    """A recording whose far events are summed up."""

    recording: Recording
    sums: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """The stretches of the sums, from the first to the last instant of their events, by pid. Empty: all events are
    there."""
    left_out: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    """The same of TCP segments with sequence numbers, by pid and socket. They are in `sums`, too."""


def read_condensed(source: str, near: int = NEAR) -> Condensed:
    """Reads a whole recording. Raises as `read_recording` within a budget."""
    with RecordingReader(source) as reader:
        budget = Budget(reader.name)
        condenser = _Condenser(near, lambda events: budget.spend(events, reader.stored))
        for block in reader.blocks():
            if too_many(reader, condenser.taken + len(block)):
                break
            condenser.take(block)
        events = condenser.finish()
        recording = Recording(
            header=reader.header,
            events=events,
            truncated=reader.truncated,
            reason=reader.reason,
            unknown=reader.unknown,
        )
    return Condensed(recording, dict(condenser.sums), dict(condenser.left_out))


class _Condenser:
    """Takes blocks in order. Decides about each once `near` later ones have arrived."""

    def __init__(self, near: int, spend: Callable[[list[ev.AnyEvent]], None]) -> None:
        self.taken = 0
        """Number of events so far."""
        self.sums: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.left_out: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        self._near, self._spend = near, spend
        self._kept: list[ev.AnyEvent] = []
        self._waiting: deque[tuple[list[ev.AnyEvent], _Kinds]] = deque()
        self._acting: deque[frozenset[int]] = deque(maxlen=2 * near + 1)
        """Who acted, in each block around the oldest waiting one."""
        self._logged: set[tuple[int, int]] = set()
        """The slots, by pid, whose dirty pages are logged."""
        self._received_first: dict[tuple[int, int, int], int] = {}
        """When the first call of each thread on each socket ended. It stays, since reports show when a stream began."""
        self._arrived_first: dict[tuple[int, int, bool], int] = {}
        """When the first segment of each socket arrived, without and with data. It stays, too."""

    def take(self, block: list[ev.AnyEvent]) -> None:
        """Takes the next block."""
        self.taken += len(block)
        kinds = _by_kind(block)
        self._waiting.append((block, kinds))
        self._acting.append(self._acting_in(kinds))
        if len(self._waiting) > self._near:
            oldest, kinds = self._waiting.popleft()
            acting = frozenset().union(*self._acting)
            self._keep(oldest if _EVERYBODY in acting else self._condensed(kinds, acting))

    def finish(self) -> list[ev.AnyEvent]:
        """All events that are left. The last blocks stay as they are."""
        for block, _ in self._waiting:
            self._keep(block)
        _share_numbers(self._kept)
        return self._kept

    def _keep(self, events: list[ev.AnyEvent]) -> None:
        self._spend(events)
        self._kept += events

    def _acting_in(self, kinds: _Kinds) -> frozenset[int]:
        """The pids of those that act in a block; _EVERYBODY if a migration begins there, or a switchover is near."""
        calls: list[ev.Ioctl] = kinds.get(ev.Ioctl, [])
        switchover = any(map(of_the_switchover, {call.cmd for call in calls}))
        everybody = (_EVERYBODY,) if self._switch_on(calls) or switchover else ()
        return frozenset(act.pid for kind in ACTS for act in kinds.get(kind, ())).union(everybody)

    def _switch_on(self, calls: list[ev.Ioctl]) -> bool:
        """Whether one of them switches dirty logging on, which is where a migration begins."""
        found = False
        for call in calls:
            if kvm.is_memslot(call.cmd) and call.size:
                logged = bool(call.flags & kvm.MEM_LOG_DIRTY_PAGES)
                found |= logged and (call.pid, call.slot) not in self._logged
                (self._logged.add if logged else self._logged.discard)((call.pid, call.slot))
        return found

    def _condensed(self, kinds: _Kinds, acting: frozenset[int]) -> list[ev.AnyEvent]:
        found = [event for kind, events in kinds.items() if kind not in _SUMMED for event in events]
        arrived: dict[tuple[int, int, bool], list[ev.Segment]] = defaultdict(list)
        for segment in kinds.get(ev.Segment, ()):
            arrived[segment.pid, segment.socket, segment.payload > 0].append(segment)
        acting |= {key[0] for key in arrived if key[2] and key not in self._arrived_first}
        received: dict[tuple[int, int, int], list[ev.Transfer]] = defaultdict(list)
        for call in kinds.get(ev.Transfer, ()):
            stays = call.direction == ev.SEND or call.hidden or not (call.socket and call.bytes and call.calls)
            if stays or call.pid in acting:
                found.append(call)
            else:
                received[call.pid, call.tid, call.socket].append(call)
        for way, calls in received.items():
            found += self._received(way, calls)
        for key, segments in arrived.items():
            found += self._arrived(key, segments, key[0] in acting)
        return found

    def _received(self, way: tuple[int, int, int], calls: list[ev.Transfer]) -> Iterator[ev.Transfer]:
        """One event for the calls of a thread on a socket."""
        if way not in self._received_first:
            self._received_first[way] = calls[0].end_ns
            yield calls.pop(0)
        if len(calls) < _LEAST or calls[0].begin_ns < max(1, self._received_first[way]) or not _in_order(calls):
            yield from calls
            return
        run = run_of(calls)
        if max(run.calls, run.bytes) > _MOST:
            yield from calls
            return
        yield run
        self.sums[run.pid].append((run.begin_ns, run.end_ns))

    def _arrived(self, key: tuple[int, int, bool], segments: list[ev.Segment], acting: bool) -> Iterator[ev.Segment]:
        """One event for the segments of a socket, at the last one's time. It has the sum of their payload, unless they
        have sequence numbers.
        """
        segments.sort(key=_at)
        if key not in self._arrived_first:
            self._arrived_first[key] = segments[0].at_ns
            yield segments.pop(0)
        numbered = sum(segment.is_numbered for segment in segments) if key[2] else 0
        if acting or 0 < numbered < len(segments):
            yield from segments
            return
        if numbered:
            yield from self._numbered(segments)
            return
        payload, acked = sum([s.payload for s in segments]), sum([s.acked for s in segments])
        if len(segments) < _LEAST or max(payload, acked) > _MOST or segments[0].at_ns < self._arrived_first[key]:
            yield from segments
            return
        yield replace(segments[-1], payload=payload, acked=acked)
        self.sums[segments[0].pid].append((segments[0].at_ns, segments[-1].at_ns))

    def _numbered(self, segments: list[ev.Segment]) -> list[ev.Segment]:
        """The first and the last segment of a socket. Their numbers show what the others brought, if these grew."""
        at, reached = list(map(_at, segments)), [segment.reached for segment in segments]
        steps = [ev.ahead(after, before) for before, after in pairwise(reached)]
        if len(segments) <= _LEAST or min(steps) < 0 or sum(steps) > _MOST_AHEAD or not all(map(lt, at, at[1:])):
            return segments
        self.sums[segments[0].pid].append((at[1], at[-1]))
        self.left_out[segments[0].pid, segments[0].socket].append((at[1], at[-1]))
        return [segments[0], segments[-1]]


def _share_numbers(events: list[ev.AnyEvent]) -> None:
    """Makes equal numbers of the `_REPEATED` fields one object.

    Not while blocks are read: numbers that are made later would lie scattered in the gaps, which takes longer.
    """
    numbers: dict[int, int] = {}
    for event in events:
        for name in _REPEATED.get(type(event), ()):
            number = getattr(event, name)
            force_setattr(event, name, numbers.setdefault(number, number))


def _by_kind(block: list[ev.AnyEvent]) -> _Kinds:
    kinds: _Kinds = defaultdict(list)
    for event in block:
        kinds[type(event)].append(event)
    return kinds


def _in_order(calls: list[ev.Transfer]) -> bool:
    """Whether each call began when the one before had ended."""
    reached = 0
    for call in calls:
        if not reached <= call.begin_ns <= call.end_ns:
            return False
        reached = call.end_ns
    return True
