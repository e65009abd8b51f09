# SPDX-License-Identifier: Apache-2.0
"""Ids and clocks of namespaces. BPF programs see the initial ones: the host's thread ids and the host's clock.

In: /proc. Out: whether this process shares the host's ids; ids of a process's own pid namespace as the host's; how far
the clock of this process's time namespace is from the host's.
Facts: include/linux/proc_ns.h (inodes of the initial namespaces), fs/proc/array.c (`NSpid`), kernel/time/namespace.c
(`timens_offsets`), Linux 6.12.
"""

from __future__ import annotations

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import procfs

_PID_INODE, _TIME_INODE = 0xEFFFFFFC, 0xEFFFFFFA


def has_host_pids() -> bool:
    """Whether this process and its /proc are in the initial pid namespace."""
    try:
        return procfs.inode("self", "ns", "pid") == _PID_INODE and len(procfs.fields("self")["NSpid"].split()) == 1
    except (OSError, KeyError):
        return False


def require_host_pids() -> None:
    """PreflightError in a pid namespace of our own: the kernel's thread ids would be none of those that we know."""
    if not has_host_pids():
        raise PreflightError(
            "this process, or its /proc, is in a pid namespace whose ids are not those that the kernel traces by",
            "run it in the host's: --pid=host (docker, podman), hostPID: true (Kubernetes), or nsenter -t 1 -p -m",
        )


def host_tids(pid: int) -> dict[int, int] | None:
    """The host's thread ids by those that the process itself uses, in its pid namespace.

    None if the process uses the host's, or is gone.
    """
    try:
        if len(procfs.fields(pid).get("NSpid", "").split()) < 2:
            return None
    except OSError:
        return None
    found = {}
    for tid in procfs.threads_of(pid):
        try:
            own = procfs.fields(pid, tid).get("NSpid", str(tid)).split()[-1]
        except OSError:
            continue
        found[int(own)] = tid
    return found


def clock_ahead_ns() -> int:
    """How far this process's CLOCK_MONOTONIC is ahead of the host's."""
    try:
        if procfs.inode("self", "ns", "time") == _TIME_INODE:
            return 0
        rows = (line.split() for line in procfs.text("self", "timens_offsets").splitlines())
        offsets = {row[0]: int(row[1]) * 10**9 + int(row[2]) for row in rows if len(row) == 3}
    except (OSError, ValueError):  # no time namespaces before Linux 5.6
        return 0
    return offsets.get("monotonic", 0)
