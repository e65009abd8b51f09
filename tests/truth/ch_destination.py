# SPDX-License-Identifier: Apache-2.0
"""The destination as Cloud Hypervisor: the work of its receiving thread, in its order.

In: a `ChPlan` and a connection. Out: a running guest, its log lines and events. Order: vmm/src/lib.rs,
`vm_receive_migration_step` and `vm_receive_state` (v52 and v53).
"""

from __future__ import annotations

import base64
import ctypes
import json
import time
from dataclasses import replace
from typing import Any

from tests.truth import ch_wire
from tests.truth.ch_api import Monitor
from tests.truth.ch_parts import LOOK_S, ChPlan, ChVcpuThread, Clock, FailedError, supported_cpuid
from tests.truth.kvm import PAGE, Vcpu
from tests.truth.machine import Destination
from tests.truth.parts import Machine


class ChDestination(Destination):
    """The side that receives the guest. It creates its vCPUs when the state arrives."""

    plan: ChPlan

    def __init__(self, plan: ChPlan, monitor: Monitor) -> None:
        Machine.__init__(self, replace(plan, vcpus=0))
        self.wanted = plan
        self.monitor = monitor

    def receive(self, connection: Any) -> None:
        """Handles everything after Config, up to the answer to Complete."""
        while (asked := ch_wire.next_request(connection)).command == ch_wire.MEMORY:
            for address, size in ch_wire.ranges_of(ch_wire.exactly(connection, asked.length)):
                content = bytes(ch_wire.exactly(connection, size))
                ctypes.memmove(self.memory(address // PAGE), content, size)
            ch_wire.respond(connection)
        if asked.command != ch_wire.STATE:
            raise EOFError(f"command {asked.command} instead of the state")
        whole, part = Clock(), Clock()
        if self.wanted.late_reader:
            self.delay_of("handover")
        state = base64.b64decode(json.loads(ch_wire.exactly(connection, asked.length))["vcpus"])
        if not self.wanted.late_reader:
            self.delay_of("handover")
        received_ms, part = part.ms(), Clock()
        if self.wanted.fail == "refuse":
            ch_wire.respond(connection, ch_wire.ERROR)
            raise FailedError("Failed to complete migration for migratable component", "Migration was aborted")
        self.restore_all(state)
        self.monitor.log(f"Migration (incoming): recv_snapshot:{received_ms}ms restore:{part.ms()}ms")
        ch_wire.respond(connection)
        if ch_wire.next_request(connection).command != ch_wire.COMPLETE:
            raise EOFError("no Complete")
        part = Clock()
        self.resume()
        self.monitor.log(f"Migration (incoming): resume:{part.ms()}ms")
        self.monitor.log(f"Migration (incoming): Receiving final state and resuming the VM took {whole.ms()}ms")
        ch_wire.respond(connection)

    def delay_of(self, phase: str) -> None:
        """Like `delay`, with the real plan: this object's plan has no vCPUs."""
        self.plan, plan = self.wanted, self.plan
        self.delay(phase)
        self.plan = plan

    def restore_all(self, state: bytes) -> None:
        """Creates the vCPUs, then their threads, each of which runs once with immediate_exit."""
        supported_cpuid(self.vm)
        self.vcpus = []
        for index in range(self.wanted.vcpus):
            if not index:
                self.enter("state.load")
            self.vcpus.append(Vcpu(self.vm, index))
            if not index:
                self.entered()
        self.plan, plan = replace(self.wanted), self.plan
        first = len(self.marks)
        self.restore(state)
        del self.marks[first : first + 1]  # state.load began with the creation of the vCPUs
        self.plan = plan
        self.monitor.event("restoring")
        self.threads = [ChVcpuThread(vcpu) for vcpu in self.vcpus]
        self.monitor.event("restored")

    def resume(self) -> None:
        """Sets the clock, waits for the delay and starts the vCPUs. Then polls every millisecond until they run."""
        self.monitor.event("resuming")
        self.delay_of("resume")
        self.vm.set_clock()
        for thread in self.threads:
            thread.start()
        while not all(thread.entered_ns for thread in self.threads):
            time.sleep(LOOK_S)
        entered = [thread.entered() for thread in self.threads]
        self.marks.append((max(since for since, _ in entered), max(by for _, by in entered), "end"))
        self.monitor.event("resumed")
