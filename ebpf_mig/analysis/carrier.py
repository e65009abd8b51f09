# SPDX-License-Identifier: Apache-2.0
"""What carries the migration: sockets, pipes or files.

In: the two processes and the threads that fetch the dirty log. Out: the carriers of each side.

A VMM's threads also write to monitors, consoles, backends, displays, disks and logs; QEMU's migration thread itself
writes QMP events in the middle of the blackout. So a carrier has to be proven, in this order: the thread that fetches
the dirty log sends there; its other end belongs to the other process; or large calls go through it, and if a fetching
thread is known, all in one direction. On the other side it is what received as many bytes, if processes in between
pass them on. A file is one only if the fetching thread wrote it. A thread's name proves nothing, nor do many bytes.
Where nothing is proven, the carrier is unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from ebpf_mig.analysis.process import Process
from ebpf_mig.analysis.reception import STREAM_BYTES
from ebpf_mig.analysis.sockets import LEAST_BYTES, Channels, end_of, family_of, mirrors, transport_of
from ebpf_mig.recording.events import AF_UNIX, AF_VSOCK, FILE, PIPE, RECEIVE, SEND

EXTRA_SHARE = 100
"""UNIX sockets have no address; one with 1/100 of the main one's bytes counts as a further connection."""
SAME_SHARE = 100
"""What was received is what was sent, if less than 1/100 is missing. Tracing can begin within a call."""
FEW_ANSWERS = 16
"""A destination answers its stream this often at most: return path messages of QEMU. A disk server answers each
request."""


def choose(source: Process | None, destination: Process | None, since: int, fetchers: Collection[int]) -> Channels:
    """The migration's carriers among all that the two processes used from `since` on."""
    if source is None:
        keys = _receiving(destination, since) if destination else frozenset()
        return Channels(frozenset(), keys, transport_of(destination, keys))
    mirrored = mirrors(source, destination) if destination else {}
    keys = _sending(source, since, fetchers, mirrored)
    transport = transport_of(source, keys)
    if destination is None:
        return Channels(keys, frozenset(), transport)
    ends = {key: mirrored[key] for key in keys if key in mirrored}
    ends = ends or _same_bytes(source, keys, destination, since)
    other = frozenset(ends.values()) or _receiving(destination, since)
    return Channels(keys, other, transport, tuple(sorted(ends.items())))


def _sending(source: Process, since: int, fetchers: Collection[int], mirrored: Collection[int]) -> frozenset[int]:
    """What carries most, by the thread that fetches if it sends, and the further connections."""
    seen = _Seen(source, SEND, since, fetchers)
    fetching = {key: size for key, size in seen.by_threads.items() if size >= LEAST_BYTES}
    large = seen.large()
    crossing = {key: size for key, size in seen.bytes.items() if key in mirrored}
    # Multifd: the bulk leaves through further sockets, but the fetching thread keeps the main one.
    proven = [fetching.keys() & crossing.keys(), fetching.keys() & large.keys()]
    for keys in proven:
        if keys:
            candidates = crossing if keys <= crossing.keys() else large
            return _with_company(seen, max(keys, key=lambda k: (fetching[k], seen.bytes[k], -k)), candidates, crossing)
    candidates = {key: size for key, size in (crossing or large).items() if family_of(source, key) != FILE}
    if fetchers:
        # The fetching thread was not seen to send. A stream that nobody answers can be nothing else.
        quiet = {key: size for key, size in candidates.items() if _one_way(source, SEND, key)}
        if not crossing:
            # A console or a log goes into a pipe, too. A migration has one pipe, and its own thread writes.
            quiet = {key: size for key, size in quiet.items() if family_of(source, key) != PIPE}
        candidates = quiet or (candidates if crossing else {})
    if not candidates:
        return frozenset()
    return _with_company(seen, max(candidates, key=lambda key: (candidates[key], -key)), candidates, crossing)


def _receiving(destination: Process, since: int) -> frozenset[int]:
    """What fills a destination whose source is not known. Files only if nothing else does: it also reads its disks."""
    seen = _Seen(destination, RECEIVE, since, ())
    large = seen.large()
    streams = {key: size for key, size in large.items() if family_of(destination, key) != FILE}
    quiet = {key: size for key, size in streams.items() if _answers(destination, key) <= FEW_ANSWERS}
    candidates = quiet or streams or large
    if not candidates:
        return frozenset()
    return _with_company(seen, max(candidates, key=lambda key: (candidates[key], -key)), candidates, ())


class _Seen:
    """What a process moved in one direction, by carrier."""

    def __init__(self, process: Process, direction: int, since: int, tids: Collection[int]) -> None:
        self.process, self.direction = process, direction
        self.bytes: Counter[int] = Counter()
        self.by_threads: Counter[int] = Counter()
        """Moved by the threads `tids`."""
        self._calls: Counter[int] = Counter()
        for (way, key), transfers in process.streams.items():
            late = [t for t in transfers if t.end_ns >= since] if way == direction else ()
            if late:
                self.bytes[key] = sum([t.bytes for t in late])
                self._calls[key] = sum([t.calls for t in late])
                self.by_threads[key] = sum([t.bytes for t in late if t.tid in tids])

    def large(self) -> dict[int, int]:
        """Those with large calls."""
        return {k: size for k, size in self.bytes.items() if size >= max(LEAST_BYTES, STREAM_BYTES * self._calls[k])}


def _with_company(seen: _Seen, main: int, candidates: Mapping[int, int], crossing: Collection[int]) -> frozenset[int]:
    """The main carrier, and further connections of the same migration."""
    process, direction = seen.process, seen.direction
    known = process.sockets.get(main)
    if known is None or known.family in (PIPE, FILE):
        return frozenset({main})
    if known.family == AF_UNIX or (known.family == AF_VSOCK and not known.local):
        enough, quiet = max(LEAST_BYTES, candidates[main] // EXTRA_SHARE), _one_way(process, direction, main)
        more = {
            key
            for key, size in candidates.items()
            if family_of(process, key) == known.family
            and (key in crossing or (not crossing and size >= enough and not _answered(process, direction, key)))
            and (not quiet or _one_way(process, direction, key))
        }
    else:  # The side that listened has the one well-known port: the destination's.
        more = {
            key
            for key in candidates
            if (s := process.sockets.get(key))
            and s.family not in (AF_UNIX, PIPE, FILE)
            and end_of(s, direction) == end_of(known, direction)
        }
    return frozenset({main} | more)


def _same_bytes(source: Process, keys: Collection[int], destination: Process, since: int) -> dict[int, int]:
    """For carriers of the source, those of the destination that received as many bytes: others passed them on."""
    sent, received = _Seen(source, SEND, since, ()).bytes, _Seen(destination, RECEIVE, since, ()).bytes
    found: dict[int, int] = {}
    for key in sorted(keys, key=lambda key: (-sent[key], key)):
        near = {
            other: abs(size - sent[key])
            for other, size in received.items()
            if other not in found.values() and abs(size - sent[key]) <= max(LEAST_BYTES, sent[key]) // SAME_SHARE
        }
        if near:
            found[key] = min(near, key=lambda other: (near[other], other))
    return found


def _one_way(process: Process, direction: int, key: int) -> bool:
    """Did the threads that send there never receive there? Those of disks, displays and networks do both."""
    other = SEND if direction == RECEIVE else RECEIVE
    here = {t.tid for t in process.streams[direction, key]}
    return not any(t.tid in here and t.bytes for t in process.streams.get((other, key), ()))


def _answers(process: Process, key: int) -> int:
    """How often the threads that receive there answered."""
    here = {t.tid for t in process.streams[RECEIVE, key]}
    return sum(t.calls for t in process.streams.get((SEND, key), ()) if t.tid in here)


def _answered(process: Process, direction: int, key: int) -> bool:
    """Did bytes go the other way? A further connection of a migration carries pages one way (QEMU's multifd)."""
    other = SEND if direction == RECEIVE else RECEIVE
    return sum(t.bytes for t in process.streams.get((other, key), ())) >= LEAST_BYTES
