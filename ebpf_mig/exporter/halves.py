# SPDX-License-Identifier: Apache-2.0
"""Finds the other half of a migration on this node whose two sides share no connection.

In: a track that is one side, and all open tracks. Out: the other side's track, or None. A forwarder between the sides
(a proxy, ssh, socat) has connections of its own, so no socket of one side is the other end of a socket of the other.
The streams show it: see `analysis/flow.py`. Several migrations at the same time can look alike. They are paired only if
a single way to pair them leaves nobody alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ebpf_mig.analysis import flow
from ebpf_mig.exporter.track import Track
from ebpf_mig.recording.events import RECEIVE, SEND, Transfer


def other_half(
    track: Track, tracks: Iterable[Track], pending: Callable[[int], Sequence[Transfer]] = lambda _pid: ()
) -> Track | None:
    """The track of the other side. If more than one way to pair is left, all that could be paired stay alone for good:
    once some of them are over, the rest would look unambiguous. `pending`: the transfers of a process that the kernel
    half still holds; without the last of them, the end of a stream is not known."""
    if not is_half(track):
        return None
    halves = _Halves([other for other in tracks if is_half(other)], pending)
    group = halves.around(track)
    if len(group) == 1:
        return None
    paired = _paired({pid: set(halves.choices(pid)) for pid in group})
    if len(paired) == len(group):
        return halves.by_pid[paired[track.pids[0]]]
    for pid in group:
        halves.by_pid[pid].doubtful = True
    return None


def is_half(track: Track) -> bool:
    """Whether it may be one side of a migration whose other side is another track. A source may have just booted, so
    its vCPUs' state was set, too."""
    return len(track.pids) == 1 and not track.doubtful and bool(track.logging or track.fresh & track.restored)


def _paired(choices: Mapping[int, set[int]]) -> dict[int, int]:
    """Whoever has a single choice left takes it. Where only one way to pair all exists, this finds it."""
    left = {pid: set(others) for pid, others in choices.items()}
    paired: dict[int, int] = {}
    while (one := next((pid for pid, others in left.items() if len(others) == 1), None)) is not None:
        (other,) = left[one]
        paired |= {one: other, other: one}
        del left[one], left[other]
        for others in left.values():
            others -= {one, other}
    return paired


class _Halves:
    """Which halves fit which."""

    def __init__(self, halves: Sequence[Track], pending: Callable[[int], Sequence[Transfer]]) -> None:
        self.by_pid = {half.pids[0]: half for half in halves}
        self._pending = pending
        self._flows: dict[int, list[flow.Flow]] = {}
        self._fitting: dict[int, list[int]] = {}

    def around(self, track: Track) -> list[int]:
        """The track's process, those that fit it, those that fit these, and so on."""
        group = [track.pids[0]]
        for pid in group:
            group += [other for other in self.choices(pid) if other not in group]
        return group

    def choices(self, pid: int) -> list[int]:
        """Those whose streams fit, and that do not fit a third one better."""
        return [other for other in self._best(pid) if pid in self._best(other)]

    def _best(self, pid: int) -> list[int]:
        """Those whose streams fit best: most connections that are equal to the byte, then most that fit at all."""
        if pid not in self._fitting:
            one = self.by_pid[pid]
            others = [other for other, half in self.by_pid.items() if bool(half.logging) != bool(one.logging)]
            likeness = {other: self._likeness(one, self.by_pid[other]) for other in others}
            most = max(likeness.values(), default=(0, 0))
            self._fitting[pid] = [other for other in others if any(most) and likeness[other] == most]
        return self._fitting[pid]

    def _likeness(self, one: Track, half: Track) -> tuple[int, int]:
        source, destination = (one, half) if one.logging else (half, one)
        return flow.likeness(self._of(source, SEND), self._of(destination, RECEIVE))

    def _of(self, track: Track, direction: int) -> list[flow.Flow]:
        (pid,) = track.pids
        if pid not in self._flows:
            seen = [event for event in track.events if isinstance(event, Transfer)]
            self._flows[pid] = flow.flows([*seen, *self._pending(pid)], direction)
        return self._flows[pid]
