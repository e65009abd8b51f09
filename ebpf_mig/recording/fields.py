# SPDX-License-Identifier: Apache-2.0
"""The types of the fields of events and headers: what each value means, and its range; and the base of events.

In: nothing. Out: annotated types for `events.py`, `socket_events.py` and `header.py`, and `Event`.

The type of a field gives its meaning, unless it is a plain number. `Instant`s are shifted when two recordings are
joined; `HostName`, `Address` and similar fields are replaced when a recording is redacted. `kinds.py` reads these
meanings.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from ebpf_mig.recording.meaning import Meaning

LATEST = 1 << 62
"""Upper limit of times (ns) and counts. A sum or difference of two such values still fits into 64 bits."""
_MOST_PID = 1 << 33
"""The kernel's limit is 2^22. In a joined recording 2^32 is added to ids that both hosts use."""

Instant = Annotated[int, Meaning.INSTANT, Meta(ge=0, le=LATEST)]
"""ns of CLOCK_MONOTONIC; 0: not seen."""
WallClock = Annotated[int, Meta(ge=0, le=LATEST)]
"""ns of CLOCK_REALTIME."""
Duration = Annotated[int, Meta(ge=0, le=LATEST)]
"""ns."""
MaybeDuration = Annotated[int, Meta(ge=-1, le=LATEST)]
"""ns; -1: unknown."""
Count = Annotated[int, Meta(ge=0, le=LATEST)]
Size = Annotated[int, Meta(ge=0, le=LATEST)]
"""Bytes."""
Value = Annotated[int, Meta(ge=-LATEST, le=LATEST)]
"""A figure of the VMM in its own unit, or a difference of two clocks."""
Bits64 = Annotated[int, Meta(ge=0)]
"""An argument that a process passed to the kernel: any 64 bits, not validated."""
Bits32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
MaybeBits32 = Annotated[int, Meta(ge=-1, le=(1 << 32) - 1)]
"""-1: unknown."""
Returned = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
"""The return value of a system call."""
MaybePid = Annotated[int, Meta(ge=-1, le=_MOST_PID)]
"""-1: unknown; 0: the idle task."""
MaybeCpu = Annotated[int, Meta(ge=-1, le=1 << 20)]
"""The number of a CPU; -1: unknown."""
Pid = Annotated[int, Meta(ge=0, le=_MOST_PID)]
Fd = Annotated[int, Meta(ge=-1, le=(1 << 32) - 1)]
"""A file descriptor; -1: unknown."""
Inode = Annotated[int, Meta(ge=0)]
Way = Annotated[int, Meta(ge=0, le=1)]
"""A `Direction`."""
Flag = Annotated[int, Meta(ge=0, le=1)]
MaybeFlag = Annotated[int, Meta(ge=-1, le=1)]
"""-1: unknown."""
VcpuIndex = Annotated[int, Meta(ge=-1, le=1 << 20)]
"""-1: not a vCPU."""

Address = Annotated[str, Meaning.ADDRESS]
"""`ADDR:PORT`, or empty."""
HostName = Annotated[str, Meaning.HOST]
MachineId = Annotated[str, Meaning.MACHINE_ID]
ProcessName = Annotated[str, Meaning.PROCESS]
ThreadName = Annotated[str, Meaning.THREAD]
FreeText = Annotated[str, Meaning.TEXT]
Symbol = Annotated[str, Meaning.SYMBOL]
"""A kernel function."""
Version = Annotated[str, Meaning.VERSION]
Probe = Annotated[str, Meaning.PROBE]
"""One of our BPF programs, or a kind of record."""
Tier = Annotated[str, Meaning.TIER]
"""How a signal was attached, or `absent: ` and the reason."""
Word = Annotated[str, Meaning.WORD]
"""A word of ebpf-mig or of the VMM's protocol; it identifies nobody."""


class Event(Struct, frozen=True, array_like=True, gc=False):
    """Base of all events; `tag` is the first array element of the stored form."""
