# SPDX-License-Identifier: Apache-2.0
"""Finds the processes that own a KVM VM, and describes them from /proc alone.

In: /proc. Out: `Vm`s. A process that cannot be read, or that dies meanwhile, counts as owning no VM.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebpf_mig.linux import descriptors, procfs
from ebpf_mig.vmm import adapter
from ebpf_mig.vmm.processes import is_vcpu, name_in, vmm_of

BUSY_TICKS = 5
"""CPU time, in hundredths of a second. A vCPU thread uses less than this before its guest runs."""


@dataclass(frozen=True)
class Vm:
    """A process that owns a KVM VM."""

    pid: int
    started: int
    """Clock ticks from boot to its start. Distinguishes it from a later process with the same pid."""
    vmm: str
    """qemu, cloud-hypervisor, firecracker or unknown; guessed from the process's name or its program's."""
    name: str
    """From its command line; tenants may choose it. Empty if there is none."""
    awaits_update: bool = False
    """It waits to take over the VM of another process (CPR), and has none of its own yet."""


def find_vms() -> dict[int, Vm]:
    """All processes of the node that own a VM. Reads all file descriptors of the node, so call it rarely."""
    found = (vm_of(pid) for pid in procfs.processes())
    return {vm.pid: vm for vm in found if vm is not None}


def vm_of(pid: int) -> Vm | None:
    """The VM that the process owns, or waits to take over; or None."""
    owns, vmm = descriptors.holds_vm(pid), vmm_of(pid)
    if not owns and not vmm:
        return None
    arguments, started = procfs.command_line(pid), procfs.start_time(pid)
    if started is None or not (owns or adapter(vmm).awaits_live_update(arguments)):
        return None
    return Vm(pid, started, vmm or "unknown", name_in(arguments), awaits_update=not owns)


def is_fresh(pid: int) -> bool:
    """Whether the guest has not run yet, according to /proc. The VM may be waiting to be loaded.

    The vCPU threads of a waiting VM have used almost no CPU time. If the threads' names do not say which these are, all
    but the first are checked; in QEMU the first one does the loading. A guest that mostly sleeps does so inside
    KVM_RUN. Guest time (proc(5)) would be simpler, but stays 0 on some hosts.
    """
    threads = procfs.threads_of(pid)
    vcpus = [tid for tid in threads if is_vcpu(procfs.comm(pid, tid))]
    if not vcpus or len(vcpus) < len(descriptors.vcpus_of(pid)):
        vcpus = [tid for tid in threads if tid != pid]
    if any(procfs.cpu_ticks(pid, tid) >= BUSY_TICKS for tid in vcpus):
        return False
    return all(procfs.in_kvm_run(pid, tid) is None for tid in threads)
