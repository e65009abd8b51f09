# SPDX-License-Identifier: Apache-2.0
"""Faults around a recorder and an exporter while a VM migrates: full disks, low limits, closed streams, odd processes.

After each: one line says what happened, the exit code is a documented one, what was written can be read, no BPF program
is left, and the migration has completed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.linux.limits import ADDRESS_SPACE, DESCRIPTORS
from ebpf_mig.recording.events import Ending
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.vmm.qemu.migration import QemuMigration
from tests.companion import Companion
from tests.conftest import TRACING, requires
from tests.faults.kernel import held_by_others, programs
from tests.integration.exporters import NAMED, exporter, is_ready, migrate, until, value
from tests.integration.migrations import LASTING

pytestmark = requires(*TRACING)
PROGRAM = [sys.executable, "-m", "ebpf_mig"]
SCENARIO = Scenario(memory_bytes=64 * MIB, working_set_bytes=8 * MIB, pages_per_s=1000, bandwidth_bytes=32 << 20)


@dataclass
class Ended:
    """How a command ended beside a migration."""

    code: int
    said: list[str]
    """The lines on stderr, without that which says that tracing began."""
    path: Path


@pytest.fixture(autouse=True)
def _no_program_is_left() -> Iterator[None]:
    before = programs()
    yield
    until(lambda: not (programs() - before) or not (programs() - before - held_by_others()), 10)


@contextlib.contextmanager
def small(place: Path, size: str) -> Iterator[Path]:
    """A file system of this size."""
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "none", place], check=False)
    if done.returncode:
        pytest.skip("missing feature: mounting a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def completes(pair: QemuPair) -> None:
    ends = (pair.source.qmp, pair.destination.qmp, pair.uri, pair.options())
    with contextlib.closing(QemuMigration(*ends)) as migration:
        migration.prepare()
        assert migration.run(60).result == "completed"


@contextlib.contextmanager
def recorder(command: Sequence[str], log: Path, armed: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    """A running `record`. `armed`: wait until it traces."""
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
    try:
        until(lambda: process.poll() is not None or not armed or "tracing " in log.read_text(), 60)
        yield process
    finally:
        process.kill()
        process.wait()


def record_beside(
    directory: Path,
    path: Path | str,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    scenario: Scenario = SCENARIO,
) -> Ended:
    """Records a whole migration, and waits for its end."""
    log = directory / "log"
    with QemuPair(scenario) as pair:
        pids = ["--pid", str(pair.source.pid), "--pid", str(pair.destination.pid)]
        with recorder([*before, *PROGRAM, "record", *pids, "-o", str(path), *after], log) as process:
            completes(pair)
            code = process.wait(30)
    said = [line for line in log.read_text().splitlines() if not line.startswith("tracing ")]
    return Ended(code, said, Path(path))


def reported(path: Path) -> dict[str, object]:
    done = subprocess.run([*PROGRAM, "report", str(path), "--format", "json"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@requires("root")
@pytest.mark.parametrize("free", [0, 4096, 8192])
def test_a_disk_that_gets_full_while_recording(free: int, tmp_path: Path) -> None:
    """Without room for the header, or for the first or a later block of events."""
    with small(tmp_path / "small", "16k") as place:
        (place / "filler").write_bytes(bytes(16384 - free))
        ended = record_beside(tmp_path, place / "x.rec", scenario=LASTING)
        assert ended.code == 2
        assert len(ended.said) == 1 and ended.said[0].startswith("ebpf-mig: cannot write "), ended.said
        assert "No space left" in ended.said[0] and "whole blocks are kept" in ended.said[0]
        if free:
            assert reported(ended.path)["completeness"]["verdict"] == "incomplete"  # type: ignore[index]
        else:
            assert ended.path.stat().st_size == 0


@requires("root")
def test_a_full_disk_does_not_keep_migrate_from_migrating(tmp_path: Path) -> None:
    with small(tmp_path / "small", "8k") as place, QemuPair(LASTING) as pair:
        (place / "filler").write_bytes(bytes(4096))
        ends = ["--source", pair.source.qmp, "--destination", pair.destination.qmp, "--uri", pair.uri]
        command = [*PROGRAM, "migrate", "qemu", *ends, "-o", str(place / "x.rec")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.count("\n") == 1 and "No space left" in done.stderr
        assert reported(place / "x.rec")
        until(lambda: pair.destination.heartbeat.beats and pair.destination.heartbeat.beats[-1], 10)


@pytest.mark.parametrize("words", [(f"--nofile={DESCRIPTORS}",), (f"--as={ADDRESS_SPACE}",)], ids=str)
def test_the_lowest_limits_are_enough_for_a_whole_migration(words: tuple[str, ...], tmp_path: Path) -> None:
    """What is less is refused before anything is loaded: tests/unit/linux/test_limits.py."""
    ended = record_beside(tmp_path, tmp_path / "x.rec", before=["prlimit", *words])
    assert ended.code == 0, ended.said
    found = reported(ended.path)
    assert found["completeness"]["verdict"] == "complete" and found["blackout_ns"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("redirected", "why"), [(">&-", "Bad file descriptor"), (">/dev/full", "No space left"), ("| :", "Broken pipe")]
)
def test_standard_output_that_takes_no_recording(redirected: str, why: str, tmp_path: Path) -> None:
    shell = ["bash", "-c", f'set -o pipefail; "$@" {redirected}', "sh"]
    ended = record_beside(tmp_path, "-", before=shell)
    assert ended.code == 2, ended.said
    assert len(ended.said) == 1 and why in ended.said[0] and "the output stream" in ended.said[0]


def test_migrate_keeps_the_recording_where_standard_output_is_closed(tmp_path: Path) -> None:
    with QemuPair(SCENARIO) as pair:
        ends = ["--source", pair.source.qmp, "--destination", pair.destination.qmp, "--uri", pair.uri]
        command = [*PROGRAM, "migrate", "qemu", *ends, "-o", str(tmp_path / "x.rec")]
        shell = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
        done = subprocess.run(shell, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert reported(tmp_path / "x.rec")["migration"]["result"] == "completed"  # type: ignore[index]


@requires("root")
def test_a_state_directory_that_is_full_read_only_or_gone_costs_recordings_and_no_count(tmp_path: Path) -> None:
    with small(tmp_path / "small", "1m") as place, exporter(place / "state") as (process, port):
        state, filler = place / "state", place / "filler"

        def remount(mode: str) -> None:
            subprocess.run(["mount", "-o", f"remount,{mode}", place], check=True)

        def counted(number: int, kept: int) -> None:
            migrate(LASTING)
            until(lambda: value(port, "ebpf_mig_migrations_total", result="completed") == number, 15)
            assert value(port, "ebpf_mig_errors_total", kind="recording") == number - kept
            assert is_ready(port) and process.poll() is None

        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        counted(1, kept=0)
        assert not list(state.iterdir()), "no half of a recording"
        filler.unlink()
        remount("ro")
        counted(2, kept=0)
        remount("rw")
        shutil.rmtree(state)
        counted(3, kept=0)
        assert value(port, "ebpf_mig_errors_total", kind="state") > 0
        state.mkdir(0o700)
        counted(4, kept=1)
        assert reported(next(state.iterdir()))["blackout_ns"]


def test_two_recorders_and_an_exporter_on_one_vm(tmp_path: Path) -> None:
    with exporter(tmp_path / "state") as (_, port), QemuPair(SCENARIO, None, NAMED) as pair:
        pids = ["--pid", str(pair.source.pid), "--pid", str(pair.destination.pid)]
        paths = [tmp_path / f"{number}.rec" for number in range(2)]
        with contextlib.ExitStack() as stack:
            both = [
                stack.enter_context(recorder([*PROGRAM, "record", *pids, "-o", str(path)], path.with_suffix(".log")))
                for path in paths
            ]
            until(lambda: value(port, "ebpf_mig_vms") == 2 and value(port, "ebpf_mig_armed") == 0, 30)
            completes(pair)
            assert [process.wait(30) for process in both] == [0, 0]
        until(lambda: value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 1, 15)
        assert value(port, "ebpf_mig_migrations_total") == 1
        found = [reported(path) for path in (*paths, *(tmp_path / "state").iterdir())]
    assert len(found) == 3 and all(one["completeness"]["verdict"] != "incomplete" for one in found)  # type: ignore[index]
    blackouts = [int(one["blackout_ns"]) for one in found]  # type: ignore[call-overload]
    assert max(blackouts) - min(blackouts) < 200_000


@contextlib.contextmanager
def two_with_five_thousand_threads() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """VMMs that migrate after a line on the standard input of the process that started them, and their pids."""
    words = [sys.executable, "-m", "tests.integration.swarm", "1", "--threads", "5000"]
    with Companion(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as vmms:
        assert vmms.stdin is not None and vmms.stdout is not None
        assert vmms.stdout.readline() == "ready\n"
        pids = Path(f"/proc/{vmms.pid}/task/{vmms.pid}/children").read_text().split()
        pids = [pid for pid in pids if len(os.listdir(f"/proc/{pid}/task")) > 5000]  # noqa: PTH208
        assert len(pids) == 2
        try:
            yield vmms, [int(pid) for pid in pids]
        finally:
            vmms.stdin.close()


@pytest.mark.long
def test_vmms_with_five_thousand_threads_each(tmp_path: Path) -> None:
    """They migrate to each other as fast as with few, and each vCPU is found."""
    log = tmp_path / "log"
    with two_with_five_thousand_threads() as (vmms, pids):
        assert vmms.stdin is not None and vmms.stdout is not None
        options = [part for pid in pids for part in ("--pid", str(pid))]
        began = time.monotonic()
        with recorder([*PROGRAM, "record", *options, "-o", str(tmp_path / "x.rec")], log) as process:
            armed_s = time.monotonic() - began
            vmms.stdin.write("\n")
            vmms.stdin.flush()
            assert vmms.stdout.readline() == "done 1\n"
            assert process.wait(30) == 0, log.read_text()
    assert armed_s < 30
    found = reported(tmp_path / "x.rec")
    assert found["completeness"]["verdict"] != "incomplete" and found["blackout_ns"], found["completeness"]  # type: ignore[index]


@pytest.mark.long
def test_threads_that_all_end_at_once_fill_no_table(tmp_path: Path) -> None:
    """They leave the system call in which they wait. The table of threads has 8192 places."""
    with two_with_five_thousand_threads() as (vmms, pids):
        options = [part for pid in pids for part in ("--pid", str(pid))]
        with recorder([*PROGRAM, "record", *options, "-o", str(tmp_path / "x.rec")], tmp_path / "log") as process:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            assert process.wait(30) == 0
        vmms.kill()
    ending = read_recording(tmp_path / "x.rec").events[-1]
    assert isinstance(ending, Ending) and ending.lost == {}


VM = """
import fcntl, os, sys
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
vcpu = fcntl.ioctl(vm, 0xAE41, 0)
print("ready", flush=True)
sys.stdin.readline()
os.execv(sys.argv[1], sys.argv[1:])
"""
"""A process with a VM (KVM_CREATE_VM, KVM_CREATE_VCPU) that turns into another program."""


def test_a_vmm_that_turns_into_another_program_and_ends(tmp_path: Path) -> None:
    words = [sys.executable, "-c", VM, "/bin/sleep", "2"]
    log = tmp_path / "log"
    with Companion(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as vmm:
        assert vmm.stdin is not None and vmm.stdout is not None
        assert vmm.stdout.readline() == "ready\n"
        command = [*PROGRAM, "record", "--pid", str(vmm.pid), "-o", str(tmp_path / "x.rec")]
        with recorder(command, log) as process:
            vmm.stdin.write("\n")
            vmm.stdin.flush()
            assert vmm.wait(30) == 0
            assert process.wait(30) == 0, log.read_text()
    said = [line.partition(";")[0] for line in log.read_text().splitlines()]
    assert said[-2:] == [f"tracing {vmm.pid}", "target-died"], said
    assert reported(tmp_path / "x.rec")["blackout_ns"] is None


def test_processes_that_are_no_vm(tmp_path: Path) -> None:
    """Pid 1, the recorder itself, a zombie, a kernel thread: refused before anything is loaded."""
    zombie = subprocess.Popen(["true"])
    until(lambda: Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    itself = ["sh", "-c", 'exec "$@" --pid $$', "sh", *PROGRAM, "record"]
    for command, words in (
        ([*PROGRAM, "record", "--pid", "1"], "has no KVM VM"),
        ([*PROGRAM, "record", "--pid", "2"], "has no KVM VM"),
        ([*PROGRAM, "record", "--pid", str(zombie.pid), "--", "touch", "started"], "has ended"),
        (itself, "is this process itself"),
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout) == (2, "") and words in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
    zombie.wait()
