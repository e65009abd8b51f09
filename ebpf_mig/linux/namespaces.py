# SPDX-License-Identifier: Apache-2.0
"""Ids and clocks of namespaces. BPF programs use the initial namespaces: the thread ids and the clock of the host.

In: /proc. Out: whether this process uses the host's ids and users; a mapping from the ids of another pid namespace to
the host's; the offset between the clock of this process's time namespace and the host's.
Facts: include/linux/proc_ns.h (inodes of the initial namespaces), fs/proc/array.c (`NSpid`), kernel/time/namespace.c
(`timens_offsets`), Linux 6.12.
"""

from __future__ import annotations

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import procfs

_PID_INODE, _TIME_INODE, _USER_INODE = 0xEFFFFFFC, 0xEFFFFFFA, 0xEFFFFFFD


def has_host_pids() -> bool:
    """Whether this process and its /proc are in the initial pid namespace."""
    try:
        return procfs.inode("self", "ns", "pid") == _PID_INODE and len(procfs.fields("self")["NSpid"].split()) == 1
    except (OSError, KeyError):
        return False


def require_host_pids() -> None:
    """PreflightError in another pid namespace: the kernel's thread ids would not match those in /proc."""
    if not has_host_pids():
        raise PreflightError(
            "this process or its /proc is not in the host's pid namespace, so its pids differ from the kernel's",
            "run it in the host's: --pid=host (docker, podman), hostPID: true (Kubernetes), or nsenter -t 1 -p -m",
        )


def has_host_users() -> bool:
    """Whether this process is in the initial user namespace. Only there do capabilities count for BPF."""
    try:
        return procfs.inode("self", "ns", "user") == _USER_INODE
    except OSError:  # a kernel without user namespaces
        return True


def require_host_users() -> None:
    """PreflightError in another user namespace: the kernel looks for CAP_BPF in the initial one (bpf_capable)."""
    if not has_host_users():
        raise PreflightError(
            "this process is in a user namespace, where root may not load BPF programs",
            "run it as the host's root: not in a rootless container, without user namespaces (hostUsers: true)",
        )


def host_tids(pid: int) -> dict[int, int] | None:
    """The host's thread id of each thread, by its id in the pid namespace of the process.

    None if the process uses the host's ids, or is gone.
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
