# SPDX-License-Identifier: Apache-2.0
"""The registry of event kinds: one row a kind, from which every list of kinds is derived.

In: `events.py`, for the fields and their meaning. Out: `KINDS`, and what is derived from it. A new kind of event is a
struct in `events.py`, a member of its `AnyEvent` and a row here; a test fails when a row is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec

from ebpf_mig.recording import events as ev
from ebpf_mig.recording.meaning import Meaning


@dataclass(frozen=True)
class Record:
    """The kernel's half of a kind: what its BPF programs put into the ring buffer."""

    number: int
    """`enum kind` in `bpf/common.h`: the first word of each record."""
    name: str
    """What reports of losses call it."""
    constant: str
    """The constant that tells C how many words we expect; a static assertion compares it with the struct."""
    words: int
    """Its size in u64."""


@dataclass(frozen=True)
class Kind:
    """One kind of event."""

    event: type[ev.Event]
    """The Python type; its tag is the kind's number in files."""
    stream: str = ""
    """The list of a process that holds these events; empty: an event of the recording, not of one process."""
    record: Record | None = None
    """None: made in user space."""

    @cached_property
    def meanings(self) -> dict[str, Meaning]:
        """The meaning of each field that has one, by name."""
        return meanings(self.event)

    @cached_property
    def instants(self) -> tuple[str, ...]:
        """The fields that hold a point in time."""
        return tuple(name for name, meaning in self.meanings.items() if meaning is Meaning.INSTANT)


KINDS = (
    Kind(ev.Ioctl, "ioctls", Record(1, "ioctl", "IOCTL_WORDS", 21)),
    Kind(ev.VcpuEnter, "enters", Record(2, "vcpu-enter", "VCPU_ENTER_WORDS", 8)),
    Kind(ev.VcpuExit, "exits", Record(3, "vcpu-exit", "VCPU_EXIT_WORDS", 7)),
    Kind(ev.VcpuState, "states"),
    Kind(ev.Kick, "kicks", Record(5, "kick", "KICK_WORDS", 6)),
    Kind(ev.Transfer, "transfers", Record(6, "transfer", "TRANSFER_WORDS", 17)),
    Kind(ev.Socket, "told", Record(7, "socket", "SOCKET_WORDS", 13)),
    Kind(ev.Thread, "named"),
    Kind(ev.Mark),
    Kind(ev.Slot, "slots"),
    Kind(ev.Ending),
    Kind(ev.OffCpu, "off_cpu", Record(8, "off-cpu", "OFF_CPU_WORDS", 8)),
    Kind(ev.Segment, "segments", Record(9, "segment", "SEGMENT_WORDS", 12)),
    Kind(ev.VcpuSpan, "spans", Record(11, "vcpu-span", "VCPU_SPAN_WORDS", 9)),
    Kind(ev.Samples, "samples", Record(10, "sample", "SAMPLE_WORDS", 30)),
    Kind(ev.TcpInfo, "tcp"),
    Kind(ev.OwnCost),
    Kind(ev.Retransmit, "retransmits", Record(12, "retransmit", "RETRANSMIT_WORDS", 7)),
)

BY_TYPE: dict[type, Kind] = {kind.event: kind for kind in KINDS}
OF_A_PROCESS = tuple(kind.event for kind in KINDS if kind.stream)
"""The types of event that belong to one traced process: they have a `pid`."""


def pid_of(event: ev.AnyEvent) -> int | None:
    """The traced process that an event belongs to; None if it belongs to none."""
    return event.pid if BY_TYPE[type(event)].stream else None  # type: ignore[union-attr]


def meanings(struct: type[msgspec.Struct]) -> dict[str, Meaning]:
    """The meaning of each field of a struct that has one, by name; of a list's or dictionary's items likewise."""
    hints = get_type_hints(struct, include_extras=True)
    return {name: found for name in struct.__struct_fields__ if (found := _meaning(hints[name])) is not None}


def _meaning(hint: Any) -> Meaning | None:
    if get_origin(hint) is Annotated:
        return next((note for note in hint.__metadata__ if isinstance(note, Meaning)), None)
    return next((found for item in get_args(hint) if (found := _meaning(item)) is not None), None)
