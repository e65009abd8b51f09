# SPDX-License-Identifier: Apache-2.0
"""Records and the kernel half's accounts as events: each field by its name, signed where C is."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import pytest

from ebpf_mig.probes import leaf_types
from ebpf_mig.probes.records import MANY_FAILED, NO_STACK, UNTRACKED, decode, open_batches, stream_key, vcpu_state
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.events import RECEIVE, SEND
from ebpf_mig.recording.kinds import KINDS, Record
from ebpf_mig.recording.layout import Layout

RECORDS = {kind.event: kind.record for kind in KINDS if kind.record}
PLAIN = [event for event in RECORDS if event not in (ev.Socket, ev.OffCpu, ev.Samples, ev.UserStack)]


def record_of(record: Record, values: dict[str, int | list[int]]) -> bytes:
    """A record as C lays it out, without our reader: all fields that are not given are 0."""
    words: list[bytes] = []
    for field in record.layout.fields:
        value = record.number if field.name == "kind" else values.pop(field.name, 0)
        parts = (value if isinstance(value, list) else [value]) if field.length is None or value else [0] * field.words
        words += [struct.pack("q" if field.signed else "Q", part) for part in parts]
    assert not values, "no such fields"
    return b"".join(words)


@pytest.mark.parametrize("event", PLAIN, ids=lambda event: event.__name__)
def test_each_field_of_a_record_is_that_of_the_event(event: type[ev.Event]) -> None:
    record = RECORDS[event]
    names = [field.name for field in record.layout.fields if field.name != "kind"]
    signed = {field.name for field in record.layout.fields if field.signed}
    values = {name: -at if name in signed else at for at, name in enumerate(names, 100)}
    made_by_joining = {"remote"}
    assert set(names) == set(event.__struct_fields__) - made_by_joining
    decoded = decode(record_of(record, dict(values)))
    assert decoded == event(**values)
    assert type(decoded) is event


def test_a_socket_s_ends_are_addresses() -> None:
    loopback = int.from_bytes(bytes([127, 0, 0, 1]) + bytes(4), "little")
    values = {"at_ns": 9, "pid": 7, "fd": -1, "socket": 80, "family": 2, "local": [loopback, 0], "local_port": 4444}
    decoded = decode(record_of(RECORDS[ev.Socket], {**values, "remote": [loopback, 0], "remote_port": 5555, "peer": 3}))
    assert decoded == ev.Socket(9, 7, -1, 80, 2, "127.0.0.1:4444", "127.0.0.1:5555", 3)


ANY = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("local", "remote", "ends"),
    [
        ((40, 0, 9999, ANY), (40, 0, 5000, 1), ("1:9999", "1:5000")),
        ((40, 0, 5000, 1), (40, 0, 9999, 1), ("1:5000", "1:9999")),
        ((40, 0, 9999, ANY), (40, 0, 5000, 2), ("*:9999", "2:5000")),
        ((40, 0, 4294967294, 3), (40, 0, 5000, 2), ("3:4294967294", "2:5000")),
        ((0, 0, 9999, ANY), (40, 0, 5000, 1), ("", "")),
    ],
)
def test_a_vsock_s_ends_are_cids(local: tuple[int, ...], remote: tuple[int, ...], ends: tuple[str, str]) -> None:
    """struct sockaddr_vm: family, reserved, port, CID. Without the family, something else is at that place."""
    words = {"local": local, "remote": remote}
    values: dict[str, Any] = {"at_ns": 9, "pid": 7, "fd": -1, "socket": 80, "family": 40}
    values |= {name: list(struct.unpack("=QQ", struct.pack("=HHIIHH", *end, 0, 0))) for name, end in words.items()}
    assert decode(record_of(RECORDS[ev.Socket], values)) == ev.Socket(9, 7, -1, 80, 40, *ends, 0)


def test_a_wait_without_a_stack() -> None:
    values = {"begin_ns": 5, "end_ns": 9, "pid": 7, "tid": 8, "cpu": 3, "next_tid": 0, "previous_tid": 44}
    record = RECORDS[ev.OffCpu]
    assert decode(record_of(record, {**values, "stack_id": NO_STACK, "preempted": 1, "rt_throttled": 1})) == ev.OffCpu(
        5, 9, 7, 8, (), preempted=True, cpu=3, next_tid=0, previous_tid=44, rt_throttled=True
    )
    assert decode(record_of(record, {**values, "stack_id": 12})) == ev.OffCpu(
        5, 9, 7, 8, ("12",), False, 3, 0, 44, False
    )


def test_a_sample_s_frames() -> None:
    frames = [0xFFFFFFFF81000000, 0xFFFFFFFF81000010, *[0] * 22]
    values = {"at_ns": 99, "pid": 7, "tid": 8, "begin_ns": 50, "period_ns": 100, "frames": frames}
    decoded = decode(record_of(RECORDS[ev.Samples], dict(values)))
    assert decoded == ev.Samples(50, 7, 8, 100, 1, tuple(str(frame) for frame in frames[:2]))


def test_a_record_of_another_size_is_refused() -> None:
    record = record_of(RECORDS[ev.Kick], {})
    with pytest.raises(struct.error):
        decode(record + bytes(8))


@pytest.mark.parametrize("declaration", ["u32 kind", "kind", "u64 kind; s64", "u64 kind, frames[n]", "u64 a,, b"])
def test_what_declares_no_layout(declaration: str) -> None:
    with pytest.raises(ValueError, match="struct x: "):
        _ = Layout("x", declaration).fields


class Batch(ctypes.Structure):
    """The type that bcc makes of `struct transfer_batch`, with fewer members and in another order."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("calls", "bytes", "socket", "failed", "in_call_ns", "max_call_ns")),
        *((name, ctypes.c_uint64) for name in ("begin_ns", "end_ns", "off_cpu_ns", "off_before_ns", "descriptors")),
        ("fd", ctypes.c_int64),
    ]


class Thread(ctypes.Structure):
    """The type that bcc makes of `struct thread_state`."""

    _fields_ = [
        ("batch", Batch * 3),
        ("run_ret", ctypes.c_int64),
        *((name, ctypes.c_uint64) for name in ("tgid", "vcpu_fd", "run_enter_ns", "run_exit_ns", "runs")),
        *((name, ctypes.c_uint64) for name in ("in_ns", "out_ns", "max_gap_ns", "counted")),
    ]


class Stream(ctypes.Structure):
    """The type that bcc makes of `struct stream`."""

    _fields_ = [("bytes", ctypes.c_uint64 * 2)]


STREAMS = {stream_key(7, 80): Stream((500, 1000))}


def thread(which: int, **values: int) -> Any:
    """Process 7's thread with one batch that is open; through words and back, as a process without bcc has it."""
    state = leaf_types.describe(Thread).ctype()(tgid=7)
    batch = {"begin_ns": 100, "end_ns": 200, "fd": -1, "socket": 80, "bytes": 4096, "in_call_ns": 50, "max_call_ns": 40}
    for name, value in {**batch, "off_cpu_ns": 30, "off_before_ns": 20, "descriptors": 4, **values}.items():
        setattr(state.batch[which], name, value)
    return state


@pytest.mark.parametrize(("which", "direction", "position"), [(SEND, 0, 500), (RECEIVE, 1, 1000), (UNTRACKED, 0, 500)])
def test_a_batch_that_goes_on(which: int, direction: int, position: int) -> None:
    (transfer,) = open_batches(9, thread(which, calls=3, failed=1), STREAMS)
    hidden = which == UNTRACKED
    waits = (-1, -1) if hidden else (30, 20)
    counts = (3, 4096, 50, 40, 1, position, *waits, int(hidden), 0 if hidden else 4)
    assert transfer == ev.Transfer(100, 200, 7, 9, -1, direction, 80, *counts)


def test_calls_that_moved_nothing_are_an_event_if_there_are_many() -> None:
    assert open_batches(9, thread(RECEIVE, calls=0, failed=MANY_FAILED - 1), {}) == []
    (transfer,) = open_batches(9, thread(RECEIVE, calls=0, failed=MANY_FAILED), STREAMS)
    assert transfer == ev.Transfer(100, 200, 7, 9, -1, 1, 80, 0, 0, 0, 0, MANY_FAILED, 1000)


def test_a_vcpu_s_account() -> None:
    assert vcpu_state(5, 9, Thread(tgid=7)) is None
    account = {"runs": 3, "in_ns": 70, "out_ns": 20, "max_gap_ns": 15}
    state = Thread(tgid=7, vcpu_fd=12, run_enter_ns=300, run_exit_ns=200, run_ret=-4, **account)
    assert vcpu_state(500, 9, state) == ev.VcpuState(500, 7, 9, 12, 300, 200, -4, **account)
