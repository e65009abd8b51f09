# SPDX-License-Identifier: Apache-2.0
"""Common to both sides of the truth machine as Cloud Hypervisor: the plan, a vCPU thread, a clock.

In: nothing. Out: classes. Order and threads: vmm/src/cpu.rs (v52 and v53).
"""

from __future__ import annotations

import ctypes
import threading
import time
from dataclasses import dataclass

from tests.truth import kvm
from tests.truth.parts import Plan, VcpuThread

GET_SUPPORTED_CPUID, KVMCLOCK_CTRL = 0xC008AE05, 0xAEAD
LOOK_S = 0.001
"""Interval at which it polls whether its vCPUs have stopped or started."""


def supported_cpuid(vm: kvm.Vm) -> None:
    """Calls KVM_GET_SUPPORTED_CPUID, as both sides do repeatedly."""
    answer = ctypes.create_string_buffer((256).to_bytes(8, "little"), 8 + 256 * 40)
    kvm.ioctl(vm.kvm, GET_SUPPORTED_CPUID, answer)


class ChVcpuThread(VcpuThread):
    """After its creation and after each stop it enters KVM_RUN with immediate_exit, which runs no guest code."""

    def __init__(self, vcpu: kvm.Vcpu) -> None:
        self._born = threading.Event()
        super().__init__(vcpu)
        self._born.wait()

    def _loop(self) -> None:
        self.left()
        self._born.set()
        super()._loop()

    def left(self) -> None:
        """Completes work that an exit may have left pending."""
        self.vcpu.hurry(True)
        self.vcpu.run()


@dataclass
class ChPlan(Plan):
    """One run of a pair."""

    manner: str = "v53"
    """v46, v52 or v53."""
    directory: str = ""
    fail: str = ""
    """`save`: the source fails while it saves state. `refuse`: the destination answers the state with an error."""

    def path(self, name: str) -> str:
        return f"{self.directory}/{name}"


class FailedError(Exception):
    """A failure of the migration that the plan asks for."""


class Clock:
    """Durations by the machine's own clock in whole ms, as in its log."""

    def __init__(self) -> None:
        self.begin = time.monotonic_ns()

    def ms(self) -> int:
        return (time.monotonic_ns() - self.begin) // 1_000_000
