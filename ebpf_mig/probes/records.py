# SPDX-License-Identifier: Apache-2.0
"""Decodes the output of the BPF programs into events: ring buffer records and per-thread accounts.

In: the bytes of a record, or an entry of a BPF table. Out: events. Records are unpacked by the layouts in
`recording/kinds.py`, table entries by member name; `contract.py` checks both against the C code.
"""

from __future__ import annotations

import ipaddress
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ebpf_mig.probes.contract import Contract
from ebpf_mig.probes.macros import STACK_AS_IT_LEAVES, STACK_WHEN_BACK, VSOCK_ADDRESS
from ebpf_mig.recording.events import (
    AF_VSOCK,
    RECEIVE,
    SEND,
    AnyEvent,
    OffCpu,
    OwnRuns,
    OwnTurn,
    Samples,
    Socket,
    Transfer,
    UserStack,
    VcpuSleep,
    VcpuState,
)
from ebpf_mig.recording.kinds import KINDS, RECORD_NAMES, RECORDS, Kind
from ebpf_mig.recording.layout import WORD, Layout

_AF_INET, _AF_INET6 = 2, 10
_CID_ANY, _CID_LOCAL = 0xFFFFFFFF, 1
NO_STACK = 0xFFFFFFFF
"""Stands for a missing id in the kernel's stack map."""
_STACK_BITS = 16
"""Of a key in the table `vcpu_sleeps` (bpf/vcpu_sleeps.h)."""
NO_SLEEP_STACK = 0xFFFF
"""The same in a key of the table `vcpu_sleeps`."""
UNTRACKED = 2
"""A thread has one batch for each direction, and one for sends outside of the traced system calls."""
MANY_FAILED = 1000
"""Number of consecutive calls without data that is worth an event."""
OWN_SUMS = ("since_ns", "until_ns", "at_ns", "cpu", "run_ns", "runs", "calls", "other_runs", "other_calls")
"""The fields of `OwnRuns` that come from the kernel, in their order."""

_TABLE_MEMBERS = (
    Layout("thread_state", "u64 tgid, vcpu_fd, run_enter_ns, run_exit_ns; s64 run_ret;"
           "u64 runs, in_ns, out_ns, max_gap_ns, counted"),
    Layout("transfer_batch", "u64 begin_ns, end_ns; s64 fd; u64 socket, calls, bytes, in_call_ns, max_call_ns, failed;"
           "u64 off_cpu_ns, off_before_ns, descriptors"),
    Layout("stream", "u64 bytes[2]"),
    Layout("owner", "u64 pid"),
    Layout("queue", "u64 tgid, direction"),
    Layout("request", "u64 tgid"),
    Layout("vcpu_sleep", "u64 tgid, count, slept_ns, longest_ns, since_ns, until_ns"),
    Layout("process_state", "s64 running; u64 passes_on"),
    Layout("inside_kvm_state", "u64 tgid; s64 vcpu_id"),
    Layout("own_runs", "u64 since_ns, until_ns, run_ns, runs, calls, other_runs, other_calls"),
)  # fmt: skip
"""Members of table structs that Python reads by name. The structs have more members."""
CONTRACT = Contract(
    records=tuple(record.layout for record in RECORDS),
    members=_TABLE_MEMBERS,
    numbers={f"KIND_{name.upper().replace('-', '_')}": number for number, name in RECORD_NAMES.items()}
    | {"KIND_MAX": max(RECORD_NAMES) + 1, "NO_STACK": NO_STACK, "NO_SLEEP_STACK": NO_SLEEP_STACK}
    | {"PENDING_BIT": _STACK_BITS}
    | {"SEND": SEND, "RECEIVE": RECEIVE, "UNTRACKED": UNTRACKED}
    | {"STACK_AS_IT_LEAVES": STACK_AS_IT_LEAVES, "STACK_WHEN_BACK": STACK_WHEN_BACK},
)
"""The contract of `bpf/trace.bpf.c`."""


def _endpoint(family: int, address: tuple[int, ...], port: int) -> str:
    """`ADDR:PORT`; IPv4-mapped IPv6 is written as IPv4, so that both ends of a connection agree."""
    raw = struct.pack("=QQ", *address)
    if family == _AF_INET:
        return f"{ipaddress.IPv4Address(raw[:4])}:{port}"
    if family == _AF_INET6:
        v6 = ipaddress.IPv6Address(raw)
        return f"{v6.ipv4_mapped}:{port}" if v6.ipv4_mapped else f"[{v6}]:{port}"
    return ""


def _vsock_ends(local: tuple[int, ...], remote: tuple[int, ...]) -> tuple[str, str]:
    """`CID:PORT` of both ends; empty if no addresses were where we expect them.

    A socket that connects has no CID of its own: `*`, as in ss. Who connects to CID 1 has that, too.
    """
    here, there = (VSOCK_ADDRESS.unpack(struct.pack("=QQ", *address)) for address in (local, remote))
    if (here[0], there[0]) != (AF_VSOCK, AF_VSOCK):
        return "", ""
    own = _CID_LOCAL if (here[3], there[3]) == (_CID_ANY, _CID_LOCAL) else here[3]
    return f"{'*' if own == _CID_ANY else own}:{here[2]}", f"{there[3]}:{there[2]}"


def _socket(layout: Layout) -> Callable[[bytes], Socket]:
    read = layout.reader(
        "at_ns", "pid", "fd", "socket", "family", "local", "local_port", "remote", "remote_port", "peer"
    )

    def decode(record: bytes) -> Socket:
        at_ns, pid, fd, socket, family, local, local_port, remote, remote_port, peer = read(record)
        if family == AF_VSOCK:
            return Socket(at_ns, pid, fd, socket, family, *_vsock_ends(local, remote), peer)
        ends = _endpoint(family, local, local_port), _endpoint(family, remote, remote_port)
        return Socket(at_ns, pid, fd, socket, family, *ends, peer)

    return decode


def _off_cpu(layout: Layout) -> Callable[[bytes], OffCpu]:
    """The stack is an id in the kernel's stack map; the tracer replaces it with names."""
    read = layout.reader(
        "begin_ns", "end_ns", "pid", "tid", "stack_id", "preempted", "cpu", "next_tid", "previous_tid", "rt_throttled"
    )

    def decode(record: bytes) -> OffCpu:
        begin_ns, end_ns, pid, tid, stack_id, preempted, cpu, following, previous, throttled = read(record)
        stack = () if stack_id == NO_STACK else (str(stack_id),)
        return OffCpu(begin_ns, end_ns, pid, tid, stack, bool(preempted), cpu, following, previous, bool(throttled))

    return decode


def _sample(layout: Layout) -> Callable[[bytes], Samples]:
    """One sample. Its stack holds addresses; the tracer replaces them with names and adds up equal stacks."""
    read = layout.reader("begin_ns", "pid", "tid", "period_ns", "frames")

    def decode(record: bytes) -> Samples:
        begin_ns, pid, tid, period_ns, frames = read(record)
        return Samples(begin_ns, pid, tid, period_ns, 1, tuple(str(frame) for frame in frames if frame))

    return decode


def _own_runs(layout: Layout) -> Callable[[bytes], OwnRuns]:
    read = layout.reader(*OWN_SUMS)
    return lambda record: OwnRuns(*read(record))


def _own_turn(layout: Layout) -> Callable[[bytes], OwnTurn]:
    read = layout.reader("begin_ns", "end_ns", "cpu")
    return lambda record: OwnTurn(*read(record))


def _user_stack(layout: Layout) -> Callable[[bytes], UserStack]:
    """A stack whose frames are not known yet: `user_stacks.py` finds them when the recording ends."""
    read = layout.reader("at_ns", "pid", "tid")
    return lambda record: UserStack(*read(record))


_DECODERS: dict[type, Callable[[Layout], Callable[[bytes], AnyEvent]]] = {
    Socket: _socket,
    OffCpu: _off_cpu,
    Samples: _sample,
    UserStack: _user_stack,
    OwnRuns: _own_runs,
    OwnTurn: _own_turn,
}
"""Decoders of the kinds whose event has other fields than the record."""


def _decoder(kind: Kind, layout: Layout) -> Callable[[bytes], AnyEvent]:
    if kind.event in _DECODERS:
        return _DECODERS[kind.event](layout)
    event: Callable[..., AnyEvent] = kind.event  # type: ignore[assignment]
    read = layout.reader(*kind.event.__struct_fields__)
    return lambda record: event(*read(record))


_DECODER_OF = {kind.record.number: _decoder(kind, kind.record.layout) for kind in KINDS if kind.record}


def decode(record: bytes) -> AnyEvent:
    """Decodes one ring buffer record. KeyError for an unknown kind (a bug)."""
    return _DECODER_OF[int.from_bytes(record[:WORD], sys.byteorder)](record)


def vcpu_state(at_ns: int, tid: int, thread: Any) -> VcpuState | None:
    """The account of a vCPU in a `struct thread_state`, None if the thread never touched KVM_RUN.

    If no instant was seen, the thread was inside KVM_RUN when tracing began and never left it.
    """
    if not thread.run_enter_ns and not thread.run_exit_ns and not thread.vcpu_fd:
        return None
    return VcpuState(
        at_ns,
        pid=thread.tgid,
        tid=tid,
        fd=thread.vcpu_fd,
        enter_ns=thread.run_enter_ns,
        exit_ns=thread.run_exit_ns,
        ret=thread.run_ret,
        runs=thread.runs,
        in_ns=thread.in_ns,
        out_ns=thread.out_ns,
        max_gap_ns=thread.max_gap_ns,
    )


def vcpu_sleep(key: int, sums: Any) -> VcpuSleep:
    """The sleeps with one stack, from an entry of the table `vcpu_sleeps`. The stack is an id, as that of `OffCpu`."""
    stack_id = key & (1 << _STACK_BITS) - 1
    return VcpuSleep(
        sums.since_ns,
        sums.until_ns,
        pid=sums.tgid,
        tid=key >> 32,
        count=sums.count,
        slept_ns=sums.slept_ns,
        longest_ns=sums.longest_ns,
        pending=key >> _STACK_BITS & 1,
        stack=() if stack_id == NO_SLEEP_STACK else (str(stack_id),),
    )


def stream_key(pid: int, socket: int) -> int:
    """The key of a process's carrier in the table `streams` (bpf/sockets.h)."""
    return (socket ^ pid << 40) & (1 << 64) - 1


def open_batches(tid: int, thread: Any, streams: Mapping[int, Any]) -> list[Transfer]:
    """The open batches in a `struct thread_state`, to which calls were still being added.

    `streams` holds, by `stream_key`, the bytes sent and received on each carrier before them (`struct stream`).
    """
    return [
        _open_batch(thread.tgid, tid, batch, which, streams)
        for which, batch in enumerate(thread.batch)
        if batch.calls or batch.failed >= MANY_FAILED
    ]


def open_requests(queue: Any, streams: Mapping[int, Any]) -> list[Transfer]:
    """The same of a `struct queue`."""
    return [_open_batch(queue.tgid, 0, queue.batch, queue.direction, streams)] if queue.batch.calls else []


def _open_batch(pid: int, tid: int, batch: Any, which: int, streams: Mapping[int, Any]) -> Transfer:
    direction = RECEIVE if which == RECEIVE else SEND
    stream = streams.get(stream_key(pid, batch.socket))
    # Without calls, the other members belong to the last batch, which already has its event.
    timed = batch.calls and which != UNTRACKED and tid
    return Transfer(
        batch.begin_ns,
        batch.end_ns,
        pid=pid,
        tid=tid,
        fd=batch.fd,
        direction=direction,
        socket=batch.socket,
        calls=batch.calls,
        bytes=batch.bytes if batch.calls else 0,
        in_call_ns=batch.in_call_ns if batch.calls else 0,
        max_call_ns=batch.max_call_ns if batch.calls else 0,
        failed=batch.failed,
        position=stream.bytes[direction] if stream else 0,
        off_cpu_ns=batch.off_cpu_ns if timed else -1,
        off_before_ns=batch.off_before_ns if timed else -1,
        hidden=int(which == UNTRACKED),
        descriptors=batch.descriptors if timed else 0,
    )
