# SPDX-License-Identifier: Apache-2.0
"""Finds the other half of a migration on this node whose two sides share no connection.

In: a track that is one side, and all open tracks. Out: the other side's track, or None. A forwarder between the sides
(a proxy, ssh, socat) has connections of its own, so no socket of one side is the other end of a socket of the other.
The streams show it: see `analysis/flow.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ebpf_mig.analysis import flow
from ebpf_mig.exporter.track import Track
from ebpf_mig.recording.events import RECEIVE, SEND, Transfer


def other_half(track: Track, tracks: Iterable[Track]) -> Track | None:
    """The track of the other side. Each must be the other's choice, else both stay alone."""
    halves = [other for other in tracks if is_half(other)]
    if not is_half(track):
        return None
    chosen = _choice(track, halves)
    return chosen if chosen is not None and _choice(chosen, halves) is track else None


def is_half(track: Track) -> bool:
    """Whether it may be one side of a migration whose other side is another track. A source may have just booted, so
    its vCPUs' state was set, too."""
    return len(track.pids) == 1 and bool(track.logging or track.fresh & track.restored)


def _choice(track: Track, halves: Sequence[Track]) -> Track | None:
    """The only one whose stream fits. If several fit, the only one whose stream is equal to the byte."""
    fitting: list[tuple[bool, Track]] = []
    for other in halves:
        if bool(other.logging) != bool(track.logging):
            source, destination = (track, other) if track.logging else (other, track)
            found = flow.best(_flows(source, SEND), _flows(destination, RECEIVE))
            if found is not None:
                fitting.append((found[2].whole, other))
    best = [other for whole, other in fitting if whole] or [other for _, other in fitting]
    return best[0] if len(best) == 1 else None


def _flows(track: Track, direction: int) -> list[flow.Flow]:
    return flow.flows((event for event in track.events if isinstance(event, Transfer)), direction)
