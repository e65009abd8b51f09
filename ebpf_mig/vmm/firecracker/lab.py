# SPDX-License-Identifier: Apache-2.0
"""Two Firecrackers with the tiny guest: the counterpart of `vmm.qemu.lab`.

In: a `Scenario`. Out: pids, API sockets, a directory for the snapshot, heartbeats, notes for the report. The second
Firecracker has no VM until it loads the snapshot. Everything lies in a private directory and is removed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ebpf_mig.errors import PreflightError, VmmError
from ebpf_mig.lab.heartbeat import Heartbeat
from ebpf_mig.lab.program import find_program
from ebpf_mig.lab.scenario import MIB, Scenario, require_x86
from ebpf_mig.linux import procfs
from ebpf_mig.linux.process import private_directory, spawn, stop
from ebpf_mig.vmm.firecracker.api import RUNNING, Api
from ebpf_mig.vmm.firecracker.migration import FcOptions

ENVIRONMENT = "EBPF_MIG_FIRECRACKER"
DEFAULT_BINARY = "firecracker"
UFFD_NOTE = "page faults of the restored guest are served by the lab's own handler, a Python program: yours is faster"
_HANDLER = Path(__file__).with_name("uffd_handler.py")
_START_S = 30.0
_BASE_S = 60.0


@dataclass
class FcVm:
    """One VMM of the pair."""

    role: str
    process: subprocess.Popen[bytes]
    api: str
    log: Path
    heartbeat: Heartbeat

    @property
    def pid(self) -> int:
        return self.process.pid


def find_binary(wanted: str | None) -> str:
    """The VMM to use; PreflightError if there is none."""
    return find_program(
        wanted,
        ENVIRONMENT,
        DEFAULT_BINARY,
        "install a release from github.com/firecracker-microvm/firecracker, or name it",
    )


class FcPair:
    """Source and destination. They start on entering the context and end on leaving it."""

    def __init__(
        self, scenario: Scenario, binary: str | None = None, *, uffd: bool = False, diff: bool = False
    ) -> None:
        """`uffd`: a handler serves the restored guest's page faults. `diff`: the snapshot has only what changed since
        one that is made at the start.
        """
        require_x86("Firecracker")
        if uffd and "unprivileged_userfaultfd" not in procfs.names("sys", "vm"):
            raise PreflightError("this kernel has no userfaultfd", "use a kernel with CONFIG_USERFAULTFD, or the file")
        self.scenario = scenario
        self.binary = find_binary(binary)
        self.uffd, self.diff = uffd, diff
        self.notes: list[str] = [UFFD_NOTE] if uffd else []
        self.handler: subprocess.Popen[bytes] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> FcPair:
        with contextlib.ExitStack() as guard:
            self._stack = guard
            self.directory = guard.enter_context(private_directory())
            (self.directory / "snapshot").mkdir()
            self.source = self._start("source", ["--config-file", str(self._configuration())])
            self.destination = self._start("destination", [])
            if self.uffd:
                self._start_handler()
            self._wait_until_up()
            if self.diff:
                self._make_base()
            self._stack = guard.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def options(self) -> FcOptions:
        """The settings of the hand-over that the pair was made for."""
        return FcOptions(
            directory=str(self.directory / "snapshot"),
            diff=str(self.directory / "base.memory") if self.diff else None,
            uffd=str(self.directory / "uffd") if self.uffd else None,
            source_log=str(self.source.log),
            destination_log=str(self.destination.log),
        )

    def _configuration(self) -> Path:
        """The file that describes the source's VM (docs/getting-started.md, v1.16)."""
        guest, config = self.directory / "guest.elf", self.directory / "vm.json"
        guest.write_bytes(self.scenario.guest())
        machine = {
            "vcpu_count": self.scenario.vcpus,
            "mem_size_mib": self.scenario.memory_bytes // MIB,
            "track_dirty_pages": self.diff,
        }
        boot = {"kernel_image_path": str(guest), "boot_args": ""}
        config.write_text(json.dumps({"boot-source": boot, "drives": [], "machine-config": machine}))
        return config

    def _start(self, role: str, more: list[str]) -> FcVm:
        api, log = (self.directory / f"{role}.{kind}" for kind in ("api", "log"))
        log.touch()  # up to v1.13 it has to exist
        read_end, write_end = os.pipe()
        heartbeat = Heartbeat(read_end)
        self._stack.callback(heartbeat.join)
        command = [self.binary, "--api-sock", str(api), "--log-path", str(log), "--level", "Info", *more]
        with os.fdopen(write_end, "wb", buffering=0) as serial, (self.directory / f"{role}.err").open("wb") as stderr:
            process = spawn(command, serial, stderr)
            self._stack.callback(stop, process)
        return FcVm(role, process, str(api), log, heartbeat)

    def _start_handler(self) -> None:
        options = self.options()
        memory = options.diff or f"{options.directory}/vm.memory"
        command = [sys.executable, "-I", "-S", str(_HANDLER), str(options.uffd), memory]
        with (self.directory / "handler.err").open("wb") as stderr:
            self.handler = spawn(command, subprocess.DEVNULL, stderr)
        self._stack.callback(stop, self.handler)

    def _wait_until_up(self) -> None:
        letters = {chr(ord("A") + index) for index in range(self.scenario.vcpus)}
        deadline = time.monotonic() + _START_S + 2 * self.scenario.fill_s()
        sockets = [Path(self.destination.api), *([self.directory / "uffd"] if self.uffd else [])]
        while not (letters <= self.source.heartbeat.letters() and all(path.exists() for path in sockets)):
            for vm in (self.source, self.destination):
                if (status := vm.process.poll()) is not None:
                    raise VmmError(f"the {vm.role} Firecracker ended at once (status {status}): {self._last_line(vm)}")
            if time.monotonic() > deadline:
                raise VmmError(f"the guest did not come up; Firecracker says: {self._last_line(self.source)}")
            time.sleep(0.01)
        if (state := Api(self.source.api, "source").instance().state) != RUNNING:
            raise VmmError(f"the guest came up, but the source's state is {state}")

    def _make_base(self) -> None:
        """A full snapshot, after which the guest goes on."""
        api = Api(self.source.api, "source")
        api.pause(_BASE_S)
        files = {"snapshot_path": str(self.directory / "base.state"), "mem_file_path": self.options().diff}
        api.create({"snapshot_type": "Full", **files}, _BASE_S)
        api.resume(_BASE_S)

    def _last_line(self, vm: FcVm) -> str:
        for name in (f"{vm.role}.err", f"{vm.role}.log"):
            with contextlib.suppress(OSError):
                lines = (self.directory / name).read_text(errors="replace").strip().splitlines()
                if lines:
                    return lines[-1]
        return "nothing"
