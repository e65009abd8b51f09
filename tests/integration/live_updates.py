# SPDX-License-Identifier: Apache-2.0
"""Real live updates of a QEMU: VMs whose memory can stay, the commands that hand them over, and the guest's heartbeat.

`EBPF_MIG_NEWER_QEMU` names a QEMU of version 10.2 or newer if the one of the other tests is older.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.lab.heartbeat import Heartbeat
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.linux.process import spawn, stop
from ebpf_mig.vmm.qemu.lab import ENVIRONMENT
from tests.integration.migrations import QUICK
from tests.integration.test_results import Qmp

NEWER = os.environ.get("EBPF_MIG_NEWER_QEMU") or os.environ.get(ENVIRONMENT) or "qemu-system-x86_64"
SINCE = (10, 2)
"""cpr-transfer is of 10.0, cpr-exec of 10.2."""


def require_live_update() -> None:
    said = subprocess.run([NEWER, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"version (\d+)\.(\d+)", said)
    if version is None or (int(version[1]), int(version[2])) < SINCE:
        pytest.skip("missing feature: QEMU 10.2 (in PATH, EBPF_MIG_QEMU or EBPF_MIG_NEWER_QEMU)")


@dataclass
class Vm:
    """A VM whose memory survives its program."""

    directory: Path
    scenario: Scenario = QUICK
    name: str = "guest"
    binary: str = NEWER
    memory: str = ""
    """More options of the memory's backend."""
    extra: Sequence[str] = ()
    patience_s: float = 30
    """How long the guest may take to come up."""
    beats: dict[str, Heartbeat] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def command(self, role: str) -> list[str]:
        s = self.scenario
        size = s.memory_bytes // MIB
        memory = ["-object", f"memory-backend-memfd,id=ram0,size={size}M,share=on{self.memory}", "-m", str(size)]
        machine = ["-machine", "pc,memory-backend=ram0,aux-ram-share=on", "-accel", "kvm", *memory]
        plain = ["-smp", str(s.vcpus), "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
        monitor = ["-qmp", f"unix:{self.qmp(role)},server=on,wait=off", "-bios", "qboot.rom"]
        kernel = ["-kernel", str(self.directory / "guest.elf")]
        return [self.binary, "-name", self.name, *machine, *plain, *monitor, *kernel, *self.extra]

    def qmp(self, role: str) -> Path:
        return self.directory / f"{role}.qmp"

    def start(self, role: str, *more: str) -> int:
        """Its pid."""
        read_end, write_end = os.pipe()
        self.beats[role] = Heartbeat(read_end)
        with os.fdopen(write_end, "wb", buffering=0) as serial, (self.directory / f"{role}.log").open("wb") as log:
            process = spawn([*self.command(role), *more], serial, log)
        self.processes[role] = process
        return process.pid

    def await_transfer(self, incoming: str = "") -> int:
        """Starts the new QEMU of a cpr-transfer, and returns its pid once it waits."""
        address = {"transport": "socket", "type": "unix", "path": str(self.directory / "cpr")}
        channel = json.dumps({"channel-type": "cpr", "addr": address})
        pid = self.start("destination", "-incoming", incoming or f"unix:{self.directory}/main", "-incoming", channel)
        self.until((self.directory / "cpr").exists, self.patience_s)
        return pid

    def until(self, what: Callable[[], Any], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            for role, process in self.processes.items():
                assert process.poll() is None, (self.directory / f"{role}.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def transfer(self) -> None:
        """cpr-transfer by QMP, as somebody else would do it."""
        source = Qmp(str(self.qmp("source")))
        source.capability("events")
        source("migrate-set-parameters", mode="cpr-transfer")
        kinds = (("main", "main"), ("cpr", "cpr"))
        socket = {"transport": "socket", "type": "unix"}
        source(
            "migrate",
            channels=[{"channel-type": k, "addr": {**socket, "path": str(self.directory / p)}} for k, p in kinds],
        )
        assert source.reaches("completed", "failed") == "completed"

    def replace(self) -> None:
        """cpr-exec by QMP. Returns when the new program runs the guest."""
        source = Qmp(str(self.qmp("source")))
        source.capability("events")
        state = f"file:{self.directory}/state"
        command = Path(f"/proc/{self.processes['source'].pid}/cmdline").read_text().split("\0")[:-1]
        source("migrate-set-parameters", mode="cpr-exec", **{"cpr-exec-command": [*command, "-incoming", state]})
        source("migrate", uri=state)

        def runs() -> bool:
            with contextlib.suppress(OSError, ValueError):
                monitor = Qmp(str(self.qmp("source")))
                return monitor.runs() and monitor.status() == "completed"
            return False

        time.sleep(0.5)
        self.until(runs)


@contextlib.contextmanager
def vm(directory: Path, **options: Any) -> Iterator[Vm]:
    """A source whose vCPUs all beat."""
    made = Vm(directory, **options)
    (directory / "guest.elf").write_bytes(made.scenario.guest())
    try:
        made.start("source")
        letters = {chr(ord("A") + index) for index in range(made.scenario.vcpus)}
        made.until(lambda: letters <= made.beats["source"].letters(), made.patience_s)
        time.sleep(0.3)
        yield made
    finally:
        for process in made.processes.values():
            stop(process)
        for beats in made.beats.values():
            beats.join()
