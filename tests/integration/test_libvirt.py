# SPDX-License-Identifier: Apache-2.0
"""Migrations through real libvirtds: the demo's two hosts, each kind of migration, and no leftovers."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ebpf_mig import vmm
from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.linux import descriptors, procfs
from ebpf_mig.recording.events import FORWARDER, HOP, NEIGHBOUR, RECEIVE, Mark, Transfer
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.libvirt.lab import NAME, LibvirtHosts
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.vmm.qemu.migration import QemuMigration
from tests.companion import Companion
from tests.conftest import TRACING, requires
from tests.integration.exporters import NAMED, OURS
from tests.unit.vmm.test_libvirt import HIDE

pytestmark = requires(*TRACING, "libvirtd and virsh", "python3-libvirt", "private mount namespaces")
TOOL = [sys.executable, "-m", "ebpf_mig"]


def qemus() -> list[int]:
    """Pids of the QEMUs of the lab's domain, on either side."""
    return [pid for pid in procfs.processes() if any(NAME in word for word in procfs.command_line(pid)[:3])]


def migrates(pid: int) -> bool:
    """Whether QEMU has begun to send. On a slow host, that is long after libvirt has started the destination."""
    names = [procfs.comm(pid, tid) for tid in procfs.threads_of(pid)]
    return any(name.startswith(("live_migration", "mig/src/main")) for name in names)


@pytest.fixture
def hosts() -> Iterator[LibvirtHosts]:
    with LibvirtHosts(Scenario(memory_bytes=128 * MIB, working_set_bytes=4 * MIB)) as both:
        yield both


def migrate(hosts: LibvirtHosts, path: Path, *options: str, to: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TOOL, "migrate", "libvirt", NAME, to or hosts.destination.uri_between, "--connect", hosts.source.uri,
         "-o", path, "--format", "json", *options],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def result(done: subprocess.CompletedProcess[str]) -> Breakdown:
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout, type=Breakdown)


def complete(b: Breakdown) -> None:
    """Checks one complete migration between two processes of this machine."""
    assert (b.migration.result, b.migration.vmm, b.completeness.verdict) == ("completed", "qemu", "complete")
    assert b.migration.source and b.migration.destination
    assert b.migration.source.pid != b.migration.destination.pid
    assert b.blackout_ns and b.window_ns
    assert sum(p.duration_ns for p in b.phases) == b.window_ns
    left = next(p.duration_ns for p in b.phases if p.phase == "unattributed")
    assert left <= b.window_ns * 2 // 100


def witnesses(b: Breakdown) -> dict[str, int]:
    return {w.name: w.value_ns for w in b.witnesses}


def test_the_demo_has_both_ends_and_three_witnesses(tmp_path: Path) -> None:
    path = tmp_path / "demo.rec"
    done = subprocess.run(
        [*TOOL, "demo", "--vmm", "libvirt", "--vcpus", "2", "--working-set", "4MiB", "-o", path, "--format", "json"],
        capture_output=True, text=True, check=False, timeout=150,
    )  # fmt: skip
    b = result(done)
    complete(b)
    said = witnesses(b)
    assert {"libvirt.downtime_ms", "libvirt.SUSPENDED..RESUMED", "qmp.STOP..RESUME"} <= said.keys()
    assert b.blackout_ns and said["qmp.STOP..RESUME"] <= b.blackout_ns + 1_000_000
    assert qemus() == []
    names = {event.name for event in read_recording(path).events if isinstance(event, Mark)}
    # Redaction leaves the other marks as they are. libvirtd made the connection, so it may be beside the source.
    assert {"session.trigger"} <= names - vmm.words() <= {"session.trigger", NEIGHBOUR, FORWARDER, HOP}


@pytest.mark.parametrize(
    ("options", "mode", "connections"),
    [
        ((), "precopy", 1),
        pytest.param(("--parallel", "2"), "precopy", 3, marks=pytest.mark.long),
        pytest.param(("--postcopy", "--bandwidth", "24MiB/s"), "postcopy", None, marks=pytest.mark.long),
        pytest.param(
            ("--downtime-limit", "1s", "--migrate-uri", "tcp://10.77.0.2"), "precopy", 1, marks=pytest.mark.long
        ),
    ],
    ids=["p2p", "parallel", "postcopy", "migrate-uri"],
)
def test_peer_to_peer(tmp_path: Path, options: tuple[str, ...], mode: str, connections: int | None) -> None:
    scenario = Scenario(memory_bytes=128 * MIB, working_set_bytes=16 * MIB, pages_per_s=10_000)
    with LibvirtHosts(scenario) as hosts:
        b = result(migrate(hosts, tmp_path / "x.rec", *options))
    complete(b)
    assert (b.migration.mode, b.migration.transport) == (mode, "tcp")
    assert connections is None or b.migration.connections == connections
    assert "libvirt.downtime_ms" in witnesses(b)


def test_tunnelled(tmp_path: Path) -> None:
    """Both QEMUs have a pipe only: each libvirtd holds the other end of one."""
    scenario = Scenario(memory_bytes=128 * MIB, working_set_bytes=4 * MIB, pages_per_s=2000)
    with LibvirtHosts(scenario) as hosts:
        b = result(migrate(hosts, tmp_path / "x.rec", "--tunnelled", "--bandwidth", "8MiB/s"))
    complete(b)
    assert (b.migration.mode, b.migration.transport, b.migration.connections) == ("precopy", "pipe", 1)
    assert {who.split()[0] for who in b.migration.through} <= {"libvirtd", "rpc-libvirtd"}
    assert len(set(b.migration.through)) == 2
    assert {s.role for s in b.sockets} == {"source migration", "destination migration"}


@pytest.mark.long
def test_direct_hears_both_ends(hosts: LibvirtHosts, tmp_path: Path) -> None:
    options = ("--direct", "--migrate-uri", "tcp://10.77.0.2")
    b = result(migrate(hosts, tmp_path / "x.rec", *options, to=hosts.destination.uri))
    complete(b)
    assert {"libvirt.SUSPENDED..RESUMED", "qmp.STOP..RESUME"} <= witnesses(b).keys()


@pytest.mark.long
def test_by_virsh_where_there_is_no_binding(hosts: LibvirtHosts, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HIDE, "migrate", "libvirt", NAME, hosts.destination.uri_between, "--connect",
         hosts.source.uri, "-o", tmp_path / "x.rec", "--format", "json"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    complete(result(done))


def test_an_interruption_aborts_the_job(hosts: LibvirtHosts, tmp_path: Path) -> None:
    [source] = qemus()
    command = [*TOOL, "migrate", "libvirt", NAME, hosts.destination.uri_between, "--connect", hosts.source.uri]
    with Companion([*command, "--bandwidth", "1MiB/s", "-o", tmp_path / "x.rec"], stderr=subprocess.PIPE) as run:
        until = time.monotonic() + 60
        while not migrates(source) and time.monotonic() < until:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
    assert qemus() == [source]
    events = read_recording(tmp_path / "x.rec").events
    assert any(isinstance(e, Mark) and e.name == "qmp.MIGRATION.cancelled" for e in events)
    again = result(migrate(hosts, tmp_path / "again.rec"))  # libvirt has forgotten the aborted job
    complete(again)


def test_a_job_that_takes_too_long_is_aborted(hosts: LibvirtHosts, tmp_path: Path) -> None:
    done = migrate(hosts, tmp_path / "x.rec", "--bandwidth", "1MiB/s", "--timeout", "1s")
    assert (done.returncode, json.loads(done.stdout)["migration"]["result"]) == (4, "cancelled"), done.stderr
    assert "the migration was cancelled: not done within 1 s" in done.stderr


@pytest.mark.parametrize(
    ("domain", "to", "why"),
    [
        ("nosuch", "", "no domain is called nosuch"),
        (NAME, "qemu+tcp://10.77.0.9/system", "No route to host"),
        (NAME, "qemu+tcp://10.77.0.1/system", "to the same host"),
    ],
)
def test_what_libvirt_refuses_is_one_line(hosts: LibvirtHosts, tmp_path: Path, domain: str, to: str, why: str) -> None:
    done = subprocess.run(
        [*TOOL, "migrate", "libvirt", domain, to or hosts.destination.uri_between, "--connect", hosts.source.uri,
         "-o", tmp_path / "x.rec"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 4
    assert why in done.stderr.splitlines()[-1]
    assert "libvirt: " not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.long
def test_killed_at_any_moment_nothing_is_left(tmp_path: Path) -> None:
    with Companion(
        [*TOOL, "demo", "--vmm", "libvirt", "-o", tmp_path / "x.rec"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as run:
        until = time.monotonic() + 60
        while not qemus() and time.monotonic() < until:
            time.sleep(0.02)
        assert qemus()
        os.kill(run.pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while qemus() and time.monotonic() < until:
        time.sleep(0.05)
    assert qemus() == []


@pytest.mark.long
def test_a_benchmark_of_it(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    done = subprocess.run(
        [*TOOL, "bench", "slow-dirty", "--vmm", "libvirt", "-n", "1", "--warm-up", "0", "-o", path],
        capture_output=True, text=True, check=False, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"]
    assert [run["breakdown"]["migration"]["result"] for run in runs] == ["completed"]


def record(path: Path, *options: str) -> subprocess.Popen[str]:
    """A recorder that has started to trace."""
    run = subprocess.Popen([*TOOL, "record", *options, "-o", path], stderr=subprocess.PIPE, text=True)
    assert run.stderr
    line = run.stderr.readline()
    assert line.startswith("tracing "), line
    return run


def migrated(hosts: LibvirtHosts) -> None:
    command = ["virsh", "-c", hosts.source.uri, "migrate", "--live", "--p2p", NAME, hosts.destination.uri_between]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "wanted", [NAME, *(pytest.param(name, marks=pytest.mark.long) for name in (f"{NAME[:-1]}*", "uuid"))]
)
def test_record_finds_both_processes_by_the_vms_name(hosts: LibvirtHosts, tmp_path: Path, wanted: str) -> None:
    if wanted == "uuid":
        command = ["virsh", "-c", hosts.source.uri, "domuuid", NAME]
        wanted = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    path = tmp_path / "x.rec"
    with record(path, "--vm", wanted) as run:
        migrated(hosts)
        assert run.wait(30) == 0
    complete(analyse(read_recording(path)).breakdown)


def test_record_waits_for_a_vm_that_is_not_there(tmp_path: Path) -> None:
    """The view of a destination whose source is on another host."""
    path = tmp_path / "x.rec"
    scenario = Scenario(memory_bytes=128 * MIB, working_set_bytes=4 * MIB)
    with record(path, "--vm", f"{OURS}destination") as run, QemuPair(scenario, None, NAMED) as pair:
        options = pair.options()
        with closing(QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, options)) as migration:
            migration.prepare()
            assert migration.run(60).result == "completed"
        assert run.wait(30) == 0
        destination = pair.destination.pid
    recording = read_recording(path)
    b = analyse(recording).breakdown
    assert b.migration.source is None
    assert b.migration.destination and b.migration.destination.pid == destination
    assert (b.migration.vmm, b.completeness.verdict) == ("qemu", "bounded")
    assert [v.start is not None for v in b.vcpus] == [True]
    # The sockets' rows cover the window, which may begin after the last receive.
    received = [e for e in recording.events if isinstance(e, Transfer) and e.direction == RECEIVE]
    assert b.migration.transport == "tcp" and sum(e.bytes for e in received) > 128 << 10


def test_record_with_a_command_as_people_use_it(hosts: LibvirtHosts, tmp_path: Path) -> None:
    path = tmp_path / "x.rec"
    virsh = ["virsh", "-c", hosts.source.uri, "migrate", "--live", "--p2p", NAME, hosts.destination.uri_between]
    done = subprocess.run(
        [*TOOL, "record", "--vm", NAME, "-o", path, "--", *virsh],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    complete(analyse(read_recording(path)).breakdown)


def test_record_ends_though_it_found_the_destination_too_late(hosts: LibvirtHosts, tmp_path: Path) -> None:
    """It gets no CPU from before the destination's process exists until the guest has run there for a while."""
    path, [source] = tmp_path / "x.rec", [pid for pid in qemus() if descriptors.holds_vm(pid)]
    virsh = ["virsh", "-c", hosts.source.uri, "migrate", "--live", "--p2p", NAME, hosts.destination.uri_between]
    command = [*TOOL, "record", "--vm", NAME, "-o", path, "--", "sh", "-c", f"sleep 1; {shlex.join(virsh)}"]
    with Companion(command, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None and run.stderr.readline().startswith(f"tracing {source}")
        time.sleep(0.5)
        run.send_signal(signal.SIGSTOP)
        until = time.monotonic() + 60
        while procfs.is_alive(source) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1)
        run.send_signal(signal.SIGCONT)
        said = run.communicate(timeout=30)[1]
    assert run.returncode == 0 and said.splitlines()[-1].startswith("handed-over"), said
    b = analyse(read_recording(path)).breakdown
    assert b.migration.result == "completed" and b.blackout_ns is None
    assert b.completeness.verdict == "bounded"
