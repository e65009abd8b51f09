# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig relay`: connects a UNIX socket to standard input and output, for the other host of `migrate
--remote-command`.
"""

from __future__ import annotations

import os
import select
import socket

import click

from ebpf_mig.commands.options import examples
from ebpf_mig.errors import VmmError

_CHUNK = 1 << 16


@click.command("relay", epilog=examples("ebpf-mig relay /run/vm1.sock"))
@click.argument("path")
def command(path: str) -> None:
    """Connect a VMM's socket to standard input and output, until either closes.

    `migrate --remote-command` runs this on the other host. It does not listen on any port.
    """
    with socket.socket(socket.AF_UNIX) as peer:
        try:
            peer.connect(path)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise VmmError(f"cannot connect to {path}: {why}", "give its path as it is on this host") from error
        while True:
            ready, _, _ = select.select([0, peer.fileno()], [], [])
            if 0 in ready:
                data = os.read(0, _CHUNK)
                if not data:
                    return
                peer.sendall(data)
            if peer.fileno() in ready:
                data = peer.recv(_CHUNK)
                if not data:
                    return
                while data:
                    data = data[os.write(1, data) :]
