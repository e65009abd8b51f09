# SPDX-License-Identifier: Apache-2.0
"""The lab's QEMU pair and the QMP adapter on real KVM, without tracing. The witness is the guest."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ebpf_mig.errors import PreflightError, VmmError
from ebpf_mig.lab.guest import FIRST_BYTE, PAGE
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording.events import Mark
from ebpf_mig.vmm.base import Outcome
from ebpf_mig.vmm.qemu import monitor as qmp
from ebpf_mig.vmm.qemu.lab import QemuPair, QemuVm
from ebpf_mig.vmm.qemu.migration import QemuMigration
from tests.conftest import requires

pytestmark = requires("/dev/kvm", "qemu-system-x86_64")

QUICK = Scenario(memory_bytes=128 * MIB, working_set_bytes=2 * MIB, pages_per_s=20_000)
ENDLESS = replace(QUICK, working_set_bytes=32 * MIB, bandwidth_bytes=2 * MIB, downtime_ms=1)
"""A link so slow that the migration does not end by itself."""


@pytest.fixture(autouse=True)
def _short_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A private directory with a name short enough for sockets. It must be empty after the test."""
    place = tempfile.mkdtemp(prefix="t-")
    monkeypatch.setattr(tempfile, "tempdir", place)
    monkeypatch.setenv("TMPDIR", place)
    yield
    left = list(Path(place).iterdir())
    shutil.rmtree(place)
    assert not left


def eventually(condition: Callable[[], bool], patience_s: float = 10) -> bool:
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def connected(pair: QemuPair) -> contextlib.closing[QemuMigration]:
    return contextlib.closing(QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options()))


def beats_on(vm: QemuVm, letters: set[str]) -> bool:
    """Waits until every vCPU beats."""
    heard = len(vm.heartbeat.beats)
    return eventually(lambda: {letter for _, letter in vm.heartbeat.beats[heard:]} == letters)


def marks(outcome: Outcome, pid: int) -> dict[str, Mark]:
    return {m.name: m for m in outcome.marks if isinstance(m, Mark) and m.pid == pid}


def memory(vm: QemuVm, begin: int, size: int, path: Path) -> bytes:
    """Guest-physical memory, read by QMP."""

    async def save() -> None:
        monitor = await qmp.Monitor.open(vm.qmp, "source")
        await monitor.execute("stop")
        await monitor.execute("pmemsave", {"val": begin, "size": size, "filename": str(path)})
        await monitor.execute("cont")
        await monitor.close()

    asyncio.run(save())
    return path.read_bytes()


@pytest.mark.parametrize("vcpus", [1, 3, 8])
def test_each_vcpu_dirties_its_own_pages(tmp_path: Path, vcpus: int) -> None:
    pages = 64
    scenario = replace(QUICK, vcpus=vcpus, working_set_bytes=pages * PAGE, pages_per_s=1000)
    letters = {chr(ord("A") + i) for i in range(vcpus)}
    with QemuPair(scenario) as pair:
        assert pair.source.heartbeat.letters() == letters
        data = memory(pair.source, FIRST_BYTE - PAGE, (vcpus * pages + 2) * PAGE, tmp_path / "memory")
        assert beats_on(pair.source, letters), "it goes on after stop and cont"
    counts = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), PAGE)]
    assert counts[0] == 0 and counts[-1] == 0, "nothing below the first area nor above the last"
    for vcpu in range(vcpus):
        area = counts[1 + vcpu * pages :][:pages]
        assert min(area) >= 1 and area[0] - area[-1] in {0, 1} and area == sorted(area, reverse=True)
    others = bytearray(data)
    for i in range(0, len(data), PAGE):
        others[i : i + 4] = bytes(4)
    assert not any(others), "one word a page and no more"


def test_the_pace_is_kept() -> None:
    """The rate is never above the requested one, and below it only as far as a busy machine explains."""
    pages, pace = 100, 1000
    with QemuPair(replace(QUICK, working_set_bytes=pages * PAGE, pages_per_s=pace)) as pair:
        time.sleep(2)
        stamps = [at for at, _ in pair.source.heartbeat.beats]
    rate = (len(stamps) - 1) * pages / ((stamps[-1] - stamps[0]) / 1e9)
    assert 0.3 * pace < rate < 1.1 * pace


@pytest.mark.parametrize(
    "scenario",
    [
        QUICK,
        replace(QUICK, transport="unix", vcpus=3),
        replace(QUICK, multifd_channels=2),
        replace(QUICK, transport="unix", multifd_channels=3, downtime_ms=50),
        replace(QUICK, dirty_ring=4096),
    ],
    ids=["tcp", "unix", "multifd", "unix-multifd", "ring"],
)
def test_a_migration(scenario: Scenario) -> None:
    letters = {chr(ord("A") + i) for i in range(scenario.vcpus)}
    with QemuPair(scenario) as pair, connected(pair) as migration:
        source, destination = migration.targets()
        assert (source.pid, destination.pid) == (pair.source.pid, pair.destination.pid)
        assert (source.role, destination.role) == ("source", "destination")
        assert source.vmm_version and source.vmm_version in version_line(pair.binary)
        assert not pair.destination.heartbeat.beats
        migration.prepare()
        begin = time.monotonic_ns()
        outcome = migration.run(60)
        end = time.monotonic_ns()
        assert (outcome.result, outcome.error) == ("completed", "")
        assert beats_on(pair.destination, letters)
    src, dst = marks(outcome, source.pid), marks(outcome, destination.pid)
    order = [src["session.trigger"], src["qmp.MIGRATION.active"], src["qmp.STOP"], dst["qmp.RESUME"]]
    assert [m.at_ns for m in order] == sorted(m.at_ns for m in order)
    assert all(begin <= m.at_ns <= end for m in order)
    assert {"qmp.MIGRATION.completed"} <= set(src) & set(dst)
    assert src["qmp.total_time_ms"].value > 0 and src["qmp.downtime_ms"].value >= 0
    # The guest confirms it: its last beat on the source is before STOP, its first on the destination after RESUME.
    reading_ns = 100_000_000
    assert pair.source.heartbeat.beats[-1][0] <= src["qmp.STOP"].at_ns + reading_ns
    assert pair.destination.heartbeat.beats[0][0] >= dst["qmp.RESUME"].at_ns - dst["qmp.RESUME"].doubt_ns


def version_line(binary: str) -> str:
    return subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout


@requires("root")
def test_postcopy() -> None:
    """The guest dirties more than the link carries, so only postcopy can complete the migration."""
    busy = replace(ENDLESS, bandwidth_bytes=20 * MIB, pages_per_s=None, postcopy=True)
    with QemuPair(busy) as pair, connected(pair) as migration:
        migration.prepare()
        outcome = migration.run(60)
        assert (outcome.result, outcome.error) == ("completed", "")
        assert "qmp.MIGRATION.postcopy-active" in marks(outcome, pair.source.pid)
        assert beats_on(pair.destination, {"A"})


def test_a_destination_that_listens_already() -> None:
    """A destination started with `-incoming URI` gets no second request to listen."""
    with QemuPair(QUICK) as pair:
        with connected(pair) as first:
            first.prepare()
        with connected(pair) as migration:
            migration.prepare()
            assert migration.run(60).result == "completed"


def meanwhile(after_s: float, act: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=lambda: (time.sleep(after_s), act()))
    thread.start()
    return thread


def test_cancel() -> None:
    with QemuPair(ENDLESS) as pair, connected(pair) as migration:
        migration.prepare()
        beside = meanwhile(0.5, migration.cancel)
        outcome = migration.run(60)
        beside.join()
        assert (outcome.result, outcome.error) == ("cancelled", "on request")
        assert beats_on(pair.source, {"A"}), "the guest goes on where it was"


def test_the_timeout_cancels() -> None:
    with QemuPair(ENDLESS) as pair, connected(pair) as migration:
        migration.prepare()
        outcome = migration.run(0.5)
        assert outcome.result == "cancelled" and "not done within 0.5 s" in outcome.error
        assert beats_on(pair.source, {"A"})


def test_the_destination_is_killed() -> None:
    with QemuPair(ENDLESS) as pair, connected(pair) as migration:
        migration.prepare()
        beside = meanwhile(0.5, pair.destination.process.kill)
        outcome = migration.run(60)
        beside.join()
        assert outcome.result == "failed" and "destination QEMU" in outcome.error
        assert beats_on(pair.source, {"A"})


def test_the_source_is_killed() -> None:
    with QemuPair(ENDLESS) as pair, connected(pair) as migration:
        migration.prepare()
        beside = meanwhile(0.5, pair.source.process.kill)
        outcome = migration.run(60)
        beside.join()
        assert (outcome.result, outcome.error) == ("failed", "the source QEMU ended during the migration")


def test_nobody_listens_at_the_uri() -> None:
    with QemuPair(QUICK) as pair:
        nowhere = f"unix:{pair.directory}/nowhere"
        with contextlib.closing(QemuMigration(pair.source.qmp, None, nowhere)) as migration:
            migration.prepare()
            outcome = migration.run(60)
        assert outcome.result == "failed" and "nowhere" in outcome.error
        assert beats_on(pair.source, {"A"})


def test_a_running_destination_is_refused() -> None:
    with QemuPair(QUICK) as pair, QemuPair(QUICK) as other:
        migration = QemuMigration(pair.source.qmp, other.source.qmp, pair.uri)
        with contextlib.closing(migration), pytest.raises(VmmError, match="not waiting for a migration"):
            migration.prepare()


def test_a_monitor_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "GREETING_S", 0.5)
    with QemuPair(QUICK) as pair, connected(pair), pytest.raises(VmmError, match="another client may hold"):
        QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri)


def test_we_crash_and_the_migration_goes_on() -> None:
    """If we are killed right after the trigger, QEMU completes the migration by itself."""
    script = """
import sys, os, threading, time
from ebpf_mig.vmm.qemu.migration import QemuMigration, QemuOptions
migration = QemuMigration(*sys.argv[1:4], QemuOptions(bandwidth_bytes=8 << 20))
migration.prepare()
threading.Timer(0.3, lambda: os.kill(os.getpid(), 9)).start()
migration.run(60)
"""
    with QemuPair(replace(QUICK, working_set_bytes=8 * MIB, pages_per_s=1000)) as pair:
        command = [sys.executable, "-c", script, pair.source.qmp, pair.destination.qmp, pair.uri]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert not pair.destination.heartbeat.beats, "it was not over by then"
        assert eventually(lambda: pair.destination.heartbeat.letters() == {"A"}, 60)


def test_qemu_that_cannot_start_is_quoted() -> None:
    with pytest.raises(VmmError, match="nonsense"), QemuPair(QUICK, extra=["-nonsense"]):
        pass


def test_no_such_qemu() -> None:
    with pytest.raises(PreflightError) as caught:
        QemuPair(QUICK, "qemu-system-none")
    assert "apt-get install qemu-system-x86" in str(caught.value.remedy)


@requires("root", "private mount namespaces")
def test_no_kvm() -> None:
    """In a mount namespace where /dev/kvm is another device."""
    script = "from ebpf_mig.vmm.qemu.lab import *\nwith QemuPair(Scenario()): pass"
    shell = 'mount --bind /dev/null /dev/kvm && exec "$0" -c "$1"'
    command = ["unshare", "--mount", "sh", "-c", shell, sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "PreflightError: KVM cannot be used: /dev/kvm: Inappropriate ioctl" in done.stderr


PARENT = """
import time
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.lab.scenario import Scenario
from ebpf_mig.vmm.qemu.migration import QemuMigration
with QemuPair(Scenario(memory_bytes=128 << 20, working_set_bytes=2 << 20)) as pair:
    migration = QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri)
    print(pair.source.pid, pair.destination.pid, pair.directory, flush=True)
    {then}
"""


@pytest.mark.parametrize(
    ("then", "signum"),
    [
        ("time.sleep(100)", signal.SIGINT),
        ("time.sleep(100)", signal.SIGTERM),
        ("time.sleep(100)", signal.SIGKILL),
        ("1 / 0", None),
        ("pass", None),
    ],
)
def test_nothing_stays(then: str, signum: signal.Signals | None) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.replace("{then}", then)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    source, destination, directory = parent.stdout.readline().split()
    parent.stdout.close()
    if signum is not None:
        assert not is_gone(int(source)) and not is_gone(int(destination))
        parent.send_signal(signum)
    parent.wait(20)
    assert eventually(lambda: is_gone(int(source)) and is_gone(int(destination)))
    if signum in {signal.SIGKILL, signal.SIGTERM}:  # our code cannot clean up; the next start does
        with QemuPair(QUICK):
            assert not Path(directory).exists()
    assert not Path(directory).exists()
