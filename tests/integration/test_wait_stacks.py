# SPDX-License-Identifier: Apache-2.0
"""The kernel stack of a wait is the same whether it is taken as the thread leaves the CPU or when it is back."""

from __future__ import annotations

import bisect
import contextlib
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest

from ebpf_mig.linux import btf
from ebpf_mig.probes import attach
from ebpf_mig.probes.hook_points import EXTRAS
from ebpf_mig.probes.loader import Program
from ebpf_mig.probes.macros import defines
from ebpf_mig.probes.plan import Plan
from ebpf_mig.probes.records import CONTRACT
from ebpf_mig.probes.run_statistics import BpfStatistics
from ebpf_mig.probes.tiers import Choice
from ebpf_mig.probes.tracer import Tracer
from ebpf_mig.recording.events import OffCpu
from ebpf_mig.recording.thresholds import LONG_WAIT_NS
from tests.companion import Companion
from tests.conftest import requires

pytestmark = requires("root", "bcc", "kernel BTF")
WHEN_BACK = "sched_exit_tp"
WAITS = """
import os, select, socket, threading, time
near, far = socket.socketpair()
read_end, write_end = os.pipe()
event = threading.Condition()
def receives():
    while True: far.recv(1)
def reads():
    while True: os.read(read_end, 1)
def polls():
    while True: select.poll().poll(1)
def sleeps():
    while True: time.sleep(0.001)
def waits():
    while True:
        with event: event.wait()
threads = [threading.Thread(target=t, daemon=True) for t in (receives, reads, polls, sleeps, waits)]
for thread in threads: thread.start()
print("ready", flush=True)
while True:
    near.send(b"x")
    os.write(write_end, b"x")
    with event: event.notify_all()
    time.sleep(0.002)
"""
CALLS = ("unix_stream_read_generic", "pipe_read", "do_sys_poll", "do_nanosleep", "futex_wait")
"""A function of each kind of wait, in the stacks of Linux 6.12 and later."""


@contextlib.contextmanager
def waiting() -> Iterator[int]:
    """The pid of a process whose threads wait in all these ways."""
    with Companion([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process.pid
        process.kill()


def tracer_of(pid: int, tracepoints: set[str]) -> Tracer:
    """A tracer of the tracepoint tier that has only these extra tracepoints."""
    program = Program(attach.FAMILY, defines([pid], tracepoints), CONTRACT)
    hooks = tuple(attach._hooks(Choice(), tracepoints))
    for hook in hooks:
        program.load_hook(hook)
    return Tracer([pid], Plan(hooks, program, attach._tiers(Choice(), tracepoints)))


def of_tids(waits: Sequence[OffCpu]) -> dict[int, set[tuple[str, ...]]]:
    """The stacks of each thread."""
    found: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for wait in waits:
        found[wait.tid].add(wait.stack)
    return found


def nearest(sorted_ns: Sequence[int], ns: int) -> int:
    """The element that is nearest to a time."""
    at = bisect.bisect(sorted_ns, ns)
    return min(sorted_ns[max(0, at - 1) : at + 1], key=lambda other: abs(other - ns))


def traced_twice(pid: int, seconds: float) -> tuple[list[OffCpu], list[OffCpu]]:
    """The same waits, recorded by programs that take the stack as a thread leaves, and when it is back."""
    here = btf.tracepoints(btf.VMLINUX, [name for extra in EXTRAS for name, _ in extra.all_hooks])
    if WHEN_BACK not in here:
        pytest.skip(f"this kernel has no {WHEN_BACK}")
    with counting(), tracer_of(pid, here - {WHEN_BACK}) as leaving, tracer_of(pid, here) as back:
        leaving.arm()
        back.arm()
        found: tuple[list[OffCpu], list[OffCpu]] = ([], [])
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for waits, tracer in zip(found, (leaving, back), strict=True):
                waits += [event for event in tracer.poll(10) if isinstance(event, OffCpu)]
        return found


@contextlib.contextmanager
def counting() -> Iterator[None]:
    statistics = BpfStatistics()
    yield
    statistics.close()


def test_the_stack_is_the_same_when_the_thread_is_back() -> None:
    with waiting() as pid:
        leaving, back = traced_twice(pid, 1.5)
    assert all(wait.end_ns - wait.begin_ns >= LONG_WAIT_NS for wait in back)
    before, after = of_tids(leaving), of_tids(back)
    assert len(before) >= len(CALLS) and before.keys() == after.keys()
    named = {function for stacks in after.values() for stack in stacks for function in stack}
    assert {call for call in CALLS if not any(call in name for name in named)} == set()
    for wait in back:
        assert wait.preempted or wait.stack, wait
    # The same wait has the same stack. Each program reads the clock itself, and the first one walks the stack between.
    # Recorded waits of a thread begin more than LONG_WAIT_NS apart, so the nearest begin is that of the same switch.
    known = {(wait.tid, wait.begin_ns): wait for wait in leaving}
    begins = {tid: sorted(begin for other, begin in known if other == tid) for tid in before}
    twins = [
        (known[wait.tid, begin], wait)
        for wait in back
        if abs((begin := nearest(begins[wait.tid], wait.begin_ns)) - wait.begin_ns) < LONG_WAIT_NS // 2
    ]
    assert len(twins) > len(back) // 2
    unlike = {
        (one.stack, one.preempted, other.stack, other.preempted)
        for one, other in twins
        # As a thread leaves, it is not known yet whether the wait will have a record; then it may have no stack.
        if one.preempted != other.preempted or (one.stack and one.stack != other.stack)
    }
    assert not unlike
    assert sum(bool(one.stack) for one, _ in twins) > len(back) // 2
