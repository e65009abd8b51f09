# SPDX-License-Identifier: Apache-2.0
"""Which processes own a KVM VM, and what can be said about them without asking them anything.

In: /proc. Out: `Vm`s. A process that may not be read, or that dies meanwhile, owns no VM.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ebpf_mig.linux.procfs import in_kvm_run, threads_of
from ebpf_mig.vmm import vmm_named

_KVM_VM = "anon_inode:kvm-vm"
_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
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
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            vm = vm_of(int(entry.name))
            if vm is not None:
                found[vm.pid] = vm
    return found


def vm_of(pid: int) -> Vm | None:
    """The VM that the process owns, None if it owns none."""
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            if not any(_is_vm(entry.path) for entry in entries):
                return None
        comm = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()[: 1 << 16]
    except OSError:
        return None
    started = start_time(pid)
    if started is None:
        return None
    return Vm(pid, started, vmm_named(comm) or "unknown", name_in(command.decode(errors="replace").split("\0")))


def _is_vm(path: str) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(path) == _KVM_VM  # noqa: PTH115 - a node has many descriptors
    return False


def start_time(pid: int) -> int | None:
    """When the process began, in ticks since boot; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def name_in(arguments: list[str]) -> str:
    """The VM's name in a command line: QEMU's last `-name` (libvirt writes `guest=NAME`), else a UUID, else nothing."""
    arguments = arguments[::-1]
    for value, option in itertools.pairwise(arguments):
        if option in ("-name", "--name", "--id"):
            guest = re.search(r"(?:^|,)guest=([^,]*)", value)
            return guest[1] if guest else value.split(",", 1)[0]
    for value, option in itertools.pairwise(arguments):
        if option in ("-uuid", "--uuid") and _UUID.fullmatch(value):
            return value
    return ""


def is_fresh(pid: int) -> bool:
    """Its guest has not run yet, as far as /proc tells: the VM may be waiting to be loaded.

    vCPU threads of a waiting VM have hardly used the CPU. That is asked of all threads but the first, which does the
    loading in QEMU. A guest that mostly sleeps does so inside KVM_RUN. Guest time (proc(5)) would be simpler, but
    stays 0 on some hosts.
    """
    for tid in threads_of(pid):
        if in_kvm_run(pid, tid) is not None or (tid != pid and _cpu_ticks(pid, tid) >= BUSY_TICKS):
            return False
    return True


def _cpu_ticks(pid: int, tid: int) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        fields = Path(f"/proc/{pid}/task/{tid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


def resident_bytes(pid: int) -> int:
    """Resident memory, 0 if the process is gone."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return 0


def listening_ports(pid: int) -> set[int]:
    """TCP ports on which the process listens, in its own network namespace."""
    found, inodes = set(), set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                kind, _, number = os.readlink(entry.path).partition(":")  # noqa: PTH115
                if kind == "socket":
                    inodes.add(number.strip("[]"))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    found.add(int(fields[1].rpartition(":")[2], 16))
    return found
