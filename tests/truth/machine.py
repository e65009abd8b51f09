# SPDX-License-Identifier: Apache-2.0
"""A two-process migration on real KVM with known delays: `python -m tests.truth.machine ROLE PLAN`.

In: a role and a `Plan` as JSON; on stdin `go`, then `quit`. Out: on stdout `ready` (the guest runs, or the destination
waits), then one line of JSON: between which instants each phase began, on CLOCK_MONOTONIC, and which pages were dirty.
The order of the steps is that of QEMU 10.0, or with `state_first` of 7.2.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import struct
import sys
import threading
import time
from typing import Any

from ebpf_mig.linux import kvm as numbers
from tests.truth import added, kvm
from tests.truth.cpu import Part
from tests.truth.kvm import PAGE, Vcpu
from tests.truth.parts import AFTER_MEMORY, IGNORED, KICK, Machine, Plan, decode, say

HOG_SLOT, HOG_BASE, HOG_BYTES = 20, 64 * kvm.GIB, 32 * kvm.GIB
HOG_NS = 20_000_000
"""A longer hold needs a slot of several times HOG_BYTES, on a fast machine."""
LARGE_SLOT, LARGE_BASE = 21, 512 * kvm.GIB
_HEADER = struct.Struct("<cxxxIQ")


class Source(Machine):
    """The side that has the guest."""

    def __init__(self, plan: Plan, memory: int = -1) -> None:
        super().__init__(plan, memory)
        kvm.load_list(self.vm, [])
        for vcpu, thread in zip(self.vcpus, self.threads, strict=True):
            vcpu.prepare(0)
            thread.start()
            thread.finished.wait()
            thread.settle()
        self._bitmaps = {slot: self.vm.bitmap_for(slot) for slot in self.layout}
        self._gets = {slot: kvm.log_of(slot, bitmap) for slot, bitmap in self._bitmaps.items()}
        self.first_read = {kvm.LIST // PAGE}
        self._hog_pages, self._hogging = 0, threading.Event()
        self._beside: threading.Thread | None = None
        self.held = (0, 0)
        """Begin and end of another thread's long CLEAR, which holds slots_lock."""
        if plan.delays.get("fetch.kernel"):
            self._feed_hog(plan.delays["fetch.kernel"])
        if plan.large_slot_bytes:
            self.vm.set_slot(LARGE_SLOT, LARGE_BASE, plan.large_slot_bytes)
            self._large = self.vm.bitmap_for(LARGE_SLOT), self.vm.bitmap_for(LARGE_SLOT, 0xFF)
            self._read = kvm.log_of(LARGE_SLOT, self._large[0])
            self._clear = kvm.clear_of(LARGE_SLOT, self._large[1], plan.large_slot_bytes // PAGE)

    def _feed_hog(self, wanted_ns: int) -> None:
        """Calibrates how many pages one CLEAR needs to hold slots_lock for that long."""
        kvm.pin(1)
        size = HOG_BYTES * -(-wanted_ns // HOG_NS)
        self.vm.set_slot(HOG_SLOT, HOG_BASE, size)
        self.vm.set_slot(HOG_SLOT, HOG_BASE, size, log=True)
        self._ones = self.vm.bitmap_for(HOG_SLOT, 0xFF)
        probe = kvm.GIB // PAGE
        begin = time.monotonic_ns()
        self.vm.clear_log(HOG_SLOT, self._ones, probe)
        pages = probe * wanted_ns // (time.monotonic_ns() - begin)
        self._hog_pages = min(max(pages // 64 * 64, 64), size // PAGE - probe)

    def _hog(self) -> None:
        """Makes one long CLEAR, on its own CPU: the kernel does not yield within it."""
        kvm.pin(0)
        self._hogging.set()
        begin = time.monotonic_ns()
        self.vm.clear_log(HOG_SLOT, self._ones, self._hog_pages, kvm.GIB // PAGE)
        self.held = begin, time.monotonic_ns()
        self.injected["fetch.kernel"] = self.held[1] - begin

    def dirty(self, pages: list[int]) -> None:
        """Makes the guest write to exactly these pages."""
        first = self.threads[0]
        first.stop()
        self.vcpus[0].prepare(kvm.load_list(self.vm, [page * PAGE for page in pages]))
        first.start()
        first.finished.wait()
        first.settle()

    def fetch(self, *, clear: bool) -> set[int]:
        """One dirty-log fetch over all slots. Returns the guest page numbers."""
        if self.plan.log == "ring":
            found = {self.layout[slot][0] // PAGE + page for v in self.vcpus for slot, page in v.harvest()}
            self.timed(self.vm.fd, numbers.RESET_DIRTY_RINGS, 0, "fetch.kernel", "fetch.user")
            return found
        for slot, bitmap in self._bitmaps.items():
            self.timed(self.vm.fd, numbers.GET_DIRTY_LOG, self._gets[slot], "fetch.kernel", "fetch.user")
            if clear and self.plan.log != "legacy":
                self.vm.clear_log(slot, bitmap, self.layout[slot][1] // PAGE)
        return {self.layout[slot][0] // PAGE + page for slot, b in self._bitmaps.items() for page in kvm.pages_of(b)}

    def send_pages(self, connection: socket.socket, pages: list[int]) -> None:
        """Sends the page numbers, then the pages in sends of the plan's size. The delay comes half-way."""
        content = b"".join(ctypes.string_at(self.memory(page), PAGE) for page in pages)
        table = struct.pack(f"<{len(pages)}Q", *pages)
        step, half = self.plan.chunk_bytes, len(content) // 2
        final = bool(self.marks) and self.marks[0][2] == "pause"
        if final:
            self.enter("memory.send")
        connection.sendall(_HEADER.pack(b"M", len(pages), 0) + table)
        if final:
            self.entered()
        for at in range(0, len(content), step):
            if final and at <= half < at + step:
                self.delay("memory.send")
            if final and at + step >= len(content):
                self.enter(AFTER_MEMORY)
            connection.sendall(content[at : at + step])
        if final:
            self.entered()

    def save(self) -> bytes:
        """Reads the state of all vCPUs. The delay comes after the first read."""
        self.enter("state.save")
        saved = bytearray()
        for number, vcpu in enumerate(self.vcpus):
            for place, part in enumerate(kvm.CPU.state):
                saved += part.read(vcpu.fd)
                if number == place == 0:
                    self.entered()
                    self.delay("state.save")
        return bytes(saved)

    def pause(self) -> None:
        """Sends kicks that have no effect, waits for the delay, and sends the kicks that stop the vCPUs."""
        self.enter("pause")
        if self.plan.delays.get("pause"):
            for thread in self.threads:
                thread.kick(IGNORED)
                if thread is self.threads[0]:
                    self.entered()
            self.delay("pause")
        for thread in self.threads:
            last_kick = time.monotonic_ns()
            thread.kick(KICK)
            if not self.plan.delays.get("pause") and thread is self.threads[0]:
                self.entered()
        self.await_stop()
        self.marks.append((last_kick, max(thread.stopped_ns for thread in self.threads), "quiesce"))

    def await_stop(self) -> None:
        for thread in self.threads:
            thread.stopped.wait()

    def compare(self, found: set[int], wanted: set[int]) -> dict[str, Any]:
        """Pages that a fetch lacks, and pages in it that the guest did not write.

        A page that the guest reads for the first time while it is logged may be in the next fetch, but in no later one:
        with two-dimensional paging KVM maps it writable at once and marks it dirty (make_spte,
        arch/x86/kvm/mmu/spte.c).
        """
        surplus = found - wanted - self.first_read
        self.first_read = set()
        return {"missing": sorted(wanted - found), "surplus": sorted(surplus)}

    def migrate(self, connection: socket.socket) -> list[dict[str, Any]]:
        """Runs the whole migration. Returns the missing and surplus pages of each fetch."""
        plan, fetched = self.plan, list[dict[str, Any]]()
        for slot, (base, size) in self.layout.items():
            self.vm.set_slot(slot, base, size, log=True)
        if plan.large_slot_bytes:
            self.vm.set_slot(LARGE_SLOT, LARGE_BASE, plan.large_slot_bytes, log=True)
        self.fetch(clear=True)
        self.send_pages(
            connection, [p for b, size in self.layout.values() for p in range(b // PAGE, (b + size) // PAGE)]
        )
        for number in range(1, plan.passes + 1):
            wanted = set(plan.dirty_set(number))
            self.dirty(sorted(wanted))
            if number < plan.passes:
                found = self.fetch(clear=True)
                self.send_pages(connection, sorted(found | {kvm.LIST // PAGE}))
                fetched.append(self.compare(found, wanted))
        self.marks.clear()
        self.hand_over(connection, fetched, wanted)
        if self._beside is not None:
            self._beside.join()
        return fetched

    def hand_over(self, connection: socket.socket, fetched: list[dict[str, Any]], wanted: set[int]) -> None:
        """Runs the switchover, from the pause request to the last byte sent."""
        self.pause()
        self.vm.read_clock()
        self.delay("quiesce")
        state = b""
        if self.plan.state_first:
            state = self.save()
        if self._hog_pages:
            self._beside = threading.Thread(target=self._hog, daemon=True)
            self._beside.start()
            self._hogging.wait()
            time.sleep(added.HEAD_START_S)
        found = self.fetch(clear=False)
        if self.plan.large_slot_bytes:
            self.timed(self.vm.fd, numbers.GET_DIRTY_LOG, self._read, "fetch.kernel", "fetch.user")
            self.timed(self.vm.fd, numbers.CLEAR_DIRTY_LOG, self._clear, "fetch.kernel", "fetch.user")
        fetched.append(self.compare(found, wanted))
        self.delay("fetch.user")
        self.send_pages(connection, sorted(found | {kvm.LIST // PAGE}))
        if self.plan.state_first:
            self.enter("state.save")
        else:
            state = self.save()
        if kvm.CPU.chip is not None:
            kvm.CPU.chip.read(self.vm.fd)
        else:
            kvm.CPU.state[-1].read(self.vcpus[0].fd)  # a device's state that comes after the memory
        if self.plan.state_first:
            self.entered()
        half = len(state) // 2
        self.enter("state.send")
        connection.sendall(_HEADER.pack(b"S", len(self.vcpus), len(state)) + state[:half])
        self.entered()
        self.delay("state.send")
        self.enter("handover")
        connection.sendall(state[half:])
        self.entered()


class Destination(Machine):
    """The side that receives the guest."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        for vcpu in self.vcpus:
            vcpu.prepare(0)

    def serve(self, connection: socket.socket) -> None:
        """Receives and restores. Returns when all vCPUs run."""
        reader = connection.makefile("rb", buffering=0)
        while True:
            kind, count, size = _HEADER.unpack(_exactly(reader, _HEADER.size))
            if kind == b"S":
                break
            pages = struct.unpack(f"<{count}Q", _exactly(reader, 8 * count))
            content = _exactly(reader, PAGE * count)
            for number, page in enumerate(pages):
                ctypes.memmove(self.memory(page), content[PAGE * number : PAGE * (number + 1)], PAGE)
        if self.plan.late_reader:
            self.delay("handover")
        state = _exactly(reader, size)
        if not self.plan.late_reader:
            self.delay("handover")
        self.restore(state)
        self.delay("resume")
        self.vm.set_clock()
        for thread in self.threads:
            thread.start()
        entered = [thread.entered() for thread in self.threads]
        self.marks.append((max(since for since, _ in entered), max(by for _, by in entered), "end"))

    def restore(self, state: bytes) -> None:
        """Writes the vCPUs' state. The delay comes after the first write."""
        steps: list[tuple[Vcpu, Part, bytes]] = []
        for vcpu in self.vcpus:
            for part in kvm.CPU.state:
                steps.append((vcpu, part, state[: part.size]))
                state = state[part.size :]
        for number, (vcpu, part, value) in enumerate(steps):
            if number == 0 or number == len(steps) - 1:
                self.enter("resume" if number else "state.load")
            part.write(vcpu.fd, value)
            if number == 0 or number == len(steps) - 1:
                self.entered()
            if number == 0:
                self.delay("state.load")
                if self.plan.srcu_ns:
                    self.injected["state.load"] = added.beside_reader(self.vm, self.vcpus[0], self.plan.srcu_ns)
                if self.plan.added_slot_bytes:
                    self.injected["state.load"] = added.alone(self.vm, self.plan.added_slot_bytes)


def _exactly(reader: Any, size: int) -> bytes:
    """Reads that many bytes; EOFError if the stream ends earlier."""
    parts = bytearray()
    while len(parts) < size:
        part = reader.read(size - len(parts))
        if not part:
            raise EOFError(f"{len(parts)} of {size} bytes")
        parts += part
    return bytes(parts)


def _socket(address: str) -> tuple[socket.socket, Any]:
    """An unconnected socket, and the address to bind or connect it to."""
    if "/" in address:
        return socket.socket(socket.AF_UNIX), address
    host, _, port = address.rpartition(":")
    made = socket.socket(socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made, (host, int(port))


def main(role: str, plan: Plan) -> None:
    """Runs one side, from `ready` to `quit`."""
    sys.setswitchinterval(0.0001)
    signal.signal(KICK, lambda *_: None)
    made, address = _socket(plan.address)
    machine: Source | Destination
    if role == "source":
        machine = Source(plan)
        say("ready")
        sys.stdin.readline()
        made.connect(address)
        fetched = machine.migrate(made)
        machine.result(fetched=fetched, held=machine.held)
    else:
        machine = Destination(plan)
        made.bind(address)
        made.listen()
        say("ready")
        connection, _ = made.accept()
        machine.serve(connection)
        machine.result()
    sys.stdin.readline()
    machine.close()


if __name__ == "__main__":
    main(sys.argv[1], decode(sys.argv[2]))
