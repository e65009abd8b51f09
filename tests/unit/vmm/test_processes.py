# SPDX-License-Identifier: Apache-2.0
"""Which process runs a named VM, on real processes that only look like VMMs."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebpf_mig.errors import UsageError
from ebpf_mig.vmm import processes
from tests.companion import Companion

UUID = "4dea22b3-1d52-4a3c-9d5f-0c2d5e6f7a8b"
Start = Callable[..., int]


@pytest.fixture(autouse=True)
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query scans the processes. When a scan is due has its own test."""
    monkeypatch.setattr(processes, "SEARCH_INTERVAL_NS", 0)
    monkeypatch.setattr(processes, "_SHARE", 0)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a shell under another name, with arguments that it ignores; returns its pid."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(name: str, *arguments: str) -> int:
        program = tmp_path / name
        if not program.exists():
            shutil.copy(shutil.which("bash") or "/bin/bash", program)
        process = subprocess.Popen([program, "-c", "read", "x", *arguments], stdin=subprocess.PIPE)
        running.append(process)
        until = time.monotonic() + 5
        while processes.procfs.comm(process.pid) != name[:15] and time.monotonic() < until:
            time.sleep(0.005)
        return process.pid

    yield begin
    for process in running:
        process.kill()
        process.wait()
        assert process.stdin
        process.stdin.close()


def test_by_name_pattern_and_uuid(start: Start) -> None:
    name = f"vm-{os.getpid()}"
    pid = start("qemu-system-x86_64", "-name", f"guest={name},debug-threads=on", "-uuid", UUID)
    other = start("qemu-system-x86_64", "-name", f"{name}-b")
    assert processes.find(name) == [pid]
    assert processes.find(UUID.upper()) == [pid]
    assert set(processes.find(f"{name}*")) == {pid, other}
    assert processes.find(f"{name}-?") == [other]
    assert processes.find("nobody") == []


def test_a_process_that_only_mentions_the_name_is_no_vmm(start: Start) -> None:
    name = f"vm-{os.getpid()}"
    start("virsh", "migrate", "--live", "-name", name, "-uuid", UUID)
    assert processes.find(name) == []
    assert processes.find(UUID) == []


def test_a_vmm_that_gave_itself_another_name_is_found(tmp_path: Path) -> None:
    """QEMU does with `-name process=NAME`. Its program still has the old one, also after an upgrade replaced it."""
    name, program = f"vm-{os.getpid()}", tmp_path / "qemu-system-x86_64"
    shutil.copy(shutil.which("bash") or "/bin/bash", program)
    script = "echo -n web > /proc/$$/comm; echo; read"
    command = [program, "-c", script, "-name", f"guest={name},process=web"]
    with Companion(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        assert processes.procfs.comm(process.pid) == "web"
        assert processes.find(name) == [process.pid]
        program.unlink()
        assert processes.find(name) == [process.pid]
        process.stdin.close()


def test_two_of_a_name_are_found_oldest_first(start: Start) -> None:
    name = f"vm-{os.getpid()}"
    first = start("qemu-kvm", "-name", name)
    time.sleep(0.03)  # starts are counted in ticks of 10 ms
    second = start("kvm", "-name", name)
    assert processes.find(name) == [first, second]


def test_a_later_one_arrives_once(start: Start) -> None:
    name = f"vm-{os.getpid()}"
    start("qemu-system-x86_64", "-name", name)
    arrivals = processes.Arrivals(name)
    assert arrivals.new() == []
    late = start("qemu-system-x86_64", "-name", name)
    assert arrivals.new() == [late]
    assert arrivals.new() == []


def test_one_that_execs_after_it_was_seen_arrives(tmp_path: Path) -> None:
    name = f"vm-{os.getpid()}"
    program = tmp_path / "qemu-system-x86_64"
    shutil.copy(shutil.which("bash") or "/bin/bash", program)
    arrivals = processes.Arrivals(name)
    script = f"read; exec {program} -c read x -name {name}"
    with Companion(["bash", "-c", script], stdin=subprocess.PIPE) as process:
        assert process.stdin
        assert arrivals.new() == []
        process.stdin.write(b"\n")
        process.stdin.flush()
        until = time.monotonic() + 5
        while not (found := arrivals.new()) and time.monotonic() < until:
            time.sleep(0.005)
        assert found == [process.pid]
        process.kill()


def test_a_pattern_that_fits_several_vms_is_refused(start: Start) -> None:
    name = f"vm-{os.getpid()}"
    start("qemu-system-x86_64", "-name", f"{name}-a")
    start("qemu-system-x86_64", "-name", f"{name}-b")
    with pytest.raises(UsageError, match=rf"fits several VMs: {name}-a, {name}-b"):
        processes.Followed(f"{name}-*")
    assert len(processes.Followed(f"{name}-a").pids) == 1


def test_the_destination_is_followed_and_another_vm_that_fits_is_not(start: Start) -> None:
    name = f"vm-{os.getpid()}"
    source = start("qemu-system-x86_64", "-name", f"{name}-[1]")
    followed = processes.Followed(f"{name}-*")
    assert followed.pids == [source]
    start("qemu-system-x86_64", "-name", f"{name}-2")
    assert followed.new() == []
    destination = start("qemu-system-x86_64", "-name", f"{name}-[1]")
    assert followed.new() == [destination]
    start("qemu-system-x86_64", "-name", f"{name}-[1]")
    assert followed.new() == []
    assert followed.pids == [source, destination]


@pytest.mark.parametrize("wanted", ["name", "uuid"])
def test_a_vm_that_is_not_there_yet(start: Start, wanted: str) -> None:
    name = f"vm-{os.getpid()}"
    followed = processes.Followed(name if wanted == "name" else UUID)
    assert followed.pids == [] == followed.new()
    pids = [start("qemu-system-x86_64", "-name", name, "-uuid", UUID) for _ in range(2)]
    assert sorted(followed.new()) == sorted(pids)


def test_more_processes_than_a_migration_has_are_refused(start: Start) -> None:
    name = f"vm-{os.getpid()}"
    for _ in range(3):
        start("qemu-system-x86_64", "-name", name)
    with pytest.raises(UsageError, match="is run by 3 processes"):
        processes.Followed(name)


@pytest.mark.parametrize(("waits", "least", "most"), [(False, 2, 10), (True, 4, 20)])
def test_looks_take_a_small_part_of_the_time(
    monkeypatch: pytest.MonkeyPatch, waits: bool, least: int, most: int
) -> None:
    monkeypatch.setattr(processes, "SEARCH_INTERVAL_NS", 1_000_000)
    monkeypatch.setattr(processes, "_SHARE", 20)
    looked = 0
    real = processes.procfs.processes

    def counted() -> list[int]:
        nonlocal looked
        looked += 1
        if waits:  # for a CPU
            time.sleep(0.02)
        busy = time.thread_time_ns() + 2_000_000  # as with thousands of processes
        while not waits and time.thread_time_ns() < busy:
            pass
        return real()

    arrivals = processes.Arrivals("nobody")
    monkeypatch.setattr(processes.procfs, "processes", counted)
    until = time.monotonic() + 0.4
    while time.monotonic() < until:
        arrivals.new()
    assert least <= looked <= most
