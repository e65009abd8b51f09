# SPDX-License-Identifier: Apache-2.0
"""The registry of event kinds: one row per kind. Every list of kinds is derived from it.

In: the fields of `events.py` and their meaning. Out: `KINDS` and the lists derived from it. A new kind of event needs a
struct in `events.py`, a member in `AnyEvent` and a row here. A test fails if the row is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import msgspec

from ebpf_mig.recording import events as ev
from ebpf_mig.recording.layout import Layout
from ebpf_mig.recording.meaning import Meaning


class Range(NamedTuple):
    """The range of an integer in a recording. A field with a value outside of it is damaged."""

    least: int
    most: int
    """If the type names no limit, it is 2^64 - 1, the largest integer of msgpack."""


@dataclass(frozen=True)
class Record:
    """The record of a kind, as the BPF programs write it into the ring buffer."""

    number: int
    """The kind number: the first word of each record."""
    name: str
    """Its name in reports of losses. The C code has the number in `enum kind` of `bpf/common.h`."""
    layout: Layout
    """The fields of the record. A field with the name of an event field has the same meaning."""


@dataclass(frozen=True)
class Kind:
    """One kind of event."""

    event: type[ev.Event]
    """The Python type; its tag is the kind's number in files."""
    stream: str = ""
    """The list in a process that holds these events; empty: the event belongs to the recording, not to a process."""
    record: Record | None = None
    """None: the event is made in user space."""

    @cached_property
    def meanings(self) -> dict[str, tuple[Meaning, ...]]:
        """The meaning of each field that has one, by name. For a dictionary: the meanings of keys and values."""
        return meanings(self.event)

    @cached_property
    def instants(self) -> tuple[str, ...]:
        """The fields that hold a point in time."""
        return tuple(name for name, found in self.meanings.items() if Meaning.INSTANT in found)

    @cached_property
    def ranges(self) -> dict[str, Range]:
        """The range of each field that holds one or more integers, by name."""
        return ranges(self.event)


KINDS = (
    Kind(ev.Ioctl, "ioctls", Record(1, "ioctl", Layout(
        "ioctl_record",
        "u64 kind, begin_ns, end_ns, pid, tid, fd, cmd; s64 ret; u64 slot, flags, addr, size;"
        "s64 off_cpu_ns, slots_lock_ns, mmu_lock_ns, other_lock_ns;"
        "s64 walk_ns, flush_ns, copy_ns, spin_ns, off_total_ns"))),
    Kind(ev.VcpuEnter, "enters", Record(2, "vcpu-enter", Layout(
        "vcpu_enter_record", "u64 kind, at_ns, pid, tid, fd, last_exit_ns; s64 last_ret; u64 runs"))),
    Kind(ev.VcpuExit, "exits", Record(3, "vcpu-exit", Layout(
        "vcpu_exit_record", "u64 kind, at_ns, pid, tid, fd, enter_ns; s64 ret, preempted_ns"))),
    Kind(ev.VcpuState, "states"),
    Kind(ev.Kick, "kicks", Record(5, "kick", Layout(
        "kick_record", "u64 kind, at_ns, pid, tid, target_tid, signal"))),
    Kind(ev.Transfer, "transfers", Record(6, "transfer", Layout(
        "transfer_record",
        "u64 kind, begin_ns, end_ns, pid, tid; s64 fd;"
        "u64 direction, socket, calls, bytes, in_call_ns, max_call_ns, failed, position;"
        "s64 off_cpu_ns, off_before_ns; u64 hidden, descriptors"))),
    Kind(ev.Socket, "socket_events", Record(7, "socket", Layout(
        "socket_record",
        "u64 kind, at_ns, pid; s64 fd;"
        "u64 socket, family, local[2], remote[2], local_port, remote_port, peer"))),
    Kind(ev.Thread, "thread_events"),
    Kind(ev.Mark),
    Kind(ev.Slot, "slots"),
    Kind(ev.Ending),
    Kind(ev.OffCpu, "off_cpu", Record(8, "off-cpu", Layout(
        "off_cpu_record",
        "u64 kind, begin_ns, end_ns, pid, tid, stack_id, preempted, cpu, next_tid, previous_tid, rt_throttled"))),
    Kind(ev.RunDelay, "run_delays", Record(16, "run-delay", Layout(
        "run_delay_record", "u64 kind, at_ns, pid, tid, delay_ns"))),
    Kind(ev.CpuSteal, "steals"),
    Kind(ev.Segment, "segments", Record(9, "segment", Layout(
        "segment_record",
        "u64 kind, at_ns, pid, socket, payload, acked, in_flight, unsent, window, seq, ack, received"))),
    Kind(ev.VcpuSpan, "spans", Record(11, "vcpu-span", Layout(
        "vcpu_span_record",
        "u64 kind, since_ns, until_ns, pid, tid, outside_ns, longest_ns, gaps; s64 lock_ns"))),
    Kind(ev.VcpuSleep, "vcpu_sleeps"),
    Kind(ev.PageFaults, "page_faults"),
    Kind(ev.Samples, "samples", Record(10, "sample", Layout(
        "sample_record", "u64 kind, at_ns, pid, tid, begin_ns, period_ns, frames[24]"))),
    Kind(ev.TcpInfo, "tcp"),
    Kind(ev.OwnCost),
    Kind(ev.OwnRuns, record=Record(18, "own-runs", Layout(
        "own_runs_record",
        "u64 kind, since_ns, until_ns, at_ns, cpu, run_ns, runs, calls, other_runs, other_calls"))),
    Kind(ev.OwnRates),
    Kind(ev.OwnTurn, record=Record(20, "own-turn", Layout("own_turn_record", "u64 kind, begin_ns, end_ns, cpu"))),
    Kind(ev.CpuQuota, "quotas"),
    Kind(ev.Retransmit, "retransmits", Record(12, "retransmit", Layout(
        "retransmit_record", "u64 kind, at_ns, pid, socket, bytes, seq, number"))),
    Kind(ev.Exec, "execs", Record(13, "exec", Layout("exec_record", "u64 kind, at_ns, pid, begin_ns, had_vm"))),
    Kind(ev.UserStack, "user_stacks", Record(17, "user-stack", Layout(
        "user_stack_record", "u64 kind, at_ns, pid, tid, regs[21], words, stack[512]"))),
    Kind(ev.Module, "modules"),
    Kind(ev.Call, "calls", Record(19, "call", Layout(
        "call_record", "u64 kind, begin_ns, end_ns, pid, tid, call, file, bytes; s64 ret, off_cpu_ns"))),
    Kind(ev.SocketError, "socket_errors", Record(14, "socket-error", Layout(
        "socket_error_record", "u64 kind, at_ns, pid, tid, socket, direction; s64 ret"))),
)  # fmt: skip

THREAD_TABLE = (15, "thread-table")
"""Number and name of a kind that only appears in losses: the BPF programs' table of threads was full."""
MISSED_RETURN = (21, "missed-return")
"""The same for calls whose return was not seen: the kernel has a limited number of return probes."""
SLEEP_TABLE = (22, "vcpu-sleep")
"""The same for their table of the sleeps of vCPUs."""
RECORDS = tuple(kind.record for kind in KINDS if kind.record)
RECORD_NAMES = dict([THREAD_TABLE, MISSED_RETURN, SLEEP_TABLE, *((record.number, record.name) for record in RECORDS)])
"""Names of the record kinds in reports of losses, by number."""

BY_TYPE: dict[type, Kind] = {kind.event: kind for kind in KINDS}
OF_A_PROCESS = tuple(kind.event for kind in KINDS if kind.stream)
"""The event types that belong to one traced process; they have a `pid`."""


def pid_of(event: ev.AnyEvent) -> int | None:
    """The pid of the process to which an event belongs; None if there is none."""
    return event.pid if BY_TYPE[type(event)].stream else None  # type: ignore[union-attr]


def meanings(struct: type[msgspec.Struct]) -> dict[str, tuple[Meaning, ...]]:
    """The meaning of each field of a struct that has one, by name, including items of lists and dictionaries."""
    hints = get_type_hints(struct, include_extras=True)
    return {name: found for name in struct.__struct_fields__ if (found := _meanings(hints[name]))}


def ranges(struct: type[msgspec.Struct]) -> dict[str, Range]:
    """The range of each integer field of a struct, by name, including integers in lists and dictionaries."""
    hints = get_type_hints(struct, include_extras=True)
    return {name: found for name in struct.__struct_fields__ if (found := _range(hints[name])) is not None}


def _range(hint: Any) -> Range | None:
    if get_origin(hint) is Annotated:
        note = next((note for note in hint.__metadata__ if isinstance(note, msgspec.Meta)), None)
        return Range(int(note.ge or 0), (1 << 64) - 1 if note.le is None else int(note.le)) if note else None
    return next((found for item in get_args(hint) if (found := _range(item)) is not None), None)


def _meanings(hint: Any) -> tuple[Meaning, ...]:
    if get_origin(hint) is Annotated:
        return tuple(note for note in hint.__metadata__ if isinstance(note, Meaning))
    return tuple(found for item in get_args(hint) for found in _meanings(item))
