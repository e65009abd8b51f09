# SPDX-License-Identifier: Apache-2.0
"""A two-process migration on real KVM with known delays: `python -m tests.truth.machine ROLE PLAN`.

In: a role and a `Plan` as JSON; on stdin `go`, then `quit`. Out: on stdout `ready` (the guest runs, or the destination
waits), then one line of JSON: the instants at which the process itself says each phase began, on CLOCK_MONOTONIC, and
which pages were dirty. The order of the steps is QEMU's, 10.0's or with `state_first` 7.2's.
"""

from __future__ import annotations

import ctypes
import json
import random
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

from ebpf_mig import kvm as numbers
from tests.truth import kvm
from tests.truth.kvm import PAGE, Vcpu, Vm

KICK, IGNORED = signal.SIGUSR1, signal.SIGUSR2
STATE = (kvm.GET_SREGS, kvm.GET_REGS, kvm.GET_FPU, kvm.GET_MP_STATE)
SETTERS = (kvm.SET_SREGS, kvm.SET_REGS, kvm.SET_FPU, kvm.SET_MP_STATE)
HOG_SLOT, HOG_BASE, HOG_BYTES = 20, 64 * kvm.GIB, 32 * kvm.GIB
SLOT_0_BYTES, SLOT_BYTES = 4 << 20, 1 << 20
_HEADER = struct.Struct("<cxxxIQ")


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
    passes: int = 2
    dirty_pages: int = 64
    """Written by the guest before each fetch but the first."""
    chunk_bytes: int = PAGE
    seed: int = 0
    address: str = ""
    """`HOST:PORT`, or the path of a UNIX socket."""

    def dirty_set(self, number: int) -> list[int]:
        """The guest page numbers that the guest writes before fetch `number`."""
        free = range(SLOT_0_BYTES // PAGE // 2, (SLOT_0_BYTES + (self.slots - 1) * SLOT_BYTES) // PAGE)
        return sorted(random.Random(self.seed * 1000 + number).sample(free, self.dirty_pages))


class VcpuThread:
    """Runs one vCPU until it is kicked, again and again."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu, self.stopping, self.over = vcpu, False, False
        self.entered_ns = self.stopped_ns = 0
        self.finished, self.stopped, self.let_go = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {IGNORED})
        while True:
            self.let_go.wait()
            self.let_go.clear()
            if self.over:
                return
            self.entered_ns = time.monotonic_ns()
            while not self.stopping:
                if self.vcpu.run() == kvm.EXIT_IO:
                    self.finished.set()
            self.stopped_ns = time.monotonic_ns()
            self.stopped.set()

    def start(self) -> None:
        """Enters KVM_RUN; `finished` tells that the guest has written its list."""
        self.stopping = False
        self.vcpu.hurry(False)
        self.stopped.clear()
        self.finished.clear()
        self.let_go.set()

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

    def __init__(self, plan: Plan) -> None:
        self.plan, self.marks = plan, list[tuple[int, str]]()
        self.injected: dict[str, int] = {}
        manual = {"manual": kvm.MANUAL_PROTECT_ENABLE, "initially-set": 3}.get(plan.log, 0)
        self.vm = Vm(manual=manual, ring=4096 if plan.log == "ring" else 0)
        self.layout = {0: (0, SLOT_0_BYTES)}
        for index in range(1, plan.slots):
            self.layout[index] = (SLOT_0_BYTES + (index - 1) * SLOT_BYTES, SLOT_BYTES)
        for slot, (base, size) in self.layout.items():
            self.vm.set_slot(slot, base, size)
        self.vcpus = [Vcpu(self.vm, index) for index in range(plan.vcpus)]
        self.threads = [VcpuThread(vcpu) for vcpu in self.vcpus]

    def enter(self, phase: str, at_ns: int | None = None) -> None:
        """From now on it is this phase."""
        self.marks.append((time.monotonic_ns() if at_ns is None else at_ns, phase))

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

    def memory(self, page: int, count: int = 1) -> int:
        """Where in our memory guest page `page` is."""
        base, _, address = self.vm.slots[self.slot_of(page)]
        return address + page * PAGE - base

    def slot_of(self, page: int) -> int:
        return next(slot for slot, (base, size) in self.layout.items() if base <= page * PAGE < base + size)

    def checksum(self) -> int:
        """Over all of guest memory."""
        total = 0
        for base, size, address in (self.vm.slots[slot] for slot in self.layout):
            total = zlib.crc32(ctypes.string_at(address, size), total)
        return total

    def result(self, **more: Any) -> None:
        """Tells the run's truth on stdout."""
        print(json.dumps({"marks": self.marks, "injected": self.injected, "checksum": self.checksum(), **more}))  # noqa: T201
        sys.stdout.flush()

    def close(self) -> None:
        for thread in self.threads:
            if thread.let_go.is_set() or not thread.stopped.is_set():
                thread.stop()
            thread.close()


class Source(Machine):
    """The side that has the guest."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        kvm.load_list(self.vm, [])
        for vcpu, thread in zip(self.vcpus, self.threads, strict=True):
            vcpu.prepare(0)
            thread.start()
            thread.finished.wait()
        self._bitmaps = {slot: self.vm.bitmap_for(slot) for slot in self.layout}
        self._hog_pages, self._hogging = 0, threading.Event()
        if plan.delays.get("fetch.kernel"):
            self._feed_hog(plan.delays["fetch.kernel"])

    def _feed_hog(self, wanted_ns: int) -> None:
        """Finds out how many pages one CLEAR must have to hold slots_lock for that long."""
        self.vm.set_slot(HOG_SLOT, HOG_BASE, HOG_BYTES)
        self.vm.set_slot(HOG_SLOT, HOG_BASE, HOG_BYTES, log=True)
        self._ones = self.vm.bitmap_for(HOG_SLOT, 0xFF)
        probe = kvm.GIB // PAGE
        begin = time.monotonic_ns()
        self.vm.clear_log(HOG_SLOT, self._ones, probe)
        pages = probe * wanted_ns // (time.monotonic_ns() - begin)
        self._hog_pages = min(max(pages // 64 * 64, 64), HOG_BYTES // PAGE - probe)

    def _hog(self) -> None:
        self.enter("fetch.kernel")
        self._hogging.set()
        self.vm.clear_log(HOG_SLOT, self._ones, self._hog_pages, kvm.GIB // PAGE)

    def dirty(self, pages: list[int]) -> None:
        """Has the guest write to exactly these pages."""
        first = self.threads[0]
        first.stop()
        self.vcpus[0].prepare(kvm.load_list(self.vm, [page * PAGE for page in pages]))
        first.start()
        first.finished.wait()

    def fetch(self, *, clear: bool) -> set[int]:
        """One dirty-log fetch over all slots; the guest page numbers."""
        if self.plan.log == "ring":
            found = {self.layout[slot][0] // PAGE + page for v in self.vcpus for slot, page in v.harvest()}
            self.enter("fetch.kernel")
            kvm.ioctl(self.vm.fd, numbers.RESET_DIRTY_RINGS)
            self.enter("fetch.user")
            return found
        for slot, bitmap in self._bitmaps.items():
            self.enter("fetch.kernel")
            self.vm.get_log(slot, bitmap)
            if clear and self.plan.log != "legacy":
                self.vm.clear_log(slot, bitmap, self.layout[slot][1] // PAGE)
            self.enter("fetch.user")
        return {self.layout[slot][0] // PAGE + page for slot, b in self._bitmaps.items() for page in kvm.pages_of(b)}

    def send_pages(self, connection: socket.socket, pages: list[int]) -> None:
        """Which pages, then their content in sends of the plan's size; the delay comes half-way."""
        content = b"".join(ctypes.string_at(self.memory(page), PAGE) for page in pages)
        table = struct.pack(f"<{len(pages)}Q", *pages)
        step, half = self.plan.chunk_bytes, len(content) // 2
        final = bool(self.marks) and any(name == "pause" for _, name in self.marks)
        if final:
            self.enter("memory.send")
        connection.sendall(_HEADER.pack(b"M", len(pages), 0) + table)
        for at in range(0, len(content), step):
            if final and at <= half < at + step:
                self.delay("memory.send")
            connection.sendall(content[at : at + step])

    def save(self, commands: tuple[int, ...], *, delayed: bool) -> bytes:
        """Reads state of all vCPUs; the delay comes after the first read."""
        self.enter("state.save")
        saved = bytearray()
        for number, vcpu in enumerate(self.vcpus):
            for place, command in enumerate(commands):
                saved += vcpu.get(command).raw
                if delayed and number == 0 and place == 0:
                    self.delay("state.save")
        return bytes(saved)

    def pause(self) -> None:
        """Kicks that nobody hears, the delay, kicks that stop the vCPUs."""
        self.enter("pause")
        if self.plan.delays.get("pause"):
            for thread in self.threads:
                thread.kick(IGNORED)
            self.delay("pause")
        for thread in self.threads:
            thread.kick(KICK)
        for thread in self.threads:
            thread.stopped.wait()
        self.enter("quiesce", max(thread.stopped_ns for thread in self.threads))

    def migrate(self, connection: socket.socket) -> list[dict[str, Any]]:
        """The whole of it; what each fetch should have found and did not, or found and should not have."""
        plan, fetched = self.plan, list[dict[str, Any]]()
        for slot, (base, size) in self.layout.items():
            self.vm.set_slot(slot, base, size, log=True)
        self.fetch(clear=True)
        self.send_pages(connection, [p for b, size in self.layout.values() for p in range(b // PAGE, (b + size) // PAGE)])
        for number in range(1, plan.passes + 1):
            wanted = set(plan.dirty_set(number))
            self.dirty(sorted(wanted))
            if number < plan.passes:
                found = self.fetch(clear=True)
                self.send_pages(connection, sorted(found | {kvm.LIST // PAGE}))
                fetched.append({"missing": sorted(wanted - found), "surplus": sorted(found - wanted)})
        self.marks.clear()
        state = self.hand_over(connection, fetched, wanted)
        self.enter("handover")
        del state
        return fetched

    def hand_over(self, connection: socket.socket, fetched: list[dict[str, Any]], wanted: set[int]) -> bytes:
        """Everything from the pause request to the last byte sent; returns the state that was sent."""
        self.pause()
        kvm.ioctl(self.vm.fd, numbers.GET_CLOCK, ctypes.create_string_buffer(48))
        self.delay("quiesce")
        state = b""
        if self.plan.state_first:
            state = self.save(STATE, delayed=True)
        if self._hog_pages:
            threading.Thread(target=self._hog, daemon=True).start()
            self._hogging.wait()
        found = self.fetch(clear=False)
        fetched.append({"missing": sorted(wanted - found), "surplus": sorted(found - wanted)})
        self.delay("fetch.user")
        self.send_pages(connection, sorted(found | {kvm.LIST // PAGE}))
        if self.plan.state_first:
            self.enter("state.save")
        else:
            state = self.save(STATE, delayed=True)
        kvm.ioctl(self.vm.fd, kvm.GET_IRQCHIP, ctypes.create_string_buffer(kvm.SIZES[kvm.GET_IRQCHIP]))
        half = len(state) // 2
        self.enter("state.send")
        connection.sendall(_HEADER.pack(b"S", len(self.vcpus), len(state)) + state[:half])
        self.delay("state.send")
        connection.sendall(state[half:])
        return state


class Destination(Machine):
    """The side that gets the guest."""

    def serve(self, connection: socket.socket) -> None:
        """Receives and restores; returns when all vCPUs run."""
        reader = connection.makefile("rb", buffering=0)
        while True:
            kind, count, size = _HEADER.unpack(_exactly(reader, _HEADER.size))
            if kind == b"S":
                break
            pages = struct.unpack(f"<{count}Q", _exactly(reader, 8 * count))
            for page in pages:
                ctypes.memmove(self.memory(page), _exactly(reader, PAGE), PAGE)
        if self.plan.late_reader:
            self.delay("handover")
        state = _exactly(reader, size)
        if not self.plan.late_reader:
            self.delay("handover")
        self.restore(state)
        self.enter("resume")
        self.delay("resume")
        kvm.ioctl(self.vm.fd, numbers.SET_CLOCK, ctypes.create_string_buffer(48))
        for thread in self.threads:
            thread.start()
        time.sleep(0.05)
        self.enter("end", max(thread.entered_ns for thread in self.threads))

    def restore(self, state: bytes) -> None:
        """Writes the vCPUs' state; the delay comes after the first write."""
        at = 0
        self.enter("state.load")
        for number, vcpu in enumerate(self.vcpus):
            for place, (getter, setter) in enumerate(zip(STATE, SETTERS, strict=True)):
                vcpu.set(setter, state[at : at + kvm.SIZES[getter]])
                at += kvm.SIZES[getter]
                if number == 0 and place == 0:
                    self.delay("state.load")


def _exactly(reader: Any, size: int) -> bytes:
    """That many bytes of a raw stream; EOFError if it ends before."""
    parts = bytearray()
    while len(parts) < size:
        part = reader.read(size - len(parts))
        if not part:
            raise EOFError(f"{len(parts)} of {size} bytes")
        parts += part
    return bytes(parts)


def _socket(address: str) -> tuple[socket.socket, Any]:
    """An unconnected socket and what to bind or connect it to."""
    if "/" in address:
        return socket.socket(socket.AF_UNIX), address
    host, _, port = address.rpartition(":")
    made = socket.socket(socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made, (host, int(port))


def _say(word: str) -> None:
    print(word, flush=True)  # noqa: T201


def main(role: str, plan: Plan) -> None:
    """One side, from `ready` to `quit`."""
    sys.setswitchinterval(0.0001)
    signal.signal(KICK, lambda *_: None)
    made, address = _socket(plan.address)
    machine: Source | Destination
    if role == "source":
        machine = Source(plan)
        _say("ready")
        sys.stdin.readline()
        made.connect(address)
        machine.result(fetched=machine.migrate(made))
    else:
        machine = Destination(plan)
        made.bind(address)
        made.listen()
        _say("ready")
        connection, _ = made.accept()
        machine.serve(connection)
        machine.result()
    sys.stdin.readline()
    machine.close()


def encode(plan: Plan) -> str:
    """A plan as the command line takes it."""
    return json.dumps(asdict(plan))


if __name__ == "__main__":
    main(sys.argv[1], Plan(**json.loads(sys.argv[2])))
