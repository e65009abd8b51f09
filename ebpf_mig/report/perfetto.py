# SPDX-License-Identifier: Apache-2.0
"""The Perfetto report: a TrackEvent trace for ui.perfetto.dev, written field by field.

In: a breakdown and the recording's lanes. Out: bytes of a `perfetto.protos.Trace`. Only some twenty fields are needed,
so they are encoded here; their numbers are from protos/perfetto/trace (trace_packet.proto, track_event/*.proto).
The trace's clock is CLOCK_MONOTONIC of the recording's host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ebpf_mig.analysis.lanes import Lane, Slice, Thread, View, apart
from ebpf_mig.breakdown import Breakdown, Side
from ebpf_mig.recording.events import Header
from ebpf_mig.report.protobuf import chunk, fixed, number, text

_BEGIN, _END, _INSTANT, _COUNTER = 1, 2, 3, 4
_BYTES, _COUNT = 3, 2
_REALTIME, _MONOTONIC = 1, 3
_SEQUENCE = 1
_EXPLICIT = 3
_KINDS = ("vcpu", "ioctl", "socket", "wait", "slot", "segment", "mark")


def render(breakdown: Breakdown, header: Header, view: View) -> bytes:
    """The whole trace; the same input gives the same bytes."""
    writer = _Writer(header, view)
    return b"".join(chunk(1, packet) for packet in writer.packets(breakdown))


class _Writer:
    """Allocates track ids, and collects packets in the order that a reader needs."""

    def __init__(self, header: Header, view: View) -> None:
        self._header = header
        self._view = view
        self._last = 0

    def packets(self, breakdown: Breakdown) -> Iterator[bytes]:
        yield from self._clock()
        yield from self._migration(breakdown)
        parents: dict[tuple[Side, int], int] = {}
        for side, pid in dict.fromkeys((lane.side, lane.pid) for lane in self._view.lanes):
            parents[side, pid] = self._uuid()
            target = next((t for t in self._header.targets if t.pid == pid), None)
            name = f"{side} {target.comm or target.vmm if target else ''}".rstrip()
            yield self._track(parents[side, pid], chunk(3, number(1, pid) + text(6, name)) + number(11, _EXPLICIT))
        threads: dict[Thread, int] = {}
        for lane in self._view.lanes:
            if lane.tid and (lane.side, lane.pid, lane.tid) not in threads:
                yield self._thread(lane, parents[lane.side, lane.pid], threads)
        for rank, lane in enumerate(self._view.lanes):
            yield from self._lane(lane, parents[lane.side, lane.pid], threads, rank)
        for counter in self._view.counters:
            uuid = self._uuid()
            about = number(5, parents[counter.side, counter.pid]) + text(2, counter.name) + chunk(8, number(3, _BYTES))
            yield self._track(uuid, about)
            for at, value in counter.points:
                yield self._event(at, number(9, _COUNTER) + number(11, uuid) + number(30, value))

    def _clock(self) -> Iterator[bytes]:
        """Ties the monotonic clock to the wall clock, so that the viewer can show both."""
        pair = self._header.clock
        if pair is None:
            return
        clocks = b"".join(
            chunk(1, number(1, clock) + number(2, at))
            for clock, at in ((_MONOTONIC, pair.monotonic_ns), (_REALTIME, pair.realtime_ns))
        )
        yield chunk(6, clocks + number(2, _MONOTONIC)) + number(10, _SEQUENCE)

    def _migration(self, breakdown: Breakdown) -> Iterator[bytes]:
        """The window with the blackout in it, the phases below, and the passes."""
        top = self._uuid()
        yield self._track(top, text(2, "migration") + number(11, _EXPLICIT))
        if breakdown.window_ns is not None:
            about: dict[str, int | str] = {
                "result": breakdown.migration.result,
                "completeness": breakdown.completeness.verdict,
                "clock_offset_ns": breakdown.clock.offset_ns,
                "clock_bound_ns": -1 if breakdown.clock.bound_ns is None else breakdown.clock.bound_ns,
            }
            whole = [self._slice(0, breakdown.window_ns, "window", about)]
            yield from self._simple(top, "window", whole, 0)
        if breakdown.blackout is not None:
            yield from self._simple(top, "blackout", [self._slice(*breakdown.blackout, "blackout")], 1)
        spans = [
            self._slice(begin, end, phase.phase, {"side": phase.side, "phase_ns": phase.duration_ns or 0})
            for phase in breakdown.phases
            for begin, end in phase.spans
        ]
        yield from self._simple(top, "phases", spans, 2)
        passes = breakdown.dirty_log.passes
        fetched = [
            self._slice(
                p.begin,
                p.begin + p.kernel_ns + p.user_ns,
                "pass",
                ({"bytes": p.bytes} if p.bytes is not None else {}) | {"number": at, "kernel_ns": p.kernel_ns},
            )
            for at, p in enumerate(passes, 1)
        ]
        yield from self._simple(top, "pre-copy passes", fetched, 3)
        rates = [(p.begin, p.dirty_pages_per_s) for p in passes]
        for name, known in (("dirty pages", [(p.begin, p.pages) for p in passes]), ("dirty pages per second", rates)):
            points = [(begin, value) for begin, value in known if value is not None]
            if points:
                uuid = self._uuid()
                yield self._track(uuid, number(5, top) + text(2, name) + chunk(8, number(3, _COUNT)))
                for begin, value in points:
                    at = self._view.origin_ns + begin
                    yield self._event(at, number(9, _COUNTER) + number(11, uuid) + number(30, value))

    def _slice(self, begin: int, end: int, name: str, args: Mapping[str, int | str] | None = None) -> Slice:
        origin = self._view.origin_ns
        return Slice(origin + begin, origin + end, name, dict(args or {}))

    def _simple(self, parent: int, name: str, slices: list[Slice], rank: int) -> Iterator[bytes]:
        uuid = self._uuid()
        yield self._track(uuid, number(5, parent) + text(2, name) + number(12, rank))
        for one in apart(slices):
            yield from self._begin_end(uuid, one, "migration")

    def _thread(self, lane: Lane, process: int, threads: dict[Thread, int]) -> bytes:
        """The track of a thread. Its ioctls are on it, all else that it does is on tracks below it."""
        uuid = threads[lane.side, lane.pid, lane.tid] = self._uuid()
        about = (
            number(1, lane.pid)
            + number(2, lane.tid)
            + text(5, self._view.threads.get((lane.side, lane.pid, lane.tid), ""))
        )
        return self._track(uuid, number(5, process) + chunk(4, about) + number(11, _EXPLICIT))

    def _lane(self, lane: Lane, process: int, threads: dict[Thread, int], rank: int) -> Iterator[bytes]:
        """The slices of a lane, on its thread's track, or on one of its own below its thread or process."""
        if lane.kind == "ioctl":
            uuid = threads[lane.side, lane.pid, lane.tid]
        else:
            uuid = self._uuid()
            order = _KINDS.index(lane.kind) * 100_000 + rank
            parent = threads.get((lane.side, lane.pid, lane.tid), process)
            yield self._track(uuid, number(5, parent) + text(2, lane.what) + number(12, order))
        for one in lane.slices:
            if lane.kind in {"segment", "mark"}:
                yield self._event(one.begin_ns, number(9, _INSTANT) + self._about(uuid, one, lane.kind))
            else:
                yield from self._begin_end(uuid, one, lane.kind)

    def _begin_end(self, uuid: int, one: Slice, category: str) -> Iterator[bytes]:
        yield self._event(one.begin_ns, number(9, _BEGIN) + self._about(uuid, one, category))
        yield self._event(one.end_ns, number(9, _END) + number(11, uuid))

    def _about(self, uuid: int, one: Slice, category: str) -> bytes:
        data = number(11, uuid) + text(23, one.name) + text(22, category)
        for name, value in one.args.items():
            note = number(4, value) if isinstance(value, int) else text(6, value)
            data += chunk(4, text(10, name) + note)
        data += b"".join(fixed(47, flow) for flow in one.starts)
        return data + b"".join(fixed(48, flow) for flow in one.ends)

    def _uuid(self) -> int:
        self._last += 1
        return self._last

    def _track(self, uuid: int, about: bytes) -> bytes:
        return chunk(60, number(1, uuid) + about) + number(10, _SEQUENCE)

    def _event(self, at: int, event: bytes) -> bytes:
        clock = number(58, _MONOTONIC) if self._header.clock is not None else b""
        return number(8, at) + clock + number(10, _SEQUENCE) + chunk(11, event)
