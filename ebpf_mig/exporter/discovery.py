# SPDX-License-Identifier: Apache-2.0
"""Which processes own a KVM VM, and what can be said about them without asking them anything.

In: /proc. Out: `Vm`s. A process that may not be read, or that dies meanwhile, owns no VM.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebpf_mig.linux import procfs
from ebpf_mig.vmm import vmm_named
from ebpf_mig.vmm.processes import name_in

BUSY_TICKS = 5
"""CPU time, in hundredths of a second, that no vCPU thread uses before its guest runs."""


@dataclass(frozen=True)
class Vm:
    """A process that owns a KVM VM."""

    pid: int
    started: int
    """Clock ticks from boot to its start: tells a pid from its next user."""
    vmm: str
    """qemu, cloud-hypervisor, firecracker or unknown; a hint by name."""
    name: str
    """As its command line has it: whatever a tenant chose. Empty if it has none."""


def find_vms() -> dict[int, Vm]:
    """All processes of the node that own a VM. Reads every file descriptor of the node: call it seldom."""
    found = (vm_of(pid) for pid in procfs.processes())
    return {vm.pid: vm for vm in found if vm is not None}


def vm_of(pid: int) -> Vm | None:
    """The VM that the process owns, None if it owns none."""
    if not procfs.holds_vm(pid):
        return None
    comm, arguments, started = procfs.comm(pid), procfs.command_line(pid), procfs.start_time(pid)
    return None if started is None else Vm(pid, started, vmm_named(comm) or "unknown", name_in(arguments))


def is_fresh(pid: int) -> bool:
    """Its guest has not run yet, as far as /proc tells: the VM may be waiting to be loaded.

    vCPU threads of a waiting VM have hardly used the CPU. That is asked of all threads but the first, which does the
    loading in QEMU. A guest that mostly sleeps does so inside KVM_RUN. Guest time (proc(5)) would be simpler, but
    stays 0 on some hosts.
    """
    for tid in procfs.threads_of(pid):
        if procfs.in_kvm_run(pid, tid) is not None or (tid != pid and procfs.cpu_ticks(pid, tid) >= BUSY_TICKS):
            return False
    return True
