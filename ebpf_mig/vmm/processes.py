# SPDX-License-Identifier: Apache-2.0
"""Finds the processes of a VM by its name, from command lines in /proc.

In: a VM's name, a pattern of names, or a UUID. Out: pids. A VM that migrates within this host has two processes. The
destination's starts during the migration; `Arrivals` and `Followed` wait for it.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import re
import time
from collections.abc import Collection

from ebpf_mig.errors import UsageError
from ebpf_mig.linux import clock, procfs
from ebpf_mig.text import printable
from ebpf_mig.vmm import adapter, vmm_named

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


_VCPU = re.compile(r"CPU \d+/KVM|(?:fc_)?vcpu ?\d+", re.ASCII)


def is_vcpu(thread: str) -> bool:
    """Whether a thread's name is that of a vCPU, a hint: `CPU 3/KVM` (QEMU with debug-threads=on, as with libvirt),
    `vcpu3` (Cloud Hypervisor), `fc_vcpu 3` (Firecracker).
    """
    return bool(_VCPU.fullmatch(thread))


def name_in(arguments: list[str]) -> str:
    """The VM's name in a command line: QEMU's last `-name` with one (libvirt writes `guest=NAME`), else a UUID, else
    nothing. A `-name` can also have other keys only, for example `debug-threads=on`.
    """
    arguments = arguments[::-1]
    for value, option in itertools.pairwise(arguments):
        if option in ("-name", "--name", "--id"):
            guest = re.search(r"(?:^|,)guest=([^,]*)", value)
            first = value.split(",", 1)[0]
            if guest or "=" not in first:
                return guest[1] if guest else first
    for value, option in itertools.pairwise(arguments):
        if option in ("-uuid", "--uuid") and _UUID.fullmatch(value):
            return value
    return ""


def uuid_in(arguments: list[str]) -> str:
    """The VM's UUID in a command line, in lower case; empty if it has none."""
    pairs = itertools.pairwise(arguments[::-1])
    return next((v.lower() for v, o in pairs if o in ("-uuid", "--uuid") and _UUID.fullmatch(v)), "")


def vmm_of(pid: int) -> str:
    """The VMM that a process is by its name, or else by its program's, a hint; empty if none.

    QEMU takes another name with `-name process=NAME` (prctl(2), PR_SET_NAME, in `os_set_proc_name`, os-posix.c).
    """
    return vmm_named(procfs.comm(pid)) or vmm_named(procfs.program(pid))


def may_move_plainly(pid: int) -> bool:
    """Whether the process may write its guest to files by write(2), or read it by read(2)."""
    vmm = vmm_of(pid)
    return not vmm or adapter(vmm).plain_files


def runs(pid: int, wanted: str) -> bool:
    """Whether the process is a VMM whose VM has that name or UUID. `wanted` may be a glob pattern."""
    if not vmm_of(pid):
        return False
    arguments = procfs.command_line(pid)
    name = name_in(arguments)
    return wanted.lower() == uuid_in(arguments) or (name != "" and fnmatch.fnmatchcase(name, wanted))


def find(wanted: str) -> list[int]:
    """The pids of all matching processes, oldest first."""
    found = [pid for pid in procfs.processes() if runs(pid, wanted)]
    return sorted(found, key=lambda pid: (procfs.start_time(pid) or 0, pid))


SEARCH_INTERVAL_NS = 10_000_000
"""Time between two scans of all processes. QEMU takes about 100 ms before it loads anything."""
_SHARE = 20
"""Largest share of a CPU spent scanning: a node can have thousands of processes. Where CPUs are scarce, a scan takes
long, and a process that starts must be found soon all the same.
"""


class Arrivals:
    """Processes of a VM that start from now on. Callers may poll it often; it limits its scans."""

    def __init__(self, wanted: str, known: Collection[int] = ()) -> None:
        """`known`: pids to leave out. Processes that already run are left out, too."""
        self.wanted = wanted
        self._known = {*procfs.processes(), *known}
        self._due_ns = 0

    def new(self) -> list[int]:
        """Processes that started since the last call.

        A process that does not match is checked again each time: it may be about to call execve(2).
        """
        begin = clock.monotonic_ns()
        if begin < self._due_ns:
            return []
        spent = time.thread_time_ns()
        here = procfs.processes()
        self._known.intersection_update(here)  # pids are reused
        found = [pid for pid in here if pid not in self._known and runs(pid, self.wanted)]
        self._known.update(found)
        self._due_ns = begin + max(SEARCH_INTERVAL_NS, _SHARE * (time.thread_time_ns() - spent))
        return found


class Followed:
    """The source's and the destination's process of one VM, whenever each starts."""

    def __init__(self, wanted: str) -> None:
        """UsageError if several VMs or more than two processes match the name now."""
        self.pids = find(wanted)
        names = {name_in(procfs.command_line(pid)) for pid in self.pids}
        if len(names) > 1:
            several = ", ".join(sorted(printable(name, 40) for name in names)[:8])
            raise UsageError(f"{printable(wanted)} fits several VMs: {several}", "name one of them")
        if len(self.pids) > 2:
            raise UsageError(
                f"{printable(wanted)} is run by {len(self.pids)} processes", "choose two of them with --pid"
            )
        self._wanted = wanted
        self._arrivals = Arrivals(wanted, self.pids)
        self._name(names)

    def new(self) -> list[int]:
        """Processes that started since the last call; at most two in total."""
        found = self._arrivals.new()[: 2 - len(self.pids)] if len(self.pids) < 2 else []
        if found and not self.pids:
            self._name({name_in(procfs.command_line(found[0]))})
        self.pids += found
        return found

    def _name(self, names: Collection[str]) -> None:
        """Once a VM has matched the pattern, other VMs that match are ignored."""
        name = next(iter(names), "")
        if name and self._wanted.lower() not in map(uuid_in, map(procfs.command_line, self.pids)):
            self._arrivals.wanted = glob.escape(name)
