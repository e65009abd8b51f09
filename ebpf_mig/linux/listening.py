# SPDX-License-Identifier: Apache-2.0
"""Whether a process listens where a migration shall go to, told by its own /proc.

In: a pid and `tcp:HOST:PORT` or `unix:PATH`. Out: yes or no. A trial connection would be taken for the migration; a
socket's path exists before it listens, and a port of the same number may be another network namespace's.
"""

from __future__ import annotations

from ebpf_mig.linux import sockets


def listens(pid: int, url: str) -> bool:
    """Whether a socket of the process listens there; False as well if its /proc cannot be read."""
    kind, _, rest = url.partition(":")
    if kind == "unix":
        return sockets.listens_at(pid, rest)
    port = rest.rpartition(":")[2]
    return port.isdecimal() and int(port) in sockets.listening_ports(pid)
