# SPDX-License-Identifier: Apache-2.0
"""What /proc tells of a process's threads before the probes see them.

In: pids and thread ids. Out: names, ids, and which vCPU a thread is inside of. A thread that is gone is no error.
"""

from __future__ import annotations

from pathlib import Path

from ebpf_mig.linux import kvm

_PF_USER_WORKER = 0x4000
"""include/linux/sched.h, Linux 6.4: a thread of the process that never runs in user space."""


def comm(pid: int, tid: int) -> str:
    """A thread's name, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/task/{tid}/comm").read_text().strip()
    except OSError:
        return ""


def threads_of(pid: int) -> list[int]:
    """The thread ids of a process, none if it is gone."""
    return [int(task.name) for task in Path(f"/proc/{pid}/task").glob("[0-9]*")]


def in_kvm_run(pid: int, tid: int) -> int | None:
    """The vCPU's descriptor if a thread sleeps inside KVM_RUN, else None.

    /proc/PID/task/TID/syscall begins with ioctl's number, fd, request.
    Since Linux 6.13 a VM's `kvm-nx-lpage-recovery` is among its threads, born inside a vCPU's KVM_RUN and showing its
    registers for ever; the flags in `stat` give it away.
    """
    try:
        fields = Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()
        flags = int(Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()[6])
    except (OSError, ValueError, IndexError):
        return None
    asleep = len(fields) > 2 and fields[2] == hex(kvm.RUN) and not flags & _PF_USER_WORKER
    return int(fields[1], 16) if asleep else None
