# SPDX-License-Identifier: Apache-2.0
"""The Python half of the record layouts in `bpf/`: bytes from the ring buffer in, events out.

Every record is an array of native u64, its kind first. The numbers of words are handed to the C compiler, where
a static assertion compares them with the C structs: a layout that drifted apart does not load.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable

from ebpf_mig.recording.events import (
    AnyEvent,
    Ioctl,
    Kick,
    OffCpu,
    Retransmit,
    Samples,
    Segment,
    Socket,
    Transfer,
    VcpuEnter,
    VcpuExit,
    VcpuSpan,
    VcpuState,
)
from ebpf_mig.recording.kinds import KINDS

THREAD_WORDS = 90
"""Size of `struct thread_state` in u64."""
_RECORDS = [kind.record for kind in KINDS if kind.record]
WORDS = {"THREAD_WORDS": THREAD_WORDS, **{record.constant: record.words for record in _RECORDS}}
KIND_NAMES = {15: "thread-table", **{record.number: record.name for record in _RECORDS}}
"""Names of the kinds in loss reports."""

_AF_INET, _AF_INET6 = 2, 10
_NO_STACK = 0xFFFFFFFF


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _ioctl(w: tuple[int, ...]) -> Ioctl:
    _, begin, end, pid, tid, fd, cmd, ret, slot, flags, addr, size, *waits = w
    return Ioctl(begin, end, pid, tid, fd, cmd, _signed(ret), slot, flags, addr, size, *map(_signed, waits))


def _vcpu_enter(w: tuple[int, ...]) -> VcpuEnter:
    return VcpuEnter(w[1], w[2], w[3], w[4], w[5], _signed(w[6]), w[7])


def _vcpu_exit(w: tuple[int, ...]) -> VcpuExit:
    return VcpuExit(w[1], w[2], w[3], w[4], w[5], _signed(w[6]))


def _kick(w: tuple[int, ...]) -> Kick:
    return Kick(*w[1:6])


def _transfer(w: tuple[int, ...]) -> Transfer:
    _, begin, end, pid, tid, fd, direction, socket, calls, size, in_call, longest, failed, before, *waits, hidden = w
    numbers = (calls, size, in_call, longest, failed, before, *map(_signed, waits), hidden)
    return Transfer(begin, end, pid, tid, _signed(fd), direction, socket, *numbers)


def _off_cpu(w: tuple[int, ...]) -> OffCpu:
    """The stack is still the id in the kernel's stack map; the tracer turns it into names."""
    stack = () if w[5] == _NO_STACK else (str(w[5]),)
    return OffCpu(w[1], w[2], w[3], w[4], stack, bool(w[6]))


def _segment(w: tuple[int, ...]) -> Segment:
    return Segment(*w[1:])


def _retransmit(w: tuple[int, ...]) -> Retransmit:
    return Retransmit(*w[1:])


def _sample(w: tuple[int, ...]) -> Samples:
    """One sample; its stack is still addresses, the tracer turns them into names and adds equal ones up."""
    _, _, pid, tid, begin, period, *frames = w
    return Samples(begin, pid, tid, period, 1, tuple(str(frame) for frame in frames if frame))


def _vcpu_span(w: tuple[int, ...]) -> VcpuSpan:
    _, since, until, pid, tid, outside, longest, gaps, lock = w
    return VcpuSpan(since, until, pid, tid, outside, longest, gaps, _signed(lock))


def _endpoint(family: int, words: tuple[int, ...], port: int) -> str:
    """`ADDR:PORT`; IPv4-mapped IPv6 is written as IPv4, so that both ends of a connection agree."""
    raw = struct.pack("=QQ", *words)
    if family == _AF_INET:
        return f"{ipaddress.IPv4Address(raw[:4])}:{port}"
    if family == _AF_INET6:
        v6 = ipaddress.IPv6Address(raw)
        return f"{v6.ipv4_mapped}:{port}" if v6.ipv4_mapped else f"[{v6}]:{port}"
    return ""


def _socket(w: tuple[int, ...]) -> Socket:
    family = w[5]
    local, remote = _endpoint(family, w[6:8], w[10]), _endpoint(family, w[8:10], w[11])
    return Socket(w[1], w[2], _signed(w[3]), w[4], family, local, remote, w[12])


_DECODERS: dict[type, Callable[[tuple[int, ...]], AnyEvent]] = {
    Ioctl: _ioctl,
    VcpuEnter: _vcpu_enter,
    VcpuExit: _vcpu_exit,
    Kick: _kick,
    Transfer: _transfer,
    Socket: _socket,
    OffCpu: _off_cpu,
    Segment: _segment,
    Samples: _sample,
    VcpuSpan: _vcpu_span,
    Retransmit: _retransmit,
}
_DECODER_OF = {kind.record.number: _DECODERS[kind.event] for kind in KINDS if kind.record}


def decode(record: bytes) -> AnyEvent:
    """One ring buffer record as an event; KeyError for a kind this version does not know (a bug)."""
    words = struct.unpack(f"={len(record) // 8}Q", record)
    return _DECODER_OF[words[0]](words)


IN_VAIN = 1000
"""Calls in a row that moved nothing, and are worth telling of."""
_RUN_WORDS = 13
_WAYS = ((0, 0), (1, 0), (0, 1))
"""(direction, hidden) of the open runs."""
_RUN_AT = THREAD_WORDS - len(_WAYS) * _RUN_WORDS
"""`struct thread_state` ends with its open `struct transfer_run`."""


def vcpu_state(at_ns: int, tid: int, thread: tuple[int, ...]) -> VcpuState | None:
    """The vCPU account in a `struct thread_state`, None if the thread never touched KVM_RUN."""
    fd, enter, leave, ret, runs, in_ns, out_ns, max_gap = thread[11:19]
    if not enter and not leave:
        return None
    return VcpuState(at_ns, thread[0], tid, fd, enter, leave, _signed(ret), runs, in_ns, out_ns, max_gap)


def open_runs(tid: int, thread: tuple[int, ...], streams: dict[int, tuple[int, ...]]) -> list[Transfer]:
    """The runs of calls in a `struct thread_state` that were still being folded.

    `streams` has the bytes sent and received on each socket before them, by socket inode.
    """
    found = []
    for way, (direction, hidden) in enumerate(_WAYS):
        at = _RUN_AT + way * _RUN_WORDS
        begin, end, fd, _file, socket, calls, size, in_call, longest, failed, _, *off = thread[at : at + _RUN_WORDS]
        if calls or failed >= IN_VAIN:
            before = streams.get(socket, (0, 0))[direction]
            waits = (-1, -1) if hidden else off
            numbers = (calls, size, in_call, longest, failed, before, *waits, hidden)
            if not calls:  # what is left there is the last run's, which was told
                numbers = (0, 0, 0, 0, failed, before, -1, -1, hidden)
            found.append(Transfer(begin, end, thread[0], tid, _signed(fd), direction, socket, *numbers))
    return found
