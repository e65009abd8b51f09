# SPDX-License-Identifier: Apache-2.0
"""One command drives both hosts: a real sshd in a network namespace, real VMMs, and every kind of ending."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_mig.lab.netns import Link
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording.format import FRAME
from ebpf_mig.vmm.cloud_hypervisor.api import Api
from ebpf_mig.vmm.cloud_hypervisor.lab import ENVIRONMENT, ChPair
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import TRACING, requires
from tests.integration.sshd import Server, ssh_during

pytestmark = [requires(*TRACING, "tc with tbf and veth", "sshd", "private mount namespaces"), pytest.mark.timeout(180)]

SLOW = ("--bandwidth", "16Mbit", "--downtime-limit", "1500ms")
"""Completes within a second or two."""
FULL = """mount -t tmpfs -o size=4k full {tmp}/full; head -c 4096 /dev/zero > {tmp}/full/x || true
mount -o remount,bind,ro /; ! touch {tmp}/y"""
"""The directory for temporary files is full, and the rest is read-only. Neither matters to a recorder that writes to
ssh.
"""
OLDER = """#!{python}
import sys
sys.stdout.buffer.write({data!r})
sys.stdout.flush()
sys.stdin.read()
"""
TOOL = f"{sys.executable} -m ebpf_mig.cli"
QUICK = Scenario(memory_bytes=128 * MIB, working_set_bytes=2 * MIB, pages_per_s=20_000)


@pytest.fixture
def link() -> Iterator[Link]:
    with Link() as made:
        yield made


def migrate(pair: QemuPair | ChPair, link: Link, server: Server, *more: str, cwd: Path) -> subprocess.Popen[str]:
    """`ebpf-mig migrate qemu` or `cloud-hypervisor` on the source's side."""
    if isinstance(pair, QemuPair):
        words = ["qemu", "--uri", pair.uri, "--source", pair.source.qmp, "--destination", pair.destination.qmp]
    else:
        words = ["cloud-hypervisor", "--url", pair.uri, "--source", pair.source.api, "--destination"]
        words.append(pair.destination.api)
    command = [sys.executable, "-m", "ebpf_mig.cli", "migrate", *words, *more, "-o", "x.rec"]
    with link.inside("source"):
        return subprocess.Popen(
            command, cwd=cwd, env=server.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


def recorders() -> set[int]:
    """Pids of recorders that run for a command on another host."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if (b"--until-eof" in words or b"relay" in words) and b"python" in words[0]:
            found.add(int(entry.parent.name))
    return found


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """No recorder may be left on the other host, whatever the ending."""
    before = recorders()
    yield
    until = time.monotonic() + 15
    while recorders() - before and time.monotonic() < until:
        time.sleep(0.1)
    assert recorders() - before == set()


def status_of(pair: QemuPair) -> str:
    """The destination's run state, by QMP."""
    import asyncio

    from ebpf_mig.vmm.qemu.monitor import Monitor

    async def ask() -> str:
        monitor = await Monitor.open(pair.destination.qmp, "destination")
        try:
            return str((await monitor.query("query-status"))["status"])
        finally:
            await monitor.close()

    return asyncio.run(ask())


def test_ssh_reaches_the_destination_and_both_halves_are_joined(tmp_path: Path, link: Link) -> None:
    with QemuPair(QUICK, link=link) as pair, Server(tmp_path / "ssh", link) as server:
        process = migrate(pair, link, server, "--destination-host", "far", "--format", "json", cwd=tmp_path)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert status_of(pair) == "running"
    document = json.loads(out)
    assert document["migration"]["result"] == "completed"
    assert document["migration"]["vmm"] == "qemu"
    assert document["migration"]["destination"]["pid"] == pair.destination.pid
    assert abs(document["clock"]["offset_ns"]) <= document["clock"]["bound_ns"]
    names = {witness["name"] for witness in document["witnesses"]}
    assert {"qmp.STOP..RESUME", "qmp.downtime_ms"} <= names
    assert sorted(p.name for p in tmp_path.glob("*.rec")) == ["x.destination.rec", "x.source.rec"]


def test_the_source_can_be_the_one_elsewhere(tmp_path: Path, link: Link) -> None:
    with QemuPair(QUICK, link=link) as pair, Server(tmp_path / "ssh", link) as server:
        process = migrate(pair, link, server, "--source-host", "far", "--format", "json", cwd=tmp_path)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    document = json.loads(out)
    assert document["migration"]["source"]["pid"] == pair.source.pid
    assert abs(document["clock"]["offset_ns"]) <= document["clock"]["bound_ns"]


def test_what_is_not_ssh_works_through_a_relay(tmp_path: Path, link: Link) -> None:
    with QemuPair(QUICK, link=link) as pair, Server(tmp_path / "ssh", link) as server:
        more = ("--destination-host", "pod", "--remote-command", "env", "--remote-tool", TOOL, "--format", "json")
        process = migrate(pair, link, server, *more, cwd=tmp_path)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert json.loads(out)["clock"]["pairs_back"] > 0


cloud_hypervisor = pytest.mark.skipif(not os.environ.get(ENVIRONMENT), reason=f"missing feature: {ENVIRONMENT}")


@cloud_hypervisor
@pytest.mark.parametrize(
    ("far", "more"),
    [("destination", ()), ("source", ()), ("source", ("--remote-command", "env", "--remote-tool", TOOL))],
    ids=["destination", "source", "source-by-a-command"],
)
def test_cloud_hypervisor_with_one_end_elsewhere(tmp_path: Path, link: Link, far: str, more: tuple[str, ...]) -> None:
    with ChPair(QUICK, link=link) as pair, Server(tmp_path / "ssh", link) as server:
        logs = ("--source-log", str(pair.source.log), "--destination-log", str(pair.destination.log))
        options = (f"--{far}-host", "far", *more, *logs, "--format", "json")
        process = migrate(pair, link, server, *options, cwd=tmp_path)
        out, err = process.communicate(timeout=120)
        assert Api(pair.destination.api, "destination").state() == "Running", err
    assert process.returncode == 0, err
    document = json.loads(out)
    assert document["migration"]["vmm"] == "cloud-hypervisor"
    assert document["migration"]["result"] == "completed"
    pids = {role: document["migration"][role]["pid"] for role in ("source", "destination")}
    assert pids == {"source": pair.source.process.pid, "destination": pair.destination.process.pid}
    assert abs(document["clock"]["offset_ns"]) <= document["clock"]["bound_ns"]
    # The destination's log was read on its host.
    names = {witness["name"] for witness in document["witnesses"]}
    assert "ch.downtime_ms" in names
    assert "ch.state_to_resume_ms" in names


@cloud_hypervisor
@pytest.mark.parametrize("far", ["destination", "source"])
def test_cloud_hypervisor_whose_connection_breaks(tmp_path: Path, link: Link, far: str) -> None:
    guest = dataclasses.replace(QUICK, working_set_bytes=64 * MIB, pages_per_s=2000)
    with ChPair(guest, link=link) as pair, Server(tmp_path / "ssh", link) as server:
        process = migrate(pair, link, server, f"--{far}-host", "far", cwd=tmp_path)
        near = "source" if far == "destination" else "destination"
        os.kill(ssh_during(process, tmp_path / f"x.{near}.rec", 0.3), signal.SIGKILL)
        out, err = process.communicate(timeout=120)
        assert Api(pair.destination.api, "destination").state() == "Running", err
    assert "recording is incomplete" in err
    if far == "destination":
        assert process.returncode == 4, err
        assert "whether the destination runs is not known" in err
        assert "source pid" in out
    else:
        assert process.returncode == 0, err
        assert "destination pid" in out


@cloud_hypervisor
def test_a_source_elsewhere_that_cannot_reach_its_destination_is_told_from_there(tmp_path: Path, link: Link) -> None:
    with ChPair(QUICK, link=link) as pair, Server(tmp_path / "ssh", link) as server:
        pair.uri = "tcp:127.0.0.1:4444"  # one per side
        more = ("--source-host", "far", "--source-log", str(pair.source.log))
        process = migrate(pair, link, server, *more, cwd=tmp_path)
        _, err = process.communicate(timeout=120)
        assert Api(pair.source.api, "source").state() == "Running", err
    assert process.returncode == 4, err
    assert "Connection refused" in err


def test_a_wrong_host_key_is_one_clear_line_and_nothing_is_migrated(tmp_path: Path, link: Link) -> None:
    with QemuPair(QUICK, link=link) as pair, Server(tmp_path / "ssh", link) as server:
        server.trust("other")
        process = migrate(pair, link, server, "--destination-host", "far", cwd=tmp_path)
        out, err = process.communicate(timeout=60)
        assert status_of(pair) == "inmigrate"
    assert process.returncode == 3
    assert out == ""
    assert err.count("\n") == 1
    assert "Host key verification failed" in err
    assert list(tmp_path.glob("*.rec")) == []


def test_a_connection_that_breaks_amid_the_migration_harms_nothing(tmp_path: Path, link: Link) -> None:
    with QemuPair(QUICK, link=link) as pair, Server(tmp_path / "ssh", link) as server:
        process = migrate(pair, link, server, "--destination-host", "far", *SLOW, cwd=tmp_path)
        os.kill(ssh_during(process, tmp_path / "x.source.rec", 0.5), signal.SIGKILL)
        out, err = process.communicate(timeout=120)
        assert status_of(pair) == "running", "the migration went on"
    assert process.returncode == 4, err
    assert "source pid" in out
    assert re.search(r"\b[1-9]\d*\s+pass(es)?\b", out), "the source's half is reported"
    lines = [line for line in err.splitlines() if "host far" in line]
    assert len(lines) == 1
    assert "recording is incomplete" in lines[0]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_interrupted_or_killed_it_leaves_nothing_there(tmp_path: Path, link: Link, sent: signal.Signals) -> None:
    before = recorders()
    with QemuPair(QUICK, link=link) as pair, Server(tmp_path / "ssh", link) as server:
        process = migrate(pair, link, server, "--destination-host", "far", "--bandwidth", "8Mbit", cwd=tmp_path)
        ssh = ssh_during(process, tmp_path / "x.source.rec", 0.5)
        assert recorders() - before
        process.send_signal(sent)
        process.communicate(timeout=60)
        assert process.returncode == (130 if sent is signal.SIGINT else -signal.SIGKILL)
        until = time.monotonic() + 15
        while (recorders() - before or Path(f"/proc/{ssh}").exists()) and time.monotonic() < until:
            time.sleep(0.1)
        assert recorders() - before == set()
        assert not Path(f"/proc/{ssh}").exists()


@pytest.mark.parametrize(
    ("tool", "environment", "before", "said"),
    [
        ("ebpf-mig", {"PYTHONPATH": "{tmp}/nobcc"}, "", "bcc"),
        ("no-such-tool", {}, "", "not found"),
        ("setpriv --bounding-set=-all ebpf-mig", {}, "", "may not load BPF programs"),
        ("{tmp}/older", {}, "", "made by another ebpf-mig (format 0)"),
        ("{tmp}/oldest", {}, "", "install the same version of ebpf-mig on both hosts"),
        ("ebpf-mig", {"TMPDIR": "{tmp}/full", "HOME": "{tmp}/full"}, FULL, None),
    ],
    ids=["without-bcc", "without-the-tool", "without-privilege", "older-recordings", "older-options", "disk-full"],
)
def test_a_remote_that_cannot_record_is_one_clear_line_and_the_local_half_is_reported(
    tmp_path: Path, link: Link, tool: str, environment: dict[str, str], before: str, said: str | None
) -> None:
    (tmp_path / "nobcc" / "bcc").mkdir(parents=True)
    (tmp_path / "nobcc" / "bcc" / "__init__.py").write_text("raise ImportError(\"No module named 'bcc'\")\n")
    (tmp_path / "full").mkdir()
    older = tmp_path / "older"
    block = b"EBPFMIG0\n" + FRAME.pack(4, 0, 1) + b"abcd"
    older.write_text(OLDER.format(python=sys.executable, data=block))
    older.chmod(0o755)
    oldest = tmp_path / "oldest"
    oldest.write_text("#!/bin/sh\necho 'ebpf-mig: No such option: --until-eof' >&2\nexit 2\n")
    oldest.chmod(0o755)
    here = {key: value.replace("{tmp}", str(tmp_path)) for key, value in environment.items()}
    with (
        QemuPair(QUICK, link=link) as pair,
        Server(tmp_path / "ssh", link, here, before.replace("{tmp}", str(tmp_path))) as server,
    ):
        options = ("--destination-host", "far", "--remote-tool", tool.replace("{tmp}", str(tmp_path)))
        process = migrate(pair, link, server, *options, cwd=tmp_path)
        out, err = process.communicate(timeout=120)
        assert status_of(pair) == "running", err
    lines = [line for line in err.splitlines() if "the destination's host far" in line]
    if said is None:  # it works nevertheless
        assert process.returncode == 0, err
        assert out.startswith("Downtime ") and "not traced" not in out, "both halves"
        assert not lines
    else:
        assert process.returncode == 3, err
        assert "source pid" in out and "destination not traced" in out
        assert len(lines) == 1, err
        assert said in lines[0]
        assert "only the source's half is traced" in lines[0]
