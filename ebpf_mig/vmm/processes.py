# SPDX-License-Identifier: Apache-2.0
"""Which process runs a VM that is known by a name, told by command lines in /proc.

In: a VM's name, a pattern of names, or a UUID. Out: pids. `Arrivals` waits for a process that starts later.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Collection

from ebpf_mig.linux import procfs
from ebpf_mig.vmm import vmm_named

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


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


def uuid_in(arguments: list[str]) -> str:
    """The VM's UUID in a command line, in lower case; empty if it has none."""
    pairs = itertools.pairwise(arguments[::-1])
    return next((v.lower() for v, o in pairs if o in ("-uuid", "--uuid") and _UUID.fullmatch(v)), "")


def runs(pid: int, wanted: str) -> bool:
    """Whether the process is a VMM, by its name, whose VM has that name or UUID. `wanted` may be a glob pattern."""
    if not vmm_named(procfs.comm(pid)):
        return False
    arguments = procfs.command_line(pid)
    name = name_in(arguments)
    return wanted.lower() == uuid_in(arguments) or (name != "" and fnmatch.fnmatchcase(name, wanted))


def find(wanted: str) -> list[int]:
    """The pids of all such processes, oldest first."""
    found = [pid for pid in procfs.processes() if runs(pid, wanted)]
    return sorted(found, key=lambda pid: (procfs.start_time(pid) or 0, pid))


class Arrivals:
    """Processes of a VM that start from now on. Cheap enough to be asked every few ms."""

    def __init__(self, wanted: str, known: Collection[int] = ()) -> None:
        """`known`: pids that are not to be found. Processes that run already count as known, too."""
        self._wanted = wanted
        self._known = {*procfs.processes(), *known}

    def new(self) -> list[int]:
        """Those that have started since they were last asked for.

        A process that is none of them is asked again each time: it may be about to call execve(2).
        """
        here = procfs.processes()
        self._known.intersection_update(here)  # a pid can come again
        found = [pid for pid in here if pid not in self._known and runs(pid, self._wanted)]
        self._known.update(found)
        return found
