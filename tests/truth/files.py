# SPDX-License-Identifier: Apache-2.0
"""A guest on real KVM that one process saves to files and another loads: `python -m tests.truth.files ROLE PLAN`.

In: a role and a `Plan`, whose address is a directory; requests on a UNIX socket there, named after the role; on stdin
`go`, then `quit`. Out: on stdout `ready`, then one line of JSON: the delays as they were, by phase, the length of
fsync(2), and `whole`: by phase, how long the work took that depends on the machine, with the delay in it; `waited`: how
long the thread that works waited for a CPU; `requests`: by name, when the request was there, when its answer began and
when it was sent (ns of CLOCK_MONOTONIC). The steps are those of Firecracker: state first, then the dirty log, then
memory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from pathlib import Path

from tests.truth import cpu_x86, kvm, on_demand
from tests.truth.kvm import PAGE
from tests.truth.machine import Source
from tests.truth.parts import IGNORED, KICK, Machine, Plan, decode, say

CHUNK = 64 << 10
PHASES = (
    "pause", "quiesce", "state.save", "state.send", "fetch.user", "memory.send", "memory.load", "state.load", "resume",
)  # fmt: skip
"""Those that can be delayed."""


class Server:
    """Takes one request a connection, and answers when the work is done."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(4)

    def serve(self, *steps: tuple[str, object]) -> dict[str, tuple[int, int, int]]:
        """When each request was there, when its answer began and when it was sent, ns."""
        requests = {}
        for name, step in steps:
            connection, _ = self._listener.accept()
            with connection:
                assert connection.recv(4096).split()[1] == f"/{name}".encode()
                there = time.monotonic_ns()
                step()  # type: ignore[operator]
                begin = time.monotonic_ns()
                connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
                requests[name] = there, begin, time.monotonic_ns()
        return requests


class Saved(Source):
    """The side that has the guest."""

    whole: dict[str, int]
    synced_ns: int
    """When fsync(2) began. What is left until the answer is part of `sync`, too."""

    def files(self) -> list[Path]:
        return [Path(self.plan.address) / name for name in ("state", "memory")]

    def stop(self) -> None:
        self.pause()
        if self.plan.backend:
            self.vcpus[0].prepare(kvm.load_list(self.vm, [page * PAGE for page in on_demand.touched(self.plan)]))
            if self.plan.interrupts:
                cpu_x86.interruptible(self.vcpus[0].fd)
        self.vm.read_clock()
        self.delay("quiesce")

    def create(self) -> None:
        state = self.save()
        first, second = self.files()
        half = len(state) // 2
        file = os.open(first, os.O_CREAT | os.O_WRONLY)
        os.write(file, state[:half].ljust(PAGE, b"\0"))
        self.delay("state.send")
        os.write(file, state[half:].ljust(PAGE, b"\0"))
        os.close(file)
        self.fetch(clear=False)
        self.delay("fetch.user")
        begin = time.monotonic_ns()
        file = os.open(second, os.O_CREAT | os.O_WRONLY)
        for base, size in self.layout.values():
            for at in range(base, base + size, CHUNK):
                if at == CHUNK:
                    self.delay("memory.send")
                os.write(file, ctypes.string_at(self.memory(at // PAGE), CHUNK))
        self.synced_ns = time.monotonic_ns()
        self.whole = {"memory.send": self.synced_ns - begin}
        os.fsync(file)
        self.injected["sync"] = time.monotonic_ns() - self.synced_ns
        os.close(file)


class Loaded(Machine):
    """The side that loads it."""

    whole: dict[str, int]

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        for vcpu in self.vcpus:
            vcpu.prepare(0)
        self.pages = on_demand.Pages(plan, self.vm.slots) if plan.backend else None
        self.touched_ns = 0
        """From the start until the guest had touched its pages."""

    def load(self) -> None:
        first, second = (Path(self.plan.address) / name for name in ("state", "memory"))
        file = os.open(first, os.O_RDONLY)
        parts = [os.read(file, PAGE) for _ in range(2)]
        os.close(file)
        begin = time.monotonic_ns()
        if self.pages is not None:
            self.pages.start()
            self.pages.load()
        else:
            self._read(second)
        self.whole = {"memory.load": time.monotonic_ns() - begin}
        size = sum(part.size for part in kvm.CPU.state) * len(self.vcpus)
        state = parts[0][: size // 2] + parts[1][: size - size // 2]
        for number, vcpu in enumerate(self.vcpus):
            for part in kvm.CPU.state:
                part.write(vcpu.fd, state[: part.size])
                state = state[part.size :]
                if not number and part is kvm.CPU.state[0]:
                    self.delay("state.load")

    def _read(self, path: Path) -> None:
        file = os.open(path, os.O_RDONLY)
        for base, size in self.layout.values():
            for at in range(base, base + size, CHUNK):
                if at == CHUNK:
                    self.delay("memory.load")
                ctypes.memmove(self.memory(at // PAGE), os.read(file, CHUNK), CHUNK)
        os.close(file)

    def go(self) -> None:
        self.delay("resume")
        self.vm.set_clock()
        begin = time.monotonic_ns()
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.entered()
        if self.pages is not None:
            self.threads[0].finished.wait()
            self.touched_ns = time.monotonic_ns() - begin

    def served(self) -> list[tuple[int, int]]:
        """When each page was asked for, and when it was there, ns."""
        return self.pages.served() if self.pages is not None else []


def main(role: str, plan: Plan) -> None:
    signal.signal(KICK, lambda *_: None)
    signal.signal(IGNORED, lambda *_: None)
    server = Server(f"{plan.address}/{role}")
    machine: Saved | Loaded
    if role == "source":
        machine = saved = Saved(plan)
        for slot, (base, size) in saved.layout.items():
            saved.vm.set_slot(slot, base, size, log=True)
        steps: tuple[tuple[str, object], ...] = (("pause", saved.stop), ("create", saved.create))
    else:
        machine = loaded = Loaded(plan)
        steps = (("load", loaded.load), ("resume", loaded.go))
    say("ready")
    assert sys.stdin.readline().strip() == "go"
    waited = kvm.run_delay_ns()
    requests = server.serve(*steps)
    waited = kvm.run_delay_ns() - waited
    if isinstance(machine, Saved):
        machine.whole["sync"] = requests["create"][-1] - machine.synced_ns
    more: dict[str, object] = {}
    if isinstance(machine, Loaded):
        more = {"served": machine.served(), "touched": machine.touched_ns}
    machine.result(whole=machine.whole, waited=waited, requests=requests, **more)
    sys.stdin.readline()
    machine.close()
    if isinstance(machine, Loaded) and machine.pages is not None:
        machine.pages.close()


if __name__ == "__main__":
    main(sys.argv[1], decode(sys.argv[2]))
