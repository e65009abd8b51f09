# SPDX-License-Identifier: Apache-2.0
"""What is known of one migration while it is being worked out.

In: a recording taken apart. Out: a `Case` with its sides, sockets, fetches and switchover found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from ebpf_mig.analysis import dirty_log, sockets
from ebpf_mig.analysis import switchover as switchovers
from ebpf_mig.analysis.dirty_log import Burst
from ebpf_mig.analysis.process import RECEIVE, SEND, Material, Process, begun, key_of
from ebpf_mig.analysis.sockets import Channels
from ebpf_mig.analysis.switchover import Switchover
from ebpf_mig.recording.events import Transfer

AFTER_START_BYTES = 65536
"""A source that sends more than this after the destination's start is still sending memory: postcopy."""


@dataclass
class Case:
    """One migration, as the steps below come to know it."""

    material: Material
    source: Process | None
    destination: Process | None
    notes: list[str]
    since: int = 0
    """Dirty logging switched on, or the trigger; the recording's begin if neither was seen."""
    began: int | None = None
    """The same, None if neither was seen."""
    channels: Channels = field(default_factory=Channels)
    switchover: Switchover | None = None
    bursts: list[Burst] | None = None
    _by_channel: dict[tuple[int, frozenset[int]], list[Transfer]] = field(default_factory=dict)
    _sends: tuple[tuple[int, Channels], list[Transfer]] | None = None

    def transfers(self, process: Process | None) -> list[Transfer]:
        """A side's transfers on the migration's sockets, both directions."""
        if process is None:
            return []
        keys = self.channels.source if process is self.source else self.channels.destination
        known = self._by_channel.get((process.pid, keys))
        if known is None:
            known = [t for t in process.transfers if (t.socket or key_of(t)) in keys]
            self._by_channel[process.pid, keys] = known
        return known

    @cached_property
    def receives(self) -> list[Transfer]:
        """What the destination received for the migration; asked for once its sockets are known."""
        return [t for t in self.transfers(self.destination) if t.direction == RECEIVE]

    @property
    def sends(self) -> list[Transfer]:
        """What the source sent for the migration, since it began; as `transfers`, not to be changed."""
        known = self._sends
        if known is None or known[0] != (self.since, self.channels):
            found = [t for t in self.transfers(self.source) if t.direction == SEND and t.begin_ns >= self.since]
            known = self._sends = (self.since, self.channels), found
        return known[1]


def locate(case: Case) -> None:
    """Finds the switchover, when the migration began, its sockets, its fetches."""
    source = case.source
    marks = case.material.marks
    triggers = [m.at_ns for m in marks if m.name == "session.trigger"]
    fetchers = dirty_log.fetchers(source) if source else frozenset()
    stop_marks = [m.at_ns for m in marks if m.name == "qmp.STOP" and source and m.pid == source.pid]
    case.since = case.material.header.begin_ns
    case.channels = sockets.choose(source, case.destination, 0, fetchers)
    if source is None:
        return
    found = switchovers.find(source, case.destination, case.sends, stop_marks)
    stop = found.stop if found else None
    on = dirty_log.switched_on(source, stop)
    triggered = max((at for at in triggers if stop is None or at < stop), default=None)
    case.began = on if on is not None else triggered
    if case.began is not None:
        case.since = case.began
        case.channels = sockets.choose(source, case.destination, case.since, fetchers)
    case.switchover = found
    case.bursts = dirty_log.bursts(source, case.since if case.began is not None else 0, stop, case.sends)


def postcopy(case: Case) -> bool:
    """Did the source go on sending memory after the destination's start?"""
    start = case.switchover.last_start if case.switchover and case.switchover.kind == "completed" else None
    said = any(mark.name == "qmp.MIGRATION.postcopy-active" for mark in case.material.marks)
    late = sum(t.bytes for t in begun(case.sends, start + 1)) if start is not None else 0
    return said or late > AFTER_START_BYTES
