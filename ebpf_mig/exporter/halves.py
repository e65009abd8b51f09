# SPDX-License-Identifier: Apache-2.0
"""Finds the other half of a migration on this node whose two sides share no connection.

In: a track that is one side, and all open tracks. Out: the other side's track, or None. A forwarder between the sides
(a proxy, ssh, socat) has connections of its own, so no socket of one side is the other end of a socket of the other.
The streams show it: see `analysis/flow.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ebpf_mig.analysis import flow
from ebpf_mig.exporter.track import Track
from ebpf_mig.recording.events import RECEIVE, SEND, Transfer


def other_half(
    track: Track, tracks: Iterable[Track], pending: Callable[[int], Sequence[Transfer]] = lambda _pid: ()
) -> Track | None:
    """The track of the other side. Each must be the other's only choice, else all that fit stay alone for good: once
    some of them are over, the rest would look unambiguous. `pending`: the transfers of a process that the kernel half
    still holds; without the last of them, the end of a stream is not known."""
    halves = [other for other in tracks if is_half(other)]
    if not is_half(track):
        return None
    held = {half.pids[0]: pending(half.pids[0]) for half in halves}
    chosen = _choices(track, halves, held)
    back = [other for one in chosen for other in _choices(one, halves, held)]
    if len(chosen) == len(back) == 1 and back[0] is track:
        return chosen[0]
    for one in (*chosen, *back):
        one.doubtful = track.doubtful = True
    return None


def is_half(track: Track) -> bool:
    """Whether it may be one side of a migration whose other side is another track. A source may have just booted, so
    its vCPUs' state was set, too."""
    return len(track.pids) == 1 and not track.doubtful and bool(track.logging or track.fresh & track.restored)


def _choices(track: Track, halves: Sequence[Track], held: Mapping[int, Sequence[Transfer]]) -> list[Track]:
    """Those whose stream fits. If some are equal to the byte, only these."""
    fitting: list[tuple[bool, Track]] = []
    for other in halves:
        if bool(other.logging) != bool(track.logging):
            source, destination = (track, other) if track.logging else (other, track)
            found = flow.best(_flows(source, SEND, held), _flows(destination, RECEIVE, held))
            if found is not None:
                fitting.append((found[2].whole, other))
    return [other for whole, other in fitting if whole] or [other for _, other in fitting]


def _flows(track: Track, direction: int, held: Mapping[int, Sequence[Transfer]]) -> list[flow.Flow]:
    seen = [event for event in track.events if isinstance(event, Transfer)]
    return flow.flows([*seen, *held.get(track.pids[0], ())], direction)
