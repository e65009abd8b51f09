# SPDX-License-Identifier: Apache-2.0
"""What a process has open: a VM and its vCPUs, and the sockets, pipes and files that can carry a migration.

In: a process id, a descriptor's number. Out: links of /proc/PID/fd, or what they say. A process can close a descriptor
and end at any time. Only `carrier_key` raises then; all raise PreflightError as `procfs` does.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator

from ebpf_mig.linux import procfs

_UNPLACED = re.compile(r"(?:socket|pipe):\[(\d+)\]", re.ASCII)
_VM, _VCPU = "anon_inode:kvm-vm", "anon_inode:kvm-vcpu:"
"""Link texts: kvm_dev_ioctl_create_vm and create_vcpu_fd in virt/kvm/kvm_main.c."""


def links(pid: int) -> Iterator[tuple[int, str]]:
    """(number, link target) of each open descriptor; none if the process is gone or access is denied."""
    try:
        found = procfs.names(pid, "fd")
    except (OSError, ValueError):
        return
    for name in found:
        with contextlib.suppress(OSError, ValueError):
            yield int(name), procfs.link(pid, "fd", name)


def may_read(pid: int) -> bool:
    """False if access is denied. AppArmor lets a process list another one's descriptors, and hides what they are."""
    try:
        for name in procfs.names(pid, "fd"):
            with contextlib.suppress(ProcessLookupError):  # closed since
                procfs.link(pid, "fd", name)
                return True
    except OSError:
        return False
    return True


PLACED = 1 << 61
"""Set in the key of a file or a named pipe, see `carrier_key` and bpf/sockets.h."""
_BLOCK_DEVICE = 0x1FFFFF << 40
"""In place of the file system's device number in the key of a block device."""


def carrier_key(pid: int, descriptor: int | str) -> int | None:
    """The key of an open socket, pipe or file, as in `Transfer.socket`; None: another kind. Raises as `procfs.read`.

    The device number is the kernel's own (include/linux/kdev_t.h). btrfs shows another one to user space.
    """
    target = procfs.link(pid, "fd", descriptor)
    if match := _UNPLACED.fullmatch(target):
        return int(match[1])
    if not target.startswith("/"):
        return None
    found = procfs.status(pid, "fd", descriptor)
    if stat.S_ISBLK(found.st_mode):
        return PLACED | _BLOCK_DEVICE | os.major(found.st_rdev) << 20 | os.minor(found.st_rdev)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode)):
        return None
    device = os.major(found.st_dev) << 20 | os.minor(found.st_dev)
    return PLACED | (device & 0x1FFFFF) << 40 | found.st_ino & 0xFFFFFFFFFF


def carrier_descriptor(pid: int, key: int) -> int | None:
    """The descriptor of a carrier that a process has open; None if it has closed it, -1 if that cannot be read."""
    unplaced = (f"socket:[{key}]", f"pipe:[{key}]")
    try:
        found = procfs.names(pid, "fd")
        for name in found:
            with contextlib.suppress(ProcessLookupError):
                target = procfs.link(pid, "fd", name)
                if target in unplaced or (key & PLACED and target.startswith("/") and carrier_key(pid, name) == key):
                    return int(name)
    except OSError:
        return -1
    return None


def holds_vm(pid: int) -> bool:
    """Whether the process has a KVM VM open; False if access is denied."""
    return any(target == _VM for _, target in links(pid))


def holds_kvm(pid: int) -> bool:
    """Whether the process has a KVM VM or /dev/kvm open. A VMM that waits for its VM has /dev/kvm open."""
    return any(target in (_VM, "/dev/kvm") for _, target in links(pid))


def vcpus_of(pid: int) -> dict[int, int]:
    """KVM's id of each vCPU (on x86 its APIC id), by descriptor."""
    pairs = ((fd, target.removeprefix(_VCPU)) for fd, target in links(pid) if target.startswith(_VCPU))
    return {fd: int(number) for fd, number in pairs if number.isdecimal()}
