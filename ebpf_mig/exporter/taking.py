# SPDX-License-Identifier: Apache-2.0
"""What the events of a process say of its track: whether it logs dirty memory, has run, saves, loads, sends a stream.

In: a `Track` and events of one of its processes. Out: the track's new state.
"""

from __future__ import annotations

from ebpf_mig.analysis.reception import LOADED_BYTES, STREAM_BYTES
from ebpf_mig.exporter.track import KEPT_EVENTS, PROBATION_NS, UNPROVEN_NS, Track
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import RECEIVE, AnyEvent, Exec, Ioctl, Transfer, VcpuEnter, VcpuExit
from ebpf_mig.tracing.lifecycle import LARGE_BYTES

MOVING_BYTES = 64 << 10
"""A VM that moves this much within a probation may be migrating. Of 256 KiB/s, QEMU sends 25 KiB at a time."""
SLOTS = 3
"""A display fetches the dirty logs of fewer memslots than this."""


def take(track: Track, batch: list[AnyEvent], now_ns: int) -> None:
    """Adds the next events of one of its processes, and keeps what they say of the track."""
    track.events += batch
    track.watch.saw(batch)
    for event in batch:
        if isinstance(event, Ioctl):
            track.last_ns = now_ns
            _take_ioctl(track, event)
        elif isinstance(event, VcpuEnter):
            track.ran.add(event.pid)
            track.stopped.discard(event.pid)
            track.saved.discard(event.pid)
            track.handed.pop(event.pid, None)
        elif isinstance(event, VcpuExit):
            track.stopped.add(event.pid)
        elif isinstance(event, Exec):
            track.last_ns = now_ns
            for pids in (track.restored, track.ran, track.stopped, track.saved):
                pids.discard(event.pid)
            track.fetched = {(pid, slot) for pid, slot in track.fetched if pid != event.pid}
            track.fetchers = {(pid, tid) for pid, tid in track.fetchers if pid != event.pid}
        elif isinstance(event, Transfer) and not track.watch.carriers.is_of_a_file(event):
            track.moved += event.bytes
            _take_transfer(track, event)
    # Our own readings of a VM that waits, and its waits for a CPU, go on for ever.
    awaits_start = bool(track.restored & track.fresh - track.ran)
    if track.moved >= MOVING_BYTES or (awaits_start and any(isinstance(event, Ioctl | Transfer) for event in batch)):
        track.moved = 0
        track.last_ns = now_ns
        track.until_ns = max(track.until_ns, min(now_ns, track.begin_ns + UNPROVEN_NS) + PROBATION_NS)
    track.logging |= track.watch.sources & set(track.pids)
    for pid in _found_out(track):
        track.logging.add(pid)
        track.watch.missed_beginning(pid)
    if track.between_vms and not track.logging:
        for pid in set(track.pids) - track.fresh:
            track.logging.add(pid)
            track.watch.missed_beginning(pid)
    if len(track.events) > KEPT_EVENTS:
        track.thin()


def switches_on(event: Ioctl) -> bool:
    """Whether RAM is logged from now on. A display logs one small slot only, a migration all slots."""
    return event.cmd in kvm.MEMSLOT and event.size >= LARGE_BYTES and bool(event.flags & kvm.MEM_LOG_DIRTY_PAGES)


def _take_ioctl(track: Track, event: Ioctl) -> None:
    if switches_on(event):
        track.logging.add(event.pid)
    if event.cmd in kvm.DIRTY_LOG:
        track.fetched.add((event.pid, event.slot))
        track.fetchers.add((event.pid, event.tid))
    if event.pid in track.stopped and kvm.name_of(event.cmd) in kvm.VCPU_STATE_GET:
        track.saved.add(event.pid)
    if kvm.name_of(event.cmd) in kvm.VCPU_STATE_SET:
        track.restored.add(event.pid)


def _take_transfer(track: Track, event: Transfer) -> None:
    if event.direction == RECEIVE:
        track.received[event.pid] = track.received.get(event.pid, 0) + event.bytes
        return
    if event.bytes >= STREAM_BYTES * event.calls and any(pid == event.pid for pid, _ in track.fetchers):
        track.streamed[event.pid, event.tid] += event.bytes
    if event.pid in track.stopped - track.fresh and (event.pid, event.tid) in track.fetchers:
        track.handed[event.pid] = track.handed.get(event.pid, 0) + event.bytes


def _found_out(track: Track) -> set[int]:
    """Sources whose beginning was missed.

    They send the stream, and the thread that fetches dirty logs does so itself, or others do, for many slots (multifd).
    Or they are stopped, their registers are read, and the thread that fetches sends. Nobody sends where the rate of
    dirty pages is measured. A display is served by the main thread, which fetches few slots and may send pictures.
    """
    suspects = {pid for pid, _ in track.fetchers} - track.logging
    return {pid for pid in suspects if _streams(track, pid) or (pid in track.saved and _handed(track, pid))}


def _streams(track: Track, pid: int) -> bool:
    slots = sum(one == pid for one, _ in track.fetched)
    senders = {tid for (one, tid), size in track.streamed.items() if one == pid and size >= LOADED_BYTES}
    if slots >= SLOTS and senders - {pid}:
        return True
    return any(pid == one and tid in senders and (tid != pid or slots >= SLOTS) for one, tid in track.fetchers)


def _handed(track: Track, pid: int) -> bool:
    return track.handed.get(pid, 0) >= LOADED_BYTES
