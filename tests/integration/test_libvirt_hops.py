# SPDX-License-Identifier: Apache-2.0
"""The delay of each process on the way of a tunnelled migration, beside a forwarder that knows its own delay."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from ebpf_mig.collector import analyse
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.libvirt.lab import LibvirtHosts
from tests.conftest import TRACING, requires
from tests.integration.test_libvirt import complete, migrate, result

pytestmark = requires(*TRACING, "libvirtd and virsh", "python3-libvirt", "private mount namespaces")

DELAY_S = 0.005


@dataclass(frozen=True)
class Held:
    """A chunk that was held back; instants of the monotonic clock, ns."""

    read: int
    late: int
    """How long the thread may have waited for a CPU between the read and its stamp, ns."""
    sending: int
    sent: int
    ends_state: bool
    """It has the end of the JSON that describes QEMU's state, with which the stream ends."""


def run_delay() -> int:
    """How long this thread has waited for a CPU so far, ns: the second figure of schedstat."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1])


class Between:
    """A forwarder between two libvirtds, which holds back each chunk for `DELAY_S`."""

    def __init__(self, listen: Path, target: Path) -> None:
        self._target, self._listener = target, socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen()
        self.held: list[Held] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self._listener.accept()[0], socket.socket(socket.AF_UNIX)
                far.connect(str(self._target))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            waited = run_delay()
            while data := one.recv(1 << 20):
                read, late = time.monotonic_ns(), run_delay() - waited
                time.sleep(DELAY_S)
                sending = time.monotonic_ns()
                other.sendall(data)
                self.held.append(Held(read, late, sending, time.monotonic_ns(), b"}]}" in data))
                waited = run_delay()
            other.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()


def test_the_delay_of_each_hop_of_a_tunnel(tmp_path: Path) -> None:
    """libvirtd, a forwarder that knows its own delay, and the other libvirtd, which say much more to each other after
    the stream.
    """
    path = tmp_path / "x.rec"
    scenario = Scenario(memory_bytes=128 * MIB, working_set_bytes=32 * MIB, pages_per_s=100)
    with LibvirtHosts(scenario) as hosts:
        target = Path(parse_qs(urlsplit(hosts.destination.uri).query)["socket"][0])
        with closing(Between(tmp_path / "between", target)) as between:
            to = f"qemu+unix:///system?socket={tmp_path}/between"
            done = migrate(hosts, path, "--tunnelled", "--bandwidth", "8MiB/s", to=to)
    b = result(done)
    complete(b)
    assert b.hops is not None
    near, hop, far = b.hops
    assert {near.process, far.process} <= {"libvirtd", "rpc-libvirtd"} and near.pid != far.pid
    assert hop.pid == os.getpid()
    (*_, last) = (one for one in between.held if one.ends_state)
    read = analyse(read_recording(path)).origin_ns + hop.sent + hop.unread_ns
    doubt = max(200_000, (last.sending - last.read) // 20)
    assert last.read - last.late - doubt <= read <= last.read + doubt, (hop, last)
    assert last.sending - last.read - doubt <= hop.held_ns <= last.sent - last.read + last.late + doubt, (hop, last)
    assert near.sent + near.delay_ns == hop.sent and hop.sent + hop.delay_ns == far.sent
