# SPDX-License-Identifier: Apache-2.0
"""The first block of a recording: which host and processes it is of, and how it was made.

In: nothing. Out: structs that `file.py` stores before the events. Stored by field name: fields may be added with a
default, never renamed. `events.py` exports them all.
"""

from __future__ import annotations

import msgspec

from ebpf_mig.recording.fields import (
    Count,
    Duration,
    FreeText,
    HostName,
    Instant,
    MachineId,
    Pid,
    ProcessName,
    Size,
    Tier,
    Value,
    Version,
    WallClock,
    Word,
)


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One traced process."""

    pid: Pid
    role: Word
    """`source`, `destination` or `unknown`, as given by the user; the collector checks it."""
    comm: ProcessName = ""
    vmm: Word = ""
    vmm_version: Version = ""


class ClockPair(msgspec.Struct, frozen=True, array_like=True):
    """CLOCK_MONOTONIC and CLOCK_REALTIME, read at the same time."""

    monotonic_ns: Instant
    realtime_ns: WallClock
    doubt_ns: Duration


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """The destination host's part of a joined recording. Its events are on the clock of the source host."""

    host: HostName = ""
    pid: Pid = 0
    """Pid of the destination in this recording."""
    own_pid: Pid = 0
    """Pid of the destination on its host. It differs from `pid` only if the source host uses the same pid."""
    boot_id: MachineId = ""
    kernel: Version = ""
    machine: Word = ""
    offset_ns: Value = 0
    """The destination's clock minus the source's; subtracted from each instant of the destination."""
    bound_ns: Duration | None = 0
    """Error bound of the offset at `at_ns`; None: unbounded on one side."""
    open: Word = ""
    """`least` or `most`: nothing bounds the offset from below, or from above."""
    at_ns: Instant = 0
    """The start of the destination, on the source's clock."""
    drift_ppb: Count = 0
    """Largest difference of the two clock rates."""
    pairs: tuple[Count, Count] = (0, 0)
    """Number of pairs of events that bound the offset from above and from below."""
    cpus: Count = 0
    """As in `Header`."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first block of a recording: its host, its processes and how it was made."""

    format: Count = 1
    tool: Version = ""
    host: HostName = ""
    boot_id: MachineId = ""
    kernel: Version = ""
    machine: Word = ""
    page_size: Size = 4096
    begin_ns: Instant = 0
    clock: ClockPair | None = None
    targets: list[Target] = []
    attach: dict[Word, Tier] = {}
    """Attach tier by signal: `fentry`, `kprobe`, `tracepoint`, `absent: why`."""
    notes: list[FreeText] = []
    remote: Remote | None = None
    """Only in a joined recording."""
    cpus: Count = 0
    """Number of CPUs that were online when tracing began; 0 if unknown."""
