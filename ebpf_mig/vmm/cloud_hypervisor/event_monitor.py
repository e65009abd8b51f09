# SPDX-License-Identifier: Apache-2.0
"""The events that Cloud Hypervisor writes to `--event-monitor path=FILE`, on our clock.

In: the file. Out: a `Mark` per event. Stamps count from the VMM's start, whose instant is not reported. Two bounds
limit it: an event happened before we read it, and a migration began after we requested it. The file is watched with
inotify, so that reading it costs the VMM nothing and nothing is polled. Format: event_monitor/src/lib.rs and
vmm/src/lib.rs (`start_event_monitor_thread`), v52 to v54.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import stat
import threading
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from ebpf_mig.errors import VmmError
from ebpf_mig.linux import clock
from ebpf_mig.recording.events import Mark

_IN_MODIFY = 2
_MOST = 4096
"""Largest number of events kept. A migration has about twenty."""
_MOST_REST = 1 << 16
"""Largest size of one event in bytes. Typical events have about a hundred."""
_LOOKED_AT_BYTES = 64 << 20
"""Largest number of bytes read from the file."""
RECEIVE_ASKED, SEND_ASKED = 0, 1
FOLLOWS = {
    "migration-receive-ready": RECEIVE_ASKED,
    "migration-receive-started": SEND_ASKED,
    "migration-started": SEND_ASKED,
}
"""The first events of a migration, and the call of ours that each must follow."""


@dataclass(frozen=True)
class MonitorEvent:
    """One event that was read."""

    name: str
    stamp_ns: int
    """Since the VMM's start."""
    read_ns: int
    """When we read it, CLOCK_MONOTONIC."""


def decode(text: str) -> tuple[list[tuple[str, int]], str]:
    """(name, stamp in ns) of each complete event at the start of `text`, and the remaining text."""
    decoder = json.JSONDecoder()
    found: list[tuple[str, int]] = []
    rest = text.lstrip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            break
        event = _event(value)
        if event is not None:
            found.append(event)
        rest = rest[end:].lstrip()
    return found, rest


class _Stamp(msgspec.Struct):
    secs: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    nanos: Annotated[int, msgspec.Meta(ge=0, lt=10**9)]


class _Event(msgspec.Struct):
    event: str
    timestamp: _Stamp


def _event(value: Any) -> tuple[str, int] | None:
    try:
        event = msgspec.convert(value, _Event)
    except (msgspec.ValidationError, RecursionError, OverflowError):
        return None
    return event.event[:64], event.timestamp.secs * 10**9 + event.timestamp.nanos


def marks(pid: int, events: list[MonitorEvent], asked_ns: tuple[int, int]) -> list[Mark]:
    """Marks named `ch.event.NAME`. `asked_ns`: when the receive and the send call were begun.

    The VMM's start lies between the two bounds. The fastest of about ten reads is much closer to its event than
    the start of a call is to its effect. So a mark is placed at the latest possible instant. Its doubt is the
    distance of the bounds, all on the early side. None if the bounds contradict each other, e.g. after a migration
    that another client started.
    """
    latest = min((event.read_ns - event.stamp_ns for event in events), default=None)
    begins = [asked_ns[FOLLOWS[event.name]] - event.stamp_ns for event in events if event.name in FOLLOWS]
    if latest is None or not begins:
        return []
    earliest = max(begins)
    if earliest > latest:
        return []
    doubt = latest - earliest
    return [Mark(latest + event.stamp_ns, pid, f"ch.event.{event.name}", "", 0, doubt) for event in events]


class EventFile:
    """Reads new data of the file in its own thread, from `start` to `stop`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._events: list[MonitorEvent] = []
        self._rest = ""
        self._size = 0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Reads from now on; VmmError if there is no such file."""
        remedy = f"start Cloud Hypervisor with --event-monitor path={self.path}"
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a FIFO would block
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise VmmError(f"cannot read events from {self.path}: {why}", remedy) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise VmmError(f"cannot read events from {self.path}: not a regular file", remedy)
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self._file.seek(0, os.SEEK_END)
        libc = ctypes.CDLL(None, use_errno=True)
        self._notify = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._notify < 0 or libc.inotify_add_watch(self._notify, os.fsencode(self.path), _IN_MODIFY) < 0:
            why = os.strerror(ctypes.get_errno())
            self._file.close()
            raise VmmError(f"cannot watch {self.path}: {why}", "see /proc/sys/fs/inotify/max_user_instances")
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, name="events", daemon=True)
        self._thread.start()

    def stop(self) -> list[MonitorEvent]:
        """Everything that was read, in order. May be called again, or without `start`."""
        if self._thread is not None:
            self._closed.set()
            os.write(self._waker, b"x")
            self._thread.join()
            self._thread = None
            self._take()
            self._file.close()
            for fd in (self._notify, self._wake, self._waker):
                os.close(fd)
        return list(self._events)

    def _watch(self) -> None:
        while not self._closed.is_set():
            select.select([self._notify, self._wake], [], [])
            with contextlib.suppress(OSError):
                os.read(self._notify, 65536)
            self._take()

    def _take(self) -> None:
        for _ in range(_LOOKED_AT_BYTES // _MOST_REST):  # do not wait for a writer that never stops
            data = self._file.read(_MOST_REST)
            if not data:
                break
            now = clock.monotonic_ns()
            self._size += len(data)
            if self._size > _LOOKED_AT_BYTES or len(self._events) >= _MOST:
                continue  # Cloud Hypervisor never writes this much: read and discard
            found, rest = decode(self._rest + data.decode(errors="replace"))
            self._rest = rest if len(rest) <= _MOST_REST else ""
            self._events += [MonitorEvent(name, stamp, now) for name, stamp in found][: _MOST - len(self._events)]
