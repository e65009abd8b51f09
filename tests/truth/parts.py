# SPDX-License-Identifier: Apache-2.0
"""What both sides of the truth machine have: the plan, vCPU threads, a VM whose every step is noted with its instant.

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
from tests.truth.kvm import PAGE, Vcpu, Vm

KICK, IGNORED = signal.SIGUSR1, signal.SIGUSR2
AFTER_MEMORY = "after memory.send"
"""Nothing is being sent any more, nothing saved yet: a moment, unless we lose the CPU just then. A long one may
be booked to memory.send or be left unattributed."""
SPIN_NS = 500_000
"""What `slowness` counts takes on a slow real machine."""


def slowness() -> float:
    """How many times as long as on a slow real machine everything takes here: 1 there, 2 to 4 in an emulated one."""
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
"""What a system call of ours takes outside the kernel, traced: ctypes, the clock reading, the tracer's own probes."""
SLOT_BYTES = 1 << 20


@dataclass
class Plan:
    """What one run does; the delays are ns by phase."""

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
    """Written by the guest before each fetch but the first."""
    chunk_bytes: int = PAGE
    seed: int = 0
    address: str = ""
    """`HOST:PORT`, or the path of a UNIX socket."""

    def dirty_set(self, number: int) -> list[int]:
        """The guest page numbers that the guest writes before fetch `number`."""
        first = self.first_slot_bytes
        free = range(first // PAGE // 2, (first + (self.slots - 1) * SLOT_BYTES) // PAGE)
        return sorted(random.Random(self.seed * 1000 + number).sample(free, self.dirty_pages))


class VcpuThread:
    """Runs one vCPU until it is kicked, again and again."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu, self.stopping, self.over = vcpu, False, False
        self.entered_ns = self.stopped_ns = self._waited_ns = 0
        self.finished, self.stopped, self.let_go = threading.Event(), threading.Event(), threading.Event()
        self.stopped.set()
        self._thread = threading.Thread(target=self._loop, daemon=True)
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
                if self.vcpu.run() == kvm.EXIT_IO:
                    self.finished.set()
            self.stopped_ns = time.monotonic_ns()
            self.left()
            self.stopped.set()

    def left(self) -> None:
        """What a VMM does in the vCPU's thread once it has stopped: nothing here."""

    def start(self) -> None:
        """Enters KVM_RUN; `finished` tells that the guest has written its list."""
        self.stopping = False
        self.vcpu.hurry(False)
        self.stopped.clear()
        self.finished.clear()
        self.let_go.set()

    def settle(self) -> None:
        """Waits until the thread sleeps in KVM_RUN: the guest has halted. A stop before that would be an early one."""
        seen = Path(f"/proc/self/task/{self._thread.native_id}/syscall")
        while f" {numbers.RUN:#x} " not in seen.read_text():
            time.sleep(0.0005)

    def entered(self) -> tuple[int, int]:
        """Between which instants a thread that sits in KVM_RUN entered it: on the way there it can lose the CPU."""
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
        """Kicks it out of KVM_RUN and waits."""
        self.kick(KICK)
        self.stopped.wait()

    def close(self) -> None:
        """Ends the thread of a stopped vCPU."""
        self.over = True
        self.let_go.set()
        self._thread.join()


class Machine:
    """What both sides have: a VM, its vCPUs, a log of the phases."""

    thread_of: type[VcpuThread] = VcpuThread

    def __init__(self, plan: Plan) -> None:
        self.plan, self.marks = plan, list[tuple[int, int, str]]()
        self.injected: dict[str, int] = {}
        manual = {"manual": kvm.MANUAL_PROTECT_ENABLE, "initially-set": 3}.get(plan.log, 0)
        self.vm = Vm(manual=manual, ring=4096 if plan.log == "ring" else 0)
        self.layout = {0: (0, plan.first_slot_bytes)}
        for index in range(1, plan.slots):
            self.layout[index] = (plan.first_slot_bytes + (index - 1) * SLOT_BYTES, SLOT_BYTES)
        for slot, (base, size) in self.layout.items():
            self.vm.set_slot(slot, base, size)
        self.vcpus = [Vcpu(self.vm, index) for index in range(plan.vcpus)]
        self.threads = [self.thread_of(vcpu) for vcpu in self.vcpus]

    def enter(self, phase: str) -> None:
        """The next call begins this phase; `entered` after that call says by when it had begun at the latest."""
        now = time.monotonic_ns()
        self.marks.append((now, now, phase))

    def entered(self) -> None:
        """The call that began the phase is over. Between the two readings we may have lost the CPU."""
        self.marks[-1] = (self.marks[-1][0], time.monotonic_ns(), self.marks[-1][2])

    def timed(self, fd: int, cmd: int, argument: kvm.Argument, phase: str, after: str) -> None:
        """An ioctl that is the whole of `phase`; in doubt: waiting for a CPU meanwhile, and the way there and back."""
        waited = kvm.run_delay_ns()
        self.enter(phase)
        kvm.ioctl(fd, cmd, argument, hold=True)
        self.enter(after)
        waited = kvm.run_delay_ns() - waited
        (begin, _, _), (end, _, _) = self.marks[-2:]
        self.marks[-2:] = [(begin, begin + waited + CALL_NS, phase), (end - waited, end, after)]

    def delay(self, phase: str) -> None:
        """The delay that the plan has for this phase."""
        wanted = self.plan.delays.get(phase, 0)
        if not wanted:
            return
        begin = time.monotonic_ns()
        if self.plan.spin:
            while time.monotonic_ns() - begin < wanted:
                pass
        else:
            time.sleep(wanted / 1e9)
        self.injected[phase] = time.monotonic_ns() - begin

    def memory(self, page: int) -> int:
        """Where in our memory guest page `page` is."""
        base, _, address = self.vm.slots[self.slot_of(page)]
        return address + page * PAGE - base

    def slot_of(self, page: int) -> int:
        return next(slot for slot, (base, size) in self.layout.items() if base <= page * PAGE < base + size)

    def checksum(self) -> int:
        """Over all of guest memory."""
        total = 0
        for _, size, address in (self.vm.slots[slot] for slot in self.layout):
            total = zlib.crc32(ctypes.string_at(address, size), total)
        return total

    def result(self, **more: Any) -> None:
        """Tells the run's truth on stdout."""
        say(json.dumps({"marks": self.marks, "injected": self.injected, "checksum": self.checksum(), **more}))

    def close(self) -> None:
        for thread in self.threads:
            if not thread.stopped.is_set():
                thread.stop()
            thread.close()


def encode(plan: Plan) -> str:
    """A plan as the command line takes it."""
    return json.dumps(asdict(plan))


def decode(text: str) -> Plan:
    """The reverse."""
    return Plan(**json.loads(text))


def say(word: str) -> None:
    """A line to whoever drives us."""
    print(word, flush=True)  # noqa: T201
