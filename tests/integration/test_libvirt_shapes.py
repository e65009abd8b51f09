# SPDX-License-Identifier: Apache-2.0
"""Each way in which libvirt migrates, started by virsh, there and back, and seen by `record` and `watch` at the same
time. With EBPF_MIG_SHAPES=all, each is tested.

The witnesses are QEMU's own trace and a copied disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.lab.netns import ADDRESSES
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording.events import SEND, Transfer
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.vmm.libvirt import lab
from ebpf_mig.vmm.libvirt.lab import NAME, Host, LibvirtHosts
from tests.conftest import TRACING, long_but, requires
from tests.integration.ch_migrations import certificates
from tests.integration.exporters import PROGRAM, SETTLED_S, report, running
from tests.integration.shapes import ALL, whole
from tests.integration.stop_and_start import EVENTS, stop_and_start

pytestmark = [
    requires(*TRACING, "libvirtd and virsh", "python3-libvirt", "private mount namespaces"),
    pytest.mark.timeout(150),
]

LIBVIRTD = {"libvirtd", "rpc-libvirtd"}
"""What a libvirtd calls itself; its first thread may have the name of a worker."""
GUEST = Scenario(memory_bytes=128 * MIB, working_set_bytes=16 * MIB, pages_per_s=1000)
BUSY = Scenario(memory_bytes=128 * MIB, working_set_bytes=48 * MIB, pages_per_s=None)
"""Does not converge by itself, nor before virsh asks for postcopy."""
SCHEMA = "http://libvirt.org/schemas/domain/qemu/1.0"


class TracedHosts(LibvirtHosts):
    """QEMU traces when its guest stops and starts; each host has logs of its own."""

    TRACE = "var/log/libvirt/qemu.trace"

    def _xml(self, guest: Path) -> str:
        options = "".join(f"<qemu:arg value='{word}'/>" for word in [*EVENTS, "-D", f"/{self.TRACE}"])
        xml = super()._xml(guest).replace("<domain ", f"<domain xmlns:qemu='{SCHEMA}' ")
        return xml.replace("</domain>", f"<qemu:commandline>{options}</qemu:commandline></domain>")

    def ways(self) -> tuple[Host, Host]:
        """The host that has the domain, and the other one."""
        command = ["virsh", "-q", "-c", self.source.uri, "list", "--name"]
        here = NAME in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return (self.source, self.destination) if here else (self.destination, self.source)


class WithDisk(TracedHosts):
    """The domain has a disk of 32 MiB, of which each host has a file of its own."""

    DISK = "var/lib/libvirt/images/disk.raw"

    def _xml(self, guest: Path) -> str:
        disk = f"""<disk type='file' device='disk'><driver name='qemu' type='raw'/>
            <source file='/{self.DISK}'/><target dev='vda' bus='virtio'/></disk>"""
        return super()._xml(guest).replace("<memballoon", f"{disk}<memballoon")

    def _create(self, directory: Path, guest: Path) -> None:
        for host in (self.source, self.destination):
            path = host.directory / self.DISK
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(1 << 20) * 32 if host is self.source else bytes(32 << 20))
        super()._create(directory, guest)


@dataclass(frozen=True)
class Shape:
    """What virsh is told, and what the report must say."""

    options: tuple[str, ...]
    transport: str = "tcp"
    mode: str = "precopy"
    connections: int | None = 1
    guest: Scenario = GUEST
    hosts: type[TracedHosts] = TracedHosts
    through: int = 0
    """How many libvirtds pass the bytes on."""


SHAPES = {
    "p2p": Shape(("--p2p",)),
    "direct": Shape(("--migrateuri", "tcp://{address}")),
    "parallel": Shape(("--p2p", "--parallel", "--parallel-connections", "2"), connections=3),
    "tls": Shape(("--p2p", "--tls")),
    "tunnelled": Shape(("--p2p", "--tunnelled", "--bandwidth", "16"), transport="pipe", through=2),
    "xbzrle": Shape(("--p2p", "--compressed", "--comp-methods", "xbzrle")),
    "mt": Shape(("--p2p", "--compressed", "--comp-methods", "mt")),
    "copy-storage-all": Shape(("--p2p", "--copy-storage-all"), hosts=WithDisk),
    "postcopy": Shape(
        ("--p2p", "--postcopy", "--postcopy-after-precopy", "--bandwidth", "24"),
        mode="postcopy",
        connections=None,
        guest=BUSY,
    ),
    "auto-converge": Shape(
        ("--p2p", "--auto-converge", "--auto-converge-initial", "90", "--bandwidth", "64"), guest=BUSY
    ),
}
COMMON = ("tunnelled",)
USUAL = SHAPES if ALL else (*COMMON, "tls", "copy-storage-all", "postcopy")
"""`test_libvirt.py` has p2p, direct and parallel migrations."""


class Watched:
    """Two hosts, and `watch`, which sees both."""

    def __init__(self, hosts: TracedHosts, directory: Path) -> None:
        self.hosts = hosts
        self._state, self._lines = directory / "state", queue.Queue[str]()

    @contextlib.contextmanager
    def running(self) -> Iterator[Watched]:
        command = [*PROGRAM, "watch", "--format", "json", "--vm", NAME, "--state-directory", str(self._state)]
        with self.hosts, running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
            assert watch.stdout is not None and watch.stderr is not None and "watching" in watch.stderr.readline()
            threading.Thread(target=lambda: [*map(self._lines.put, watch.stdout or ())], daemon=True).start()
            time.sleep(SETTLED_S)
            yield self

    def said(self) -> Breakdown:
        """Of the one migration that there was."""
        said = json.loads(self._lines.get(timeout=30))
        time.sleep(2)
        assert self._lines.empty(), "one migration"
        found = report(self._state / said["recording"])
        assert (said["role"], said["result"], said["blackout_ns"]) == ("both", "completed", found.blackout_ns)
        return found


class Lab:
    """The hosts of the last shape serve the next one, too, unless it needs others."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._stack, self._number = directory, contextlib.ExitStack(), 0
        self._has: tuple[Shape, Watched] | None = None

    def of(self, shape: Shape) -> Watched:
        if self._has is None or (self._has[0].hosts, self._has[0].guest) != (shape.hosts, shape.guest):
            self.close()
            self._number += 1
            directory = self._directory / str(self._number)
            directory.mkdir()
            watched = Watched(shape.hosts(shape.guest), directory)
            self._has = shape, self._stack.enter_context(watched.running())
        return self._has[1]

    def close(self) -> None:
        self._has = None
        self._stack.close()


@pytest.fixture(scope="module")
def lab_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    keys = tmp_path_factory.mktemp("keys")
    certificates(keys, *ADDRESSES.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "_QEMU", f'{lab._QEMU}migrate_tls_x509_cert_dir = "{keys}"\n')
        with contextlib.closing(Lab(tmp_path_factory.mktemp("hosts"))) as made:
            yield made


def migrated(hosts: TracedHosts, shape: Shape, path: Path) -> Breakdown:
    """By virsh, as `record` saw it; the other host has the domain then."""
    near, far = hosts.ways()
    options = [word.format(address=far.address) for word in shape.options]
    to = far.uri_between if "--p2p" in options else far.uri
    virsh = ["virsh", "-c", near.uri, "migrate", "--live", *options, NAME, to]
    command = [*PROGRAM, "record", "--vm", NAME, "-o", str(path), "--", *virsh]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr
    assert hosts.ways() == (far, near)
    return analyse(read_recording(path)).breakdown


@pytest.mark.parametrize("name", long_but(USUAL, *COMMON))
def test_a_shape_by_record_and_watch(name: str, lab_of_all: Lab, tmp_path: Path) -> None:
    """With --tunnelled, libvirt ends the source's QEMU at once: alone, it would have no result."""
    shape = SHAPES[name]
    with contextlib.ExitStack() as failed:
        failed.callback(lab_of_all.close)
        watched = lab_of_all.of(shape)
        near, far = watched.hosts.ways()
        by_record, by_watch = migrated(watched.hosts, shape, tmp_path / "x.rec"), watched.said()
        assert by_watch.migration.destination is not None
        traces = [host.directory / TracedHosts.TRACE for host in (near, far)]
        truth = stop_and_start(*traces, by_watch.migration.destination.pid)
        if shape.hosts is WithDisk:
            disks = [(host.directory / WithDisk.DISK).read_bytes() for host in (near, far)]
            assert disks[0] == disks[1]
        failed.pop_all()
    for seen in (by_record, by_watch):
        whole(seen, truth)
        m = seen.migration
        assert (m.vmm, m.mode, m.transport) == ("qemu", shape.mode, shape.transport)
        assert m.source and m.destination and m.source.pid != m.destination.pid
        assert shape.connections in (m.connections, None)
        assert len(m.through) == shape.through and {who.split()[0] for who in m.through} <= LIBVIRTD
        assert (seen.throttled is not None) == (name == "auto-converge")
    if shape.hosts is WithDisk:
        beside_the_memory(read_recording(tmp_path / "x.rec"), by_record)


def beside_the_memory(recording: Recording, b: Breakdown) -> None:
    """The disk goes over NBD, with more bytes than the memory has. That is not the carrier."""
    sent: Counter[int] = Counter()
    for event in recording.events:
        if isinstance(event, Transfer) and b.migration.source and event.pid == b.migration.source.pid:
            sent[event.socket] += event.bytes if event.direction == SEND else 0
    assert max(sent.values()) > 32 << 20, "the disk"
    assert sum(p.bytes or 0 for p in b.dirty_log.passes) + sum(s.bytes for s in b.sockets) < 32 << 20
