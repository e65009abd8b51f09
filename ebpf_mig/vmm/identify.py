# SPDX-License-Identifier: Apache-2.0
"""Which process serves a VMM's socket.

In: the path of a QMP or API socket on this host. Out: a pid. Used where a recorder is told a socket by another host,
which cannot know pids here.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path

from ebpf_mig.errors import VmmError
from ebpf_mig.vmm.qemu.monitor import Monitor

_REMEDY = "give the socket's path as it is on that host, or use --pid"


def process_behind(path: str) -> int:
    """The pid; VmmError if nobody listens there, or no VMM does.

    It is the socket's maker (SO_PEERCRED) if that has KVM open. libvirt makes QEMU's socket: then QMP is asked.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.settimeout(5)
            probe.connect(path)
            peer: int = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise VmmError(f"cannot connect to the VMM's socket {path}: {why}", _REMEDY) from error
    if _has_kvm(peer):
        return peer
    return asyncio.run(_by_qmp(path))


async def _by_qmp(path: str) -> int:
    monitor = await Monitor.open(path, "traced")
    try:
        return await monitor.pid()
    finally:
        await monitor.close()


def _has_kvm(pid: int) -> bool:
    try:
        return any("kvm" in str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink())
    except OSError:
        return False
