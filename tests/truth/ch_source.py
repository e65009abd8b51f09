# SPDX-License-Identifier: Apache-2.0
"""The source as Cloud Hypervisor: the work of its sending thread, in its order.

In: a `ChPlan` and the destination's address. Out: a migration, its log lines and events. Order: vmm/src/lib.rs,
`send_migration` and `do_memory_migration` (v52 and v53).
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import time
from typing import Any

from tests.truth import ch_wire, kvm
from tests.truth.ch_api import Monitor
from tests.truth.ch_parts import KVMCLOCK_CTRL, LOOK_S, ChPlan, ChVcpuThread, Clock, FailedError, supported_cpuid
from tests.truth.kvm import PAGE
from tests.truth.machine import Source
from tests.truth.parts import AFTER_MEMORY

DEVICES = "x" * 30_000
"""A stand-in for the state of devices."""


class ChSource(Source):
    """The side that has the guest."""

    plan: ChPlan
    thread_of = ChVcpuThread

    def __init__(self, plan: ChPlan, monitor: Monitor) -> None:
        super().__init__(plan)
        self.monitor = monitor

    def send_pages(self, connection: Any, pages: list[int]) -> None:
        """Sends the header, the table and each range by its own write, then reads the answer. The delay comes before
        the last range.
        """
        by_slot = ([p for p in pages if self.slot_of(p) == slot] for slot in self.layout)
        ranges = [pair for part in by_slot for pair in ch_wire.ranges(part, PAGE)]
        final = bool(self.marks) and self.marks[0][2] == "pause"
        if final:
            self.enter("memory.send")
        ch_wire.request(connection, ch_wire.MEMORY, 16 * len(ranges))
        if final:
            self.entered()
        connection.sendall(ch_wire.table(ranges))
        for at, (address, size) in enumerate(ranges):
            if final and at == len(ranges) - 1:
                self.delay("memory.send")
            connection.sendall(ctypes.string_at(self.memory(address // PAGE), size))
        ch_wire.expect_ok(connection)
        if final:
            self.enter(AFTER_MEMORY)

    def pause(self) -> None:
        """Signals all vCPUs and waits for them. Each runs once more with immediate_exit."""
        self.monitor.event("pausing")
        if self.plan.manner != "v53":
            self.vm.read_clock()
        super().pause()
        for vcpu in self.vcpus:
            with contextlib.suppress(OSError):  # EINVAL: the guest has no kvmclock
                kvm.ioctl(vcpu.fd, KVMCLOCK_CTRL)
        if self.plan.manner == "v53":
            self.vm.read_clock()
        self.delay("quiesce")
        self.monitor.event("paused")

    def await_stop(self) -> None:
        """Polls every millisecond, first before any vCPU can have reacted, so that it sleeps at least once."""
        time.sleep(LOOK_S)
        while not all(thread.stopped.is_set() for thread in self.threads):
            time.sleep(LOOK_S)

    def send(self, url: str) -> None:
        """Runs a whole migration. After FailedError or OSError the guest is left stopped."""
        self.monitor.event("migration-started")
        connection = ch_wire.connect(url)
        ch_wire.request(connection, ch_wire.START)
        ch_wire.expect_ok(connection)
        supported_cpuid(self.vm)
        config = json.dumps({"vm_config": {"vcpus": self.plan.vcpus}, "common_cpuid": "x" * 4000}).encode()
        ch_wire.request(connection, ch_wire.CONFIG, len(config))
        connection.sendall(config)
        ch_wire.expect_ok(connection)
        for slot, (base, size) in self.layout.items():
            self.vm.set_slot(slot, base, size, log=True)
        everything = [p for b, size in self.layout.values() for p in range(b // PAGE, (b + size) // PAGE)]
        self.send_pages(connection, everything)
        self.monitor.event("migration-memory-iteration")
        wanted = set(self.plan.dirty_set(1))
        self.dirty(sorted(wanted))
        kept = self.fetch(clear=False)  # converged: its pages are sent with the final ones
        self.marks.clear()
        self.switch_over(connection, kept, wanted)
        for slot, (base, size) in self.layout.items():
            self.vm.set_slot(slot, base, size)
        self.monitor.event("migration-finished")

    def switch_over(self, connection: Any, kept: set[int], wanted: set[int]) -> None:
        """Runs the downtime, from the pause to the answer to Complete, and logs its parts."""
        total = Clock()
        self.pause()
        final = Clock()
        self.fetch(clear=False)
        self.delay("fetch.user")
        self.fetched = [self.compare(kept, wanted)]
        self.send_pages(connection, sorted(kept | {kvm.LIST // PAGE}))
        final_ms = final.ms()
        self.monitor.event("snapshotting")
        snapshot = Clock()
        self.enter("state.save")
        supported_cpuid(self.vm)
        self.entered()
        state = self.save()
        if self.plan.fail == "save":
            raise FailedError("Failed to send migratable component snapshot", "Could not get vCPU state")
        self.monitor.event("snapshotted")
        if self.plan.manner == "v53":
            self.fetch(clear=False)
            self.enter("state.save")
        snapshot_ms, sending = snapshot.ms(), Clock()
        payload = json.dumps({"vcpus": base64.b64encode(state).decode(), "devices": DEVICES}).encode()
        self.enter("state.send")
        ch_wire.request(connection, ch_wire.STATE, len(payload))
        self.entered()
        self.delay("state.send")
        self.enter("handover")
        connection.sendall(payload)
        self.entered()
        ch_wire.expect_ok(connection)
        sending_ms, completing = sending.ms(), Clock()
        ch_wire.request(connection, ch_wire.COMPLETE)
        ch_wire.expect_ok(connection)
        total_ms, complete_ms = total.ms(), completing.ms()
        self.monitor.log(f"Migration completed after 0.1s with a downtime of {total_ms}ms (goal was 300ms)")
        parts = f"final_iter:{final_ms}ms state:{snapshot_ms}ms send_state:{sending_ms}ms complete:{complete_ms}ms"
        self.monitor.log(f"Downtime breakdown: {total_ms}ms ({parts})")

    def take_back(self) -> None:
        """Resumes the guest here after a failure."""
        self.vm.set_clock()
        for thread in self.threads:
            if thread.stopped.is_set():
                thread.start()
        self.monitor.event("migration-failed")
