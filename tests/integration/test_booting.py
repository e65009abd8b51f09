# SPDX-License-Identifier: Apache-2.0
"""A VM that boots is no destination, whatever its monitor, disk or network delivers before its guest runs.

The VMs are started and driven without any code of ours.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import RECEIVE, Transfer, VcpuEnter
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import find_binary
from tests.conftest import TRACING, requires
from tests.integration.exporters import OURS, SETTLED_S, running
from tests.integration.migrations import QUICK
from tests.integration.test_chains import seen, watching
from tests.integration.test_results import Qmp

pytestmark = requires(*TRACING)


@contextmanager
def booting(directory: Path, name: str, *more: str) -> Iterator[Qmp]:
    """A VM that boots; gives its monitor."""
    guest, monitor = directory / "guest.elf", directory / "monitor"
    guest.write_bytes(QUICK.guest())
    command = [find_binary(None), "-name", name, "-accel", "kvm", "-m", "128", "-nodefaults", "-display", "none"]
    command += ["-bios", "qboot.rom", "-kernel", str(guest), "-qmp", f"unix:{monitor},server=on,wait=off"]
    with running(*command, *more, stderr=subprocess.DEVNULL):
        deadline = time.monotonic() + 20
        while True:
            with suppress(OSError):
                qmp = Qmp(str(monitor))
                break
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield qmp


def talk(qmp: Qmp) -> None:
    """Much goes to and fro, the vCPU's registers are read, and the guest is set going."""
    for _ in range(5):
        qmp("query-qmp-schema")
    qmp("human-monitor-command", **{"command-line": "help " + "x" * 60_000})
    time.sleep(0.3)
    qmp("human-monitor-command", **{"command-line": "info registers"})
    qmp("cont")


def at_once(directory: Path, name: str) -> None:
    with booting(directory, name):
        time.sleep(2)


def after_much_talk(directory: Path, name: str) -> None:
    with booting(directory, name, "-S") as qmp:
        talk(qmp)
        time.sleep(2)


def with_a_network(directory: Path, name: str) -> None:
    """Its switch sends at once."""
    path = str(directory / "switch")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()

        def flood() -> None:
            with suppress(OSError):
                peer = server.accept()[0]
                frame = (1000).to_bytes(4, "big") + bytes(1000)
                while True:
                    peer.sendall(frame * 50)

        threading.Thread(target=flood, daemon=True).start()
        net = ["-netdev", f"stream,id=net,addr.type=unix,addr.path={path}", "-device", "virtio-net,netdev=net,romfile="]
        with booting(directory, name, "-S", *net) as qmp:
            talk(qmp)
            time.sleep(2)


def with_a_disk_that_is_read(directory: Path, name: str) -> None:
    if not shutil.which("qemu-storage-daemon"):
        pytest.skip("no qemu-storage-daemon")
    image, path = directory / "image", directory / "nbd"
    image.write_bytes(bytes(8 << 20))
    export = ["--nbd-server", f"addr.type=unix,addr.path={path}", "--export", "nbd,id=e,node-name=f,name=e"]
    with running("qemu-storage-daemon", "--blockdev", f"file,node-name=f,filename={image},read-only=on", *export):
        while not path.exists():
            time.sleep(0.01)
        drive = f"file=nbd+unix:///e?socket={path},format=raw,if=virtio,readonly=on"
        with booting(directory, name, "-S", "-drive", drive) as qmp:
            qmp("human-monitor-command", **{"command-line": 'qemu-io virtio0 "read 0 4M"'})
            talk(qmp)
            time.sleep(2)


@pytest.mark.parametrize(
    ("boot", "enough"),
    [(at_once, 0), (after_much_talk, 60_000), (with_a_network, 50_000), (with_a_disk_that_is_read, 4 << 20)],
)
def test_record_goes_on(boot: Callable[[Path, str], None], enough: int, tmp_path: Path) -> None:
    path, name = tmp_path / "seen.rec", f"{OURS}boot"
    command = [sys.executable, "-m", "ebpf_mig", "record", "--vm", name, "--duration", "60s", "-o", str(path)]
    with running(*command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None and "as soon as" in process.stderr.readline()
        boot(tmp_path, name)
        said = process.communicate(timeout=30)[1]
    assert "target-died" in said, "only the end of the VM ends it"
    recording = read_recording(path)
    started = min(e.at_ns for e in recording.events if isinstance(e, VcpuEnter))
    early = [e for e in recording.events if isinstance(e, Transfer) and e.end_ns < started and e.direction == RECEIVE]
    assert sum(e.bytes for e in early) >= enough
    found = analyse(recording).breakdown
    late = boot is at_once and found.migration.source is not None  # the guest ran before the VM was found
    assert found.migration.result == "unknown"
    assert ("nothing of a migration" if late else "booted") in " ".join(found.notes)


def test_a_vm_that_ends_while_it_is_recorded_had_no_migration(tmp_path: Path) -> None:
    path, name = tmp_path / "seen.rec", f"{OURS}boot"
    command = [sys.executable, "-m", "ebpf_mig", "record", "--vm", name, "--duration", "60s", "-o", str(path)]
    with ExitStack() as vm:
        vm.enter_context(booting(tmp_path, name))
        with running(*command, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None and "tracing" in process.stderr.readline()
            time.sleep(0.5)
            vm.close()
            assert "target-died" in process.communicate(timeout=30)[1]
    found = analyse(read_recording(path)).breakdown
    assert (found.migration.result, found.window_ns) == ("unknown", None)
    assert found.diagnosis is not None and found.diagnosis.headline.endswith("no migration was seen")


def test_watch_says_nothing(tmp_path: Path) -> None:
    with watching(tmp_path / "state") as process:
        time.sleep(SETTLED_S)
        with_a_network(tmp_path, f"{OURS}boot")
        assert seen(process) == []
