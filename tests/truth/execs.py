# SPDX-License-Identifier: Apache-2.0
"""A VMM on real KVM that replaces itself by execve(2), as QEMU's cpr-exec: `python -m tests.truth.execs old PLAN`.

In: a `Plan`, whose address is a directory; on stdin `go`, then `quit`. Out: on stdout `ready`, then a line of JSON of
each program, the old and the new one: `injected`, the delays as they were by phase; `whole`, how long the work with
that delay took; `waited`, how long its thread waited for a CPU; `checksum`, over all guest memory.

The memory is in a memfd that the new program inherits. To delay the kernel inside execve(2), another thread reads a
FUSE file: the kernel ends all other threads first, and this one ends only when the server, which has its request,
answers (`request_wait_answer`, fs/fuse/dev.c; `de_thread`, fs/exec.c).
"""

from __future__ import annotations

import time

STARTED_NS = time.monotonic_ns()
"""About the first that this program did."""

import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

from tests.truth import kvm, on_demand  # noqa: E402
from tests.truth.kvm import PAGE  # noqa: E402
from tests.truth.machine import Source  # noqa: E402
from tests.truth.page_server import ASKED  # noqa: E402
from tests.truth.parts import IGNORED, KICK, Machine, Plan, decode, encode, say  # noqa: E402

PHASES = ("pause", "quiesce", "state.save", "exec", "startup", "state.load", "resume")
"""Those that can be delayed."""


class Old(Source):
    """The program that has the guest."""

    def __init__(self, plan: Plan, memory: int) -> None:
        super().__init__(plan, memory)
        self.guest_memory, self.slow_file, self.answer = memory, -1, -1
        if delay := plan.delays.get("exec", 0):
            pages = on_demand.Pages(replace(plan, backend="file", delays={"page": delay}), {})
            Path(plan.address, "memory").write_bytes(bytes(PAGE))
            pages.start()
            self.slow_file, self.answer = os.open(f"{plan.address}/mount/memory", os.O_RDONLY), pages.outlive()

    def replace(self) -> None:
        """Stops the guest, saves it and becomes the new program."""
        waited, steps = kvm.run_delay_ns(), [time.monotonic_ns()]
        self.pause()
        steps.append(time.monotonic_ns())
        self.vm.read_clock()
        self.delay("quiesce")
        steps.append(time.monotonic_ns())
        Path(self.plan.address, "state").write_bytes(self.save())
        os.set_inheritable(self.guest_memory, True)
        if self.slow_file >= 0:
            threading.Thread(target=os.pread, args=(self.slow_file, PAGE, 0), daemon=True).start()
            while not Path(self.plan.address, "memory" + ASKED).exists():
                time.sleep(0.001)
        plan, descriptors = encode(self.plan), (str(self.guest_memory), str(self.answer))
        before, called = kvm.run_delay_ns(), time.monotonic_ns()
        steps.append(called)
        whole = {name: steps[at + 1] - steps[at] for at, name in enumerate(("pause", "quiesce", "state.save"))}
        self.result(whole=whole, waited=before - waited, waited_before=before, called=called)
        command = [sys.executable, "-m", "tests.truth.execs", "new", plan, *descriptors]
        os.execv(sys.executable, command)  # noqa: S606 - that is what is traced


class New(Machine):
    """The program that goes on with it."""

    def load(self) -> tuple[int, int]:
        """Returns when it began and ended to load the state, ns."""
        for vcpu in self.vcpus:
            vcpu.prepare(0)
        chip = kvm.CPU.chip.read(self.vm.fd) if kvm.CPU.chip is not None else b""
        self.delay("startup")
        state = Path(self.plan.address, "state").read_bytes()
        begin = time.monotonic_ns()
        if kvm.CPU.chip is not None:
            kvm.CPU.chip.write(self.vm.fd, chip)
        self.delay("state.load")
        for vcpu in self.vcpus:
            for part in kvm.CPU.state:
                part.write(vcpu.fd, state[: part.size])
                state = state[part.size :]
        return begin, time.monotonic_ns()

    def go(self) -> int:
        """Runs the guest. Returns when it was sure to run, ns."""
        self.delay("resume")
        self.vm.set_clock()
        for thread in self.threads:
            thread.start()
        return max(by for _, by in [thread.entered() for thread in self.threads])


def old(plan: Plan) -> None:
    memory = os.memfd_create("guest")
    os.ftruncate(memory, plan.first_slot_bytes + (1 << 20) * plan.slots)
    machine = Old(plan, memory)
    say("ready")
    assert sys.stdin.readline().strip() == "go"
    machine.replace()


def new(plan: Plan, memory: int, answer: int) -> None:
    waited_before = waited = kvm.run_delay_ns()  # of the same thread as in the old program
    machine = New(plan, memory)
    begin, loaded = machine.load()
    ran = machine.go()
    waited = kvm.run_delay_ns() - waited
    served = json.loads(os.fdopen(answer).readline())[-1] if answer >= 0 else None
    whole = {"startup": begin - (served[1] if served else STARTED_NS), "state.load": loaded - begin}
    machine.result(
        whole={**whole, "resume": ran - loaded},
        waited=waited,
        waited_before=waited_before,
        started=STARTED_NS,
        served=served,
        begin=begin,
    )
    sys.stdin.readline()
    machine.close()


def main(role: str, plan: Plan, *more: str) -> None:
    signal.signal(KICK, lambda *_: None)
    signal.signal(IGNORED, lambda *_: None)
    if role == "old":
        old(plan)
    else:
        new(plan, *map(int, more))


if __name__ == "__main__":
    main(sys.argv[1], decode(sys.argv[2]), *sys.argv[3:])
