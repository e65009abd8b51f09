# SPDX-License-Identifier: Apache-2.0
"""Common to both sides of the truth machine: the plan, vCPU threads, and a VM that logs the instant of each step.

In: a `Plan`. Out: a `Machine` with `marks`, the instants (ns of CLOCK_MONOTONIC) between which each phase began.
"""

from __future__ import annotations

import ctypes
import json
import random
import signal
import threading
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ebpf_mig.linux import kvm as numbers
from tests.truth import kvm
from tests.truth.cpu import Argument
from tests.truth.kvm import PAGE, Vcpu, Vm

KICK, IGNORED = signal.SIGUSR1, signal.SIGUSR2
AFTER_MEMORY = "after memory.send"
"""The time after the last send of memory and before the first read of state. It is short unless we lose the CPU just
then; a long one may be attributed to memory.send, or to no phase.
"""
SPIN_NS = 500_000
"""Run time of the loop in `slowness` on a slow real machine."""


def slowness() -> float:
    """How much slower than a slow real machine this one is: 1 on real machines, 2 to 4 in an emulated one."""
    best = SPIN_NS
    for number in range(9):
        begin = time.perf_counter_ns()
        for _ in range(10_000):
            pass
        took = time.perf_counter_ns() - begin
        best = took if not number else min(best, took)
    return max(1.0, best / SPIN_NS)


SLOWNESS = slowness()
CALL_NS = int(20_000 * SLOWNESS)
"""Time that a traced system call of ours takes outside the kernel: ctypes, the clock reading, the tracer's probes."""
SLOT_BYTES = 1 << 20


@dataclass
class Plan:
    """The plan of one run. Delays are in ns by phase."""

    delays: dict[str, int] = field(default_factory=dict)
    spin: bool = False
    """Delays burn CPU instead of sleeping."""
    log: str = "legacy"
    """legacy, manual, initially-set or ring."""
    state_first: bool = False
    late_reader: bool = False
    """The handover's delay comes before the state is read, not after."""
    vcpus: int = 1
    slots: int = 2
    first_slot_bytes: int = 4 << 20
    passes: int = 2
    dirty_pages: int = 64
    """Pages that the guest writes before each fetch except the first."""
    chunk_bytes: int = PAGE
    srcu_ns: int = 0
    """While the destination loads, it adds a memslot, and for so long another thread is inside KVM's SRCU."""
    added_slot_bytes: int = 0
    """While the destination loads, it adds a memslot of this size, without memory behind it."""
    large_slot_bytes: int = 0
    """A slot without memory behind it. The final fetch reads its log and clears all of it."""
    backend: str = ""
    """Of a restore: `userfaultfd` or `file`, whose pages come when the guest touches them, each after the delay
    `page`; else the memory is read."""
    interrupts: bool = False
    """The restored guest can take interrupts, so that KVM fetches its pages in the background."""
    seed: int = 0
    address: str = ""
    """`HOST:PORT`, or the path of a UNIX socket."""

    def dirty_set(self, number: int) -> list[int]:
        """The guest page numbers that the guest writes before fetch `number`."""
        first = self.first_slot_bytes
        free = range(first // PAGE // 2, (first + (self.slots - 1) * SLOT_BYTES) // PAGE)
        return sorted(random.Random(self.seed * 1000 + number).sample(free, self.dirty_pages))


class VcpuThread:
    """Runs one vCPU until it is kicked; can be started again."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu, self.stopping, self.over = vcpu, False, False
        self.entered_ns = self.stopped_ns = self._waited_ns = 0
        self.finished, self.stopped, self.let_go = threading.Event(), threading.Event(), threading.Event()
        self.stopped.set()
        self._thread = threading.Thread(target=self._loop, name=f"vcpu {vcpu.index}", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {IGNORED})
        while True:
            self.let_go.wait()
            self.let_go.clear()
            if self.over:
                return
            self._waited_ns = kvm.run_delay_ns()
            self.entered_ns = time.monotonic_ns()
            while not self.stopping:
                if self.vcpu.run() == kvm.CPU.written:
                    self.finished.set()
            self.stopped_ns = time.monotonic_ns()
            self.left()
            self.stopped.set()

    def left(self) -> None:
        """A VMM's work in the vCPU's thread after a stop. Here it is none."""

    def start(self) -> None:
        """Enters KVM_RUN. `finished` is set once the guest has written its list."""
        self.stopping = False
        self.vcpu.hurry(False)
        self.stopped.clear()
        self.finished.clear()
        self.let_go.set()

    def settle(self) -> None:
        """Waits until the thread sleeps in KVM_RUN, because the guest has halted. A stop before that would be too
        early.
        """
        seen = Path(f"/proc/self/task/{self._thread.native_id}/syscall")
        while f" {numbers.RUN:#x} " not in seen.read_text():
            time.sleep(0.0005)

    def entered(self) -> tuple[int, int]:
        """The earliest and latest instant at which a thread in KVM_RUN entered it. It can lose the CPU on the way
        there.
        """
        while not self.entered_ns:
            time.sleep(0.001)
        self.settle()
        waited = kvm.run_delay_ns(self._thread.native_id) - self._waited_ns
        return self.entered_ns, self.entered_ns + waited + CALL_NS

    def kick(self, number: signal.Signals) -> None:
        """tgkill(2); only KICK stops the vCPU."""
        if number == KICK:
            self.stopping = True
            self.vcpu.hurry(True)
        assert self._thread.ident is not None
        signal.pthread_kill(self._thread.ident, number)

    def stop(self) -> None:
        """Kicks the vCPU out of KVM_RUN and waits."""
        self.kick(KICK)
        self.stopped.wait()

    def close(self) -> None:
        """Ends the thread of a stopped vCPU."""
        self.over = True
        self.let_go.set()
        self._thread.join()


class Machine:
    """The common part of both sides: a VM, its vCPUs, a log of the phases."""

    thread_of: type[VcpuThread] = VcpuThread

    def __init__(self, plan: Plan, memory: int = -1) -> None:
        """`memory`: see `kvm.Vm`."""
        self.plan, self.marks = plan, list[tuple[int, int, str]]()
        self.injected: dict[str, int] = {}
        self.ran: dict[str, int] = {}
        manual = {"manual": kvm.MANUAL_PROTECT_ENABLE, "initially-set": 3}.get(plan.log, 0)
        self.vm = Vm(manual=manual, ring=4096 if plan.log == "ring" else 0, memory=memory)
        self.layout = {0: (0, plan.first_slot_bytes)}
        for index in range(1, plan.slots):
            self.layout[index] = (plan.first_slot_bytes + (index - 1) * SLOT_BYTES, SLOT_BYTES)
        for slot, (base, size) in self.layout.items():
            self.vm.set_slot(slot, base, size)
        self.vcpus = [Vcpu(self.vm, index) for index in range(plan.vcpus)]
        self.threads = [self.thread_of(vcpu) for vcpu in self.vcpus]

    def enter(self, phase: str) -> None:
        """Logs that the next call begins this phase. `entered`, called after that call, gives the latest possible
        begin.
        """
        now = time.monotonic_ns()
        self.marks.append((now, now, phase))

    def entered(self) -> None:
        """Logs that the call that began the phase is over. We may have lost the CPU between the two readings."""
        self.marks[-1] = (self.marks[-1][0], time.monotonic_ns(), self.marks[-1][2])

    def timed(self, fd: int, cmd: int, argument: Argument, phase: str, after: str) -> None:
        """Runs an ioctl that makes up the whole `phase`. Uncertain are waits for a CPU and the time around the call."""
        waited = kvm.run_delay_ns()
        self.enter(phase)
        kvm.ioctl(fd, cmd, argument, hold=True)
        self.enter(after)
        waited = kvm.run_delay_ns() - waited
        (begin, _, _), (end, _, _) = self.marks[-2:]
        self.marks[-2:] = [(begin, begin + waited + CALL_NS, phase), (end - waited, end, after)]

    def delay(self, phase: str) -> None:
        """Waits for the plan's delay of this phase."""
        wanted = self.plan.delays.get(phase, 0)
        if not wanted:
            return
        begin, ran = time.monotonic_ns(), time.thread_time_ns()
        if self.plan.spin:
            while time.monotonic_ns() - begin < wanted:
                pass
        else:
            time.sleep(wanted / 1e9)
        self.injected[phase] = time.monotonic_ns() - begin
        self.ran[phase] = time.thread_time_ns() - ran

    def memory(self, page: int) -> int:
        """The address in our memory of guest page `page`."""
        base, _, address = self.vm.slots[self.slot_of(page)]
        return address + page * PAGE - base

    def slot_of(self, page: int) -> int:
        return next(slot for slot, (base, size) in self.layout.items() if base <= page * PAGE < base + size)

    def checksum(self) -> int:
        """A checksum over all guest memory."""
        total = 0
        for _, size, address in (self.vm.slots[slot] for slot in self.layout):
            total = zlib.crc32(ctypes.string_at(address, size), total)
        return total

    def result(self, **more: Any) -> None:
        """Prints the truth of the run on stdout."""
        delays = {"injected": self.injected, "ran": self.ran}
        say(json.dumps({"marks": self.marks, **delays, "checksum": self.checksum(), **more}))

    def close(self) -> None:
        for thread in self.threads:
            if not thread.stopped.is_set():
                thread.stop()
            thread.close()


def encode(plan: Plan) -> str:
    """A plan as a command-line argument."""
    return json.dumps(asdict(plan))


def decode(text: str) -> Plan:
    """A plan from a command-line argument."""
    return Plan(**json.loads(text))


def say(word: str) -> None:
    """Prints a line for the harness."""
    print(word, flush=True)  # noqa: T201
