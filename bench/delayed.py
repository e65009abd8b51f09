# SPDX-License-Identifier: Apache-2.0
"""One traced migration over a link that delays every byte: a regression of known size, for testing a gate.

    ebpf-mig bench -n 12 -o slow.json -- python -m bench.delayed {recording} 30

In: the recording's file and the delay of each direction in ms; 0 relays without delay. Needs root and /dev/kvm.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import socket
import sys
import threading
import time

from ebpf_mig.commands import run
from ebpf_mig.lab.scenario import Scenario
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.vmm.qemu.migration import QemuMigration, QemuOptions

_CHUNK = 1 << 20
_WAITING = 64


def forward(source: socket.socket, target: socket.socket, delay_s: float) -> None:
    """Forwards bytes from one socket to the other, each chunk `delay_s` after it arrived, and then the end of the
    stream.
    """
    waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(_WAITING)

    def deliver() -> None:
        with contextlib.suppress(OSError):
            while (item := waiting.get())[1]:
                time.sleep(max(0.0, item[0] - time.monotonic()))
                target.sendall(item[1])
            target.shutdown(socket.SHUT_WR)

    out = threading.Thread(target=deliver, daemon=True)
    out.start()
    data = b"x"
    while data:
        try:
            data = source.recv(_CHUNK)
        except OSError:
            data = b""
        waiting.put((time.monotonic() + delay_s, data))


def relay(port: int, delay_s: float) -> int:
    """Listens on a new port for one connection and forwards it to `port`. Returns the new port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", port))
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=forward, args=(far, near, delay_s), daemon=True).start()
        forward(near, far, delay_s)

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


class Relayed(QemuMigration):
    """Listens on the scenario's port, and migrates to the relay's port."""

    def __init__(self, source: str, destination: str, uri: str, options: QemuOptions, delay_s: float) -> None:
        super().__init__(source, destination, uri, options)
        self._delay_s = delay_s

    def prepare(self) -> None:
        """The destination listens before its address is replaced by the relay's."""
        super().prepare()
        self.uri = f"tcp:127.0.0.1:{relay(int(self.uri.rpartition(':')[2]), self._delay_s)}"


def main() -> None:
    """See the module."""
    recording, delay_s = sys.argv[1], float(sys.argv[2]) / 1000
    with QemuPair(Scenario()) as pair:
        time.sleep(0.3)
        migration = Relayed(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options(), delay_s)
        with contextlib.closing(migration):
            writer = functools.partial(run.open_recording, recording, "delayed", force=False)
            outcome, _ = run.trace_migration(migration, 60, writer)
    sys.exit(outcome.error or 0)


if __name__ == "__main__":
    main()
