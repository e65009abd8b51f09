# SPDX-License-Identifier: Apache-2.0
"""Whether a process listens at the address of a migration, according to its /proc.

In: a pid and `tcp:HOST:PORT` or `unix:PATH`. Out: yes or no. A trial connection would be taken for the migration. The
path of a socket exists before it listens, and the same port may be open in another network namespace.
"""

from __future__ import annotations

from ebpf_mig.linux import sockets


def listens(pid: int, url: str) -> bool:
    """Whether a socket of the process listens there; also False if its /proc cannot be read."""
    kind, _, rest = url.partition(":")
    if kind == "unix":
        return sockets.listens_at(pid, rest)
    port = rest.rpartition(":")[2]
    return port.isdecimal() and int(port) in sockets.listening_ports(pid)
