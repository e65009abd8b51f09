# SPDX-License-Identifier: Apache-2.0
"""What a process has the kernel read and write by itself, by io_uring and io_submit(2), as the tracer sees it.

The witness is the process that asks: the kernel tells it the bytes of each request, and it reads the clock around them.
"""

from __future__ import annotations

import ast
import ctypes
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.linux import descriptors
from ebpf_mig.probes.tiers import AUTO, TRACEPOINT
from ebpf_mig.probes.tracer import Tracer
from ebpf_mig.recording.events import FILE, RECEIVE, SEND, AnyEvent, Call, FileCall, Socket, Transfer
from tests.companion import Companion
from tests.conftest import RINGS, requires
from tests.loop_device import loop_device
from tests.queued import POLLED

MS = 1_000_000
pytestmark = requires("root", "bcc", "kernel BTF")
rings = requires(RINGS)
ASKED = """
import os, socket, sys, time
from tests.queued import *
room = ctypes.create_string_buffer(b"x" * 8192, 8192)
for line in sys.stdin:
    out = None
    exec(line)
    print(repr(out), flush=True)
"""
"""Does what it is told, line by line."""


class Asked:
    """The process, and what it has open."""

    def __init__(self, process: Companion[str], directory: Path) -> None:
        self.process, self._directory = process, directory

    def __call__(self, line: str) -> Any:
        """Runs a line there, and returns what it left in `out`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        return ast.literal_eval(self.process.stdout.readline())

    def opens(self, name: str, path: Path | None = None) -> int:
        """The key of a new file, or one at `path`, of which it has the descriptor in the variable `name`."""
        fd = self(f"out = {name} = os.open({str(path or self._directory / name)!r}, os.O_RDWR | os.O_CREAT)")
        key = descriptors.carrier_key(self.process.pid, fd)
        assert key is not None
        return key


@contextmanager
def asked(directory: Path) -> Iterator[Asked]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", ASKED]
    with Companion(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        yield Asked(process, directory)
        assert process.stdin is not None
        process.stdin.close()


@contextmanager
def traced(do: Asked, tier: str = AUTO, *, beside_a_vcpu: bool = False) -> Iterator[list[AnyEvent]]:
    """The events of the process, in a list that is filled at the end. Beside a vCPU that runs, calls are coalesced."""
    events: list[AnyEvent] = []
    with Tracer([do.process.pid], tier=tier) as tracer:
        tracer.arm()
        assert tracer.attached["aio-sync"] == TRACEPOINT
        if beside_a_vcpu:
            table = tracer._program.table("processes")
            table[ctypes.c_uint32(do.process.pid)] = table.Leaf(running=1)
        yield events
        events += tracer.poll(100) + tracer.finish()
        assert tracer.losses()[0] == {}


def queued(events: Iterable[AnyEvent]) -> list[Transfer]:
    return [e for e in events if isinstance(e, Transfer) and not e.tid]


def moved(events: Iterable[AnyEvent]) -> Counter[tuple[int, int]]:
    """Bytes by carrier and direction, also of calls."""
    found: Counter[tuple[int, int]] = Counter()
    for event in events:
        if isinstance(event, Transfer):
            found[event.socket, event.direction] += event.bytes
    return found


@pytest.mark.everywhere("tiers")
@pytest.mark.parametrize(
    "flags", [pytest.param(0, id="entered"), pytest.param(POLLED, id="polled", marks=pytest.mark.long)]
)
@rings
def test_what_a_ring_reads_and_writes_on_files(flags: int, tmp_path: Path) -> None:
    """By the thread that enters the ring, a worker of the kernel, or its thread that polls; short, failed or fixed."""
    with asked(tmp_path) as do:
        one, two = do.opens("one"), do.opens("two")
        do(f"ring = Ring(flags={flags}); ring.register([two], room)")
        with traced(do) as events:
            written = do("out = ring.run(Request(WRITE, one, room), Request(WRITEV, one, vectors(room, room), 8192))")
            fixed = do("out = ring.run(Request(WRITE_FIXED, 0, room, flags=FIXED_FILE))")
            worked = do("out = ring.run(*[Request(WRITE, two, room, 8192 * n, flags=ASYNC) for n in range(9)])")
            read = do("out = ring.run(Request(READ, one, room), Request(READ, one, room, 20480))")
            vectored = do(
                "out = ring.run(Request(READV, two, vectors(room)), Request(READ_FIXED, 0, room, 0, FIXED_FILE))"
            )
            do("a, b = os.pipe(); left, right = socket.socketpair()")
            failed = do("out = ring.run(Request(WRITE, 99, room), Request(READ, one, room, 1 << 30))")
            others = do(
                "out = ring.run(Request(WRITE, b, room), Request(FSYNC, one), Request(WRITE, one, room, 0, length=99))"
            )
    assert (written, fixed, worked) == ([8192, 16384], [8192], [8192] * 9)
    assert (read, vectored, failed, others) == ([8192, 4096], [8192, 8192], [-9, 0], [8192, 0, 99])
    mine = [e for e in queued(events) if e.socket in (one, two)]
    assert mine == queued(events), "a pipe's bytes are not seen here"
    expected = {(one, SEND): 24576, (one, RECEIVE): 12288, (two, SEND): 81920, (two, RECEIVE): 16384}
    assert moved(mine) == expected
    assert {(e.calls, e.off_cpu_ns, e.hidden, e.fd) for e in mine} == {(1, -1, 0, -1)}, "each is an event of its own"
    assert {e.family for e in events if isinstance(e, Socket) and e.socket in (one, two)} == {FILE}
    for way in expected:
        ordered = [e for e in mine if (e.socket, e.direction) == way]
        assert [e.position for e in ordered] == [sum(e.bytes for e in ordered[:n]) for n in range(len(ordered))]


@rings
def test_a_request_lasts_from_its_submission_to_its_completion(tmp_path: Path) -> None:
    """One that waits for another one, which takes 0.2 s."""
    with asked(tmp_path) as do:
        key = do.opens("one")
        do("ring = Ring()")
        with traced(do) as events:
            do("began = time.monotonic_ns()")
            do("ring.submit(pause(0.2), Request(WRITE, one, room))")
            do("there = time.monotonic_ns()")
            began, there, done = do("out = (began, there, ring.results(2) and time.monotonic_ns())")
            do("ring.run(pause(0.2), Request(FSYNC, one, special=DATASYNC), Request(FSYNC, one))")
    (write,) = queued(events)
    assert began <= write.begin_ns <= there and write.end_ns <= done
    assert 200 * MS <= write.end_ns - write.begin_ns == write.in_call_ns == write.max_call_ns
    syncs = sorted(
        [e for e in events if isinstance(e, Call) and e.call != FileCall.IO_URING_ENTER], key=lambda e: -e.call
    )
    assert [(e.call, e.file, e.ret, e.tid) for e in syncs] == [
        (FileCall.FDATASYNC, key, 0, 0),
        (FileCall.FSYNC, key, 0, 0),
    ]
    assert syncs[0].end_ns - syncs[0].begin_ns >= 200 * MS > syncs[1].end_ns - syncs[1].begin_ns


@pytest.mark.long
@rings
def test_requests_that_overlap_are_one_batch_beside_a_vcpu_that_runs(tmp_path: Path) -> None:
    """Its time is that in which any of them was under way, not the sum."""
    with asked(tmp_path) as do:
        do.opens("one")
        do("ring = Ring()")
        with traced(do, beside_a_vcpu=True) as events:
            began = do("out = time.monotonic_ns()")
            do("ring.submit(pause(0.04), Request(WRITE, one, room), pause(0.05), Request(WRITE, one, room))")
            do("ring.results(4)")
            ended = do("out = time.monotonic_ns()")
    (batch,) = queued(events)
    assert (batch.calls, batch.bytes) == (2, 16384)
    assert began <= batch.begin_ns and batch.end_ns <= ended
    assert 50 * MS <= batch.max_call_ns <= batch.in_call_ns <= batch.end_ns - batch.begin_ns


@pytest.mark.long
@rings
def test_requests_that_are_under_way_when_tracing_begins_or_ends_do_not_count(tmp_path: Path) -> None:
    with asked(tmp_path) as do:
        do.opens("one")
        do("ring = Ring(); ring.submit(pause(3), Request(WRITE, one, room))")
        with traced(do) as events:
            do("ring.results(2)")
            do("ring.run(Request(READ, one, room))")
            do("ring.submit(pause(3), Request(WRITE, one, room))")
    assert [(e.direction, e.bytes) for e in queued(events)] == [(RECEIVE, 8192)]


@pytest.mark.parametrize("tier", [AUTO, pytest.param(TRACEPOINT, marks=pytest.mark.long)])
@rings
def test_a_send_by_a_ring_counts_once(tier: str, tmp_path: Path) -> None:
    """It is made inside io_uring_enter(2), which is a traced call, too, or by a worker."""
    with asked(tmp_path) as do:
        fd = do("left, right = socket.socketpair(); out = left.fileno()")
        key = descriptors.carrier_key(do.process.pid, fd)
        do("ring = Ring()")
        with traced(do, tier) as events:
            asks = "Request(SEND, left.fileno(), room), Request(WRITE, left.fileno(), room, flags=ASYNC)"
            assert do(f"out = ring.run({asks})") == [8192, 8192]
    sends = [e for e in events if isinstance(e, Transfer) and e.socket == key]
    if tier == TRACEPOINT and not any(e.hidden for e in sends):
        pytest.skip("missing feature: sock:sock_send_length (Linux 6.3)")
    assert moved(sends) == {(key, SEND): 16384}


@pytest.mark.parametrize("tier", [AUTO, pytest.param(TRACEPOINT, marks=pytest.mark.long)])
def test_what_io_submit_reads_and_writes(tier: str, tmp_path: Path) -> None:
    """Its completion is not seen. What it sends on a socket is a hidden send."""
    with asked(tmp_path) as do:
        one, two = do.opens("one"), do.opens("two")
        fd = do("left, right = socket.socketpair(); out = left.fileno()")
        key = descriptors.carrier_key(do.process.pid, fd)
        with traced(do, tier) as events:
            began = do("out = time.monotonic_ns()")
            asks = "(PWRITE, one, room, 0), (PWRITEV, one, vectors(room, room), 8192), (PREAD, one, room, 0)"
            assert do(f"out = io_submit([{asks}])") == [8192, 16384, 8192]
            assert do("out = io_submit([(PWRITE, two, room, 0)] * 9)") == [8192] * 9
            assert do("out = io_submit([(PREADV, two, vectors(room), 0)])") == [8192]
            assert do("out = io_submit([(PWRITE, left.fileno(), room, 0)])") == [8192]
            ended = do("out = time.monotonic_ns()")
    expected = {(one, SEND): 24576, (one, RECEIVE): 8192, (two, SEND): 73728, (two, RECEIVE): 8192}
    assert moved(queued(events)) == expected
    assert all(began <= e.begin_ns <= e.end_ns <= ended and e.calls == 1 for e in queued(events))
    hidden = [e for e in events if isinstance(e, Transfer) and e.hidden]
    assert not hidden or moved(hidden) == {(key, SEND): 8192}


@pytest.mark.everywhere("tiers")
def test_a_sync_that_io_submit_queues_lasts_until_it_is_done(tmp_path: Path) -> None:
    """The process waits for its end. What it writes, and fsync(2), are no such requests."""
    with asked(tmp_path) as do:
        one = do.opens("one")
        with traced(do) as events:
            took = []
            for call in ("AIO_FDSYNC", "AIO_FSYNC"):
                do("out = os.pwrite(one, bytes(1 << 26), 0)")
                began, results, ended = do(
                    f"out = [time.monotonic_ns(), io_submit([({call}, one, None, 0)]), time.monotonic_ns()]"
                )
                assert results == [0]
                took.append((began, ended))
            assert do("out = io_submit([(PWRITE, one, room, 0)])") == [8192], "no sync"
            do("os.fsync(one)")
    syncs = [e for e in events if isinstance(e, Call) and not e.tid]
    assert [(e.call, e.file, e.ret) for e in syncs] == [(FileCall.FDATASYNC, one, 0), (FileCall.FSYNC, one, 0)]
    for sync, (began, ended) in zip(syncs, took, strict=True):
        assert began <= sync.begin_ns < sync.end_ns
        assert abs(sync.end_ns - ended) + sync.begin_ns - began < max(20 * MS, (ended - began) // 4), (began, ended)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A loop device."""
    with loop_device(tmp_path / "image", 1 << 20) as made:
        yield made


@pytest.mark.long
@rings
def test_a_block_device_is_one_carrier_by_whatever_node_it_is_opened(device: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    os.mknod(node, 0o600 | 0o060000, device.stat().st_rdev)
    with asked(tmp_path) as do:
        key = do.opens("one", device)
        assert do.opens("two", node) == key != do.opens("image")
        with traced(do, TRACEPOINT) as events:
            assert do("out = Ring().run(Request(WRITE, one, room))") == [8192]
            assert do("out = os.pwrite(two, room, 8192)") == 8192
            assert do("out = len(os.pread(one, 16384, 0))") == 16384
            assert do("out = os.fsync(two)") is None
    assert moved(e for e in events if isinstance(e, Transfer) and e.socket == key) == {
        (key, SEND): 16384,
        (key, RECEIVE): 16384,
    }
    assert [e.family for e in events if isinstance(e, Socket) and e.socket == key] == [FILE]
    assert [e.file for e in events if isinstance(e, Call) and e.call == FileCall.FSYNC] == [key]
