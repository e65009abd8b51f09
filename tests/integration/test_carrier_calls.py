# SPDX-License-Identifier: Apache-2.0
"""Every call that can move a migration's bytes, on each kind of carrier, as each tier sees it.

The witness is the process that makes the calls: it prints the bytes of each, by carrier and direction.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ebpf_mig.linux import descriptors, procfs
from ebpf_mig.probes.tracer import Tracer
from ebpf_mig.recording.events import FILE, PIPE, RECEIVE, SEND, Call, FileCall, Socket, Transfer
from tests.companion import Companion
from tests.conftest import FEATURES, requires

pytestmark = requires("root", "bcc", "kernel BTF")

MOVER = """
import ctypes, json, mmap, os, socket, sys
pipe_read, pipe_write = os.pipe()
left, right = socket.socketpair()
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.truncate(file, 1 << 16)
left_fd, k = left.fileno(), b"x" * 1024
class Vector(ctypes.Structure):  # here, since Python 3.14 reads a module's file for it
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))
print("ready", flush=True)
sys.stdin.readline()
moved = []
def moves(what, way, size, *, plain=False, spliced=False):
    moved.append((what, way, size, plain, spliced))
moves("pipe", 0, os.write(pipe_write, k * 3))
moves("pipe", 1, len(os.read(pipe_read, 4096)))
moves("pipe", 0, os.writev(pipe_write, [k, k]))
moves("pipe", 1, os.readv(pipe_read, [bytearray(4096)]))
moves("file", 0, os.write(file, k * 5), plain=True)
moves("file", 0, os.pwrite(file, k * 6, 0))
moves("file", 1, len(os.read(file, 7 << 10)), plain=True)
moves("file", 1, len(os.pread(file, 8 << 10, 0)))
moves("file", 0, os.writev(file, [k, k]))
moves("file", 0, os.pwritev(file, [k] * 3, 0))
moves("file", 1, os.readv(file, [bytearray(9 << 10)]))
moves("file", 1, os.preadv(file, [bytearray(10 << 10)], 0))
room, libc = ctypes.create_string_buffer(11 << 10), ctypes.CDLL(None)
vector = ctypes.byref(Vector(ctypes.addressof(room), 11 << 10))
moves("file", 0, libc.pwritev(file, vector, 1, ctypes.c_long(0)))  # Python's is pwritev2
moves("file", 1, libc.preadv(file, vector, 1, ctypes.c_long(0)))
os.write(file, b"a line of a log")
mapped = mmap.mmap(file, 1 << 16)
os.fsync(file)
os.fdatasync(file)
libc.sync_file_range(file, ctypes.c_long(0), ctypes.c_long(1 << 16), 0)
mapped.flush()
place = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(mapped)))
libc.mincore(place, ctypes.c_size_t(1 << 16), room)
libc.syscall(426, -1, 0, 0, 0, None, 0)  # io_uring_enter
event = os.eventfd(0)
os.write(event, (1).to_bytes(8, "little"))
os.read(event, 8)
moves("left", 0, left.send(k * 2))
moves("right", 1, len(right.recv(4096)))
moves("left", 0, os.write(left_fd, k))
moves("right", 1, len(os.read(right.fileno(), 4096)))
moves("pipe", 0, os.write(pipe_write, k * 4))
moves("left", 0, os.splice(pipe_read, left_fd, 4096), spliced=True)
moves("right", 1, len(right.recv(4096)))
moves("right", 0, right.send(k * 3))
moves("left", 1, os.splice(left_fd, pipe_write, 4096), spliced=True)
moves("pipe", 1, len(os.read(pipe_read, 4096)))
moves("left", 0, os.sendfile(left_fd, file, 0, 2048), spliced=True)
moves("right", 1, len(right.recv(4096)))
print(json.dumps({"fds": {"pipe": pipe_read, "file": file, "left": left_fd, "right": right.fileno()}, "moved": moved}),
      flush=True)
sys.stdin.readline()
"""


def available(tier: str) -> str:
    """Skips a tier that this kernel lacks."""
    needs = {"kprobe": "kprobes", "fentry": "fentry on every function"}
    if tier in needs and not FEATURES[needs[tier]]():
        pytest.skip(f"missing feature: {needs[tier]}")
    return tier


@pytest.mark.everywhere("tiers")
@pytest.mark.parametrize("tier", ["tracepoint", "kprobe", "fentry"])
def test_every_call_on_every_carrier(tier: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MOVER, str(tmp_path / "file")]
    with Companion(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        with Tracer([process.pid], tier=available(tier)) as tracer:
            tracer.arm()
            process.stdin.write("\n")
            process.stdin.flush()
            select.select([process.stdout], [], [])  # a sleep in read(2) would take a return probe from the process
            said = json.loads(process.stdout.readline())
            events = tracer.poll(100) + tracer.finish()
            assert (tracer.losses()[0], tracer.attached["pipe"], tracer.attached["file"]) == ({}, tier, tier)
        keys = {name: descriptors.carrier_key(process.pid, fd) for name, fd in said["fds"].items()}
        process.stdin.close()
    expected: Counter[tuple[str, int]] = Counter()
    for what, way, size, plain, spliced in said["moved"]:
        if tier == "tracepoint" or not (spliced or (plain and tier == "kprobe")):
            expected[what, way] += size
    names = {key: name for name, key in keys.items()}
    seen: Counter[tuple[str, int]] = Counter()
    for event in events:
        if isinstance(event, Transfer) and event.socket in names and event.calls:
            seen[names[event.socket], event.direction] += event.bytes
    if tier != "tracepoint":  # what is spliced may pass the socket functions or not, as kernels differ
        spliced = {("left", SEND), ("left", RECEIVE)}
        expected = Counter({at: size for at, size in expected.items() if at not in spliced})
        seen = Counter({at: size for at, size in seen.items() if at not in spliced})
    assert seen == expected
    calls = [(e.call, e.file, e.bytes, e.ret) for e in events if isinstance(e, Call) and e.file in (0, keys["file"])]
    size, file = 1 << 16, keys["file"]
    made = [
        (FileCall.MMAP, file, size, 0), (FileCall.FSYNC, file, 0, 0), (FileCall.FDATASYNC, file, 0, 0),
        (FileCall.SYNC_FILE_RANGE, file, 0, 0), (FileCall.MSYNC, 0, size, 0),
        (FileCall.MINCORE, 0, size, 0), (FileCall.IO_URING_ENTER, 0, 0, -errno.EBADF),
    ]  # fmt: skip
    assert calls == ({"kprobe": made[1:3], "fentry": made[:-1]}.get(tier, made))
    families = {names[e.socket]: e.family for e in events if isinstance(e, Socket) and e.socket in names}
    assert families == {"pipe": PIPE, "file": FILE, "left": 1, "right": 1}
    others = {e.socket for e in events if isinstance(e, Socket)} - names.keys()
    assert len(others) <= 2, "its standard input and output; the eventfd is none"


WRITER = """
import os, sys
print("ready", flush=True)
for path in map(str.strip, sys.stdin):
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(file, bytes(5000))
    os.pwrite(file, bytes(3000), 0)
    os.close(file)
    print("done", flush=True)
"""


@pytest.mark.everywhere("tiers")
def test_what_every_process_calls_is_hooked_once_one_may_need_it(tmp_path: Path) -> None:
    """Of the first process, only pwrite(2) is seen until the second one is traced, too."""
    command = [sys.executable, "-c", WRITER]
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(Companion(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(2)
        )
        for process in (first, second):
            assert process.stdin is not None and process.stdout is not None
            process.stdout.readline()
        tracer = stack.enter_context(Tracer(tier=available("fentry"), moves_plainly=lambda pid: pid == second.pid))
        seen: list[dict[int, int]] = []

        def write() -> None:
            for process in (first, second):
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(f"{tmp_path / str(process.pid)}\n")
                process.stdin.flush()
                process.stdout.readline()
            total: Counter[int] = Counter()
            for event in tracer.poll(100):
                if isinstance(event, Transfer) and event.direction == SEND and event.socket >> 61:
                    total[event.pid] += event.bytes
            seen.append(dict(total))

        for _ in range(2):
            tracer.arm()
            for added in (first, second):
                tracer.add(added.pid)
                write()
            for removed in (first, second):
                tracer.remove(removed.pid)
            tracer.disarm()
        alone, both = {first.pid: 3000}, {first.pid: 8000, second.pid: 8000}
        assert seen == [alone, both, alone, both]


SLEEPERS = """
import os, sys, threading
for _ in range(int(sys.argv[1])):
    threading.Thread(target=os.read, args=(os.pipe()[0], 1), daemon=True).start()
sys.stdin.readline()
"""
READER = """
import os, select, sys
read_end, write_end = os.pipe()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(5):
    os.write(write_end, b"x" * 1000)
    os.read(read_end, 4096)
print("done", flush=True)
select.select([sys.stdin], [], [])  # not in a call that the tracer sees
"""


@pytest.mark.everywhere("tiers")
def test_returns_that_the_kernel_has_no_probe_for_are_counted() -> None:
    """Sleeping reads of another process use up the return probes of reads; then each read of ours lacks its return."""
    sleepers = 2 * (os.cpu_count() or 1) + 20  # the kernel has 10, or twice the number of CPUs; before 6.0 it may be 1
    with Companion([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        with Tracer([process.pid], tier=available("kprobe")) as tracer:
            tracer.arm()
            command = [sys.executable, "-c", SLEEPERS, str(sleepers)]
            with Companion(command, stdin=subprocess.PIPE, text=True) as other:
                while len([tid for tid in procfs.threads_of(other.pid) if asleep_in_read(other.pid, tid)]) <= sleepers:
                    time.sleep(0.1)
                process.stdin.write("\n")
                process.stdin.flush()
                select.select([process.stdout], [], [])
                process.stdout.readline()
                time.sleep(0.5)
                events = tracer.poll(100) + tracer.finish()
                other.kill()
            assert tracer.losses()[0] == {"missed-return": 5}
        process.kill()
    moved = Counter[int]()
    for event in events:
        if isinstance(event, Transfer):
            moved[event.direction] += event.bytes
    assert moved == {SEND: 5 * 1000 + len("done\n")}


def asleep_in_read(pid: int, tid: int) -> bool:
    number = {"x86_64": 0, "aarch64": 63}[os.uname().machine]
    return procfs.text(pid, "task", tid, "syscall").startswith(f"{number} ")


SENDER = """
import socket, sys, time
pairs = [socket.socketpair(), socket.socketpair()]
print("ready", flush=True)
while True:
    for near, far in pairs:
        for _ in range(5):
            near.send(b"x" * 1000)
            far.recv(4096)
        time.sleep(0.0002)
"""
"""A batch ends with each change of the socket."""


def test_batches_that_end_while_they_are_read_leave_no_hole() -> None:
    with Companion([sys.executable, "-c", SENDER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with Tracer([process.pid]) as tracer:
            tracer.arm()
            known: dict[int, int] = {}
            until = time.monotonic() + 3
            while time.monotonic() < until:
                seen, sent = tracer.poll(0), dict(known)
                for held, events in ((False, seen), (True, tracer.pending(process.pid))):
                    for event in events:
                        if isinstance(event, Transfer) and event.direction == SEND and event.pid == process.pid:
                            assert event.position == sent.get(event.socket, 0), (held, event)
                            sent[event.socket] = event.position + event.bytes
                    known = known if held else dict(sent)
            assert tracer.losses()[0] == {}
        process.kill()
    assert len(known) == 2


BLOCKED = """
import socket, sys, threading, time
near, far = socket.socketpair()
def send():
    near.sendall(b"x" * 500_000)
    for _ in range(3):
        near.sendall(b"y" * 1000)
threading.Thread(target=send).start()
time.sleep(0.2)
print(near.fileno(), flush=True)
sys.stdin.readline()
left = 503_000
while left:
    left -= len(far.recv(1 << 16))
print("done", flush=True)
sys.stdin.readline()
"""
"""A send that waits for room when tracing begins, and more of the same thread later."""


def test_a_send_that_was_under_way_comes_before_the_next() -> None:
    with Companion(
        [sys.executable, "-c", BLOCKED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        key = descriptors.carrier_key(process.pid, int(process.stdout.readline()))
        with Tracer([process.pid], tier="tracepoint") as tracer:
            tracer.arm()
            if tracer.attached.get("hidden-sends") != "tracepoint":
                pytest.skip("missing feature: sock:sock_send_length (Linux 6.3)")
            table = tracer._program.table("processes")  # while a vCPU runs, calls are coalesced
            table[ctypes.c_uint32(process.pid)] = table.Leaf(running=1)
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
            events = tracer.poll(100) + tracer.finish()
        process.stdin.close()
    sends = [e for e in events if isinstance(e, Transfer) and (e.socket, e.direction) == (key, SEND)]
    assert [(e.hidden, e.position, e.bytes) for e in sends] == [(1, 0, 500_000), (0, 500_000, 3000)]
