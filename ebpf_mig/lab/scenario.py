# SPDX-License-Identifier: Apache-2.0
"""What a demo or a benchmark runs: the guest, its pace and the settings of the migration. Plain values, checked
once.
"""

from __future__ import annotations

import fcntl
import os
import platform
from dataclasses import dataclass

from ebpf_mig.errors import PreflightError, UsageError
from ebpf_mig.lab.guest import FIRST_BYTE, build_guest
from ebpf_mig.lab.guest_arm64 import build_arm64_guest
from ebpf_mig.linux import kvm

MIB = 1 << 20
ARM64 = platform.machine() == "aarch64"
_UNPACED = 10_000
"""Pages/s that an emulated vCPU reaches even when it shares a core with three others."""


@dataclass(frozen=True)
class Scenario:
    """One guest and how it is migrated."""

    memory_bytes: int = 256 * MIB
    working_set_bytes: int = 16 * MIB
    """Per vCPU."""
    pages_per_s: int | None = 10_000
    """Per vCPU; None: as fast as possible."""
    vcpus: int = 1
    transport: str = "tcp"
    multifd_channels: int | None = None
    downtime_ms: int | None = None
    bandwidth_bytes: int | None = 0
    """0 is unlimited, None leaves the VMM's own default."""
    postcopy: bool = False
    dirty_ring: int | None = None
    auto_converge: bool = False
    tunnelled: bool = False
    """Through the VMs' managers."""

    def fill_s(self) -> float:
        """The approximate time in which a vCPU writes its working set for the first time. Then comes its first beat."""
        return self.working_set_bytes / 4096 / _UNPACED

    def guest(self) -> bytes:
        """The guest's ELF; UsageError if the numbers do not fit together."""
        needed = FIRST_BYTE + self.vcpus * self.working_set_bytes
        if needed > self.memory_bytes:
            raise UsageError(
                f"{self.vcpus} working sets of {self.working_set_bytes // MIB} MiB do not fit into "
                f"{self.memory_bytes // MIB} MiB of memory",
                f"use --memory {-(-needed // MIB)}MiB or more",
            )
        try:
            if ARM64:
                return build_arm64_guest(self.vcpus, self.working_set_bytes, self.pages_per_s)
            return build_guest(self.vcpus, self.working_set_bytes, self.pages_per_s, tsc_khz())
        except ValueError as error:
            raise UsageError(f"no guest can be made of these numbers: {error}") from error


def require_x86(manager: str) -> None:
    """PreflightError on arm64, for a lab whose VMs are described for x86-64 only."""
    if ARM64:
        raise PreflightError(f"the lab has no VMs of {manager} for arm64", "use the default VMM, or your own VMs")


def tsc_khz() -> int:
    """The TSC frequency that a new vCPU sees (KVM_GET_TSC_KHZ on a throw-away VM); PreflightError without KVM."""
    opened: list[int] = []
    try:
        opened.append(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        opened.append(fcntl.ioctl(opened[-1], kvm.CREATE_VM, 0))
        opened.append(fcntl.ioctl(opened[-1], kvm.CREATE_VCPU, 0))
        return fcntl.ioctl(opened[-1], kvm.GET_TSC_KHZ, 0)
    except OSError as error:
        raise PreflightError(
            f"KVM cannot be used: /dev/kvm: {error.strerror}",
            "load kvm_intel or kvm_amd (in a VM: enable nested virtualisation), and run as root or in group kvm",
        ) from error
    finally:
        for fd in reversed(opened):
            os.close(fd)
