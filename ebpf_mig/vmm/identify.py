# SPDX-License-Identifier: Apache-2.0
"""Finds the process that serves a VMM's control socket.

In: the path of a socket on this host. Out: a pid. Used when a recorder gets a socket from another
host, which does not know the pids of this host.
"""

from __future__ import annotations

import socket

from ebpf_mig.errors import VmmError
from ebpf_mig.linux import descriptors
from ebpf_mig.linux.sockets import peer_pid
from ebpf_mig.vmm import adapters

_REMEDY = "give the socket's path as it is on that host, or use --pid"


def process_behind(path: str) -> int:
    """The pid; VmmError if no VMM listens at the socket.

    It is the socket's creator (SO_PEERCRED) if that process has KVM open. Otherwise a manager created it, and the VMMs
    are asked.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.settimeout(5)
            probe.connect(path)
            peer = peer_pid(probe)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise VmmError(f"cannot connect to the VMM's socket {path}: {why}", _REMEDY) from error
    if descriptors.holds_kvm(peer):
        return peer
    problem = VmmError(f"no VMM serves {path}", _REMEDY)
    for adapter in adapters():
        try:
            if (pid := adapter.process_behind(path)) is not None:
                return pid
        except VmmError as error:
            problem = error
    raise problem
