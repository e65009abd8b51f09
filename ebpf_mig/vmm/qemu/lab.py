# SPDX-License-Identifier: Apache-2.0
"""Two QEMUs with the tiny guest: a source that runs, a destination that waits. Use `QemuPair` as a context manager.

In: a `Scenario`. Out: pids, QMP sockets, a URI to migrate to, heartbeats of both sides. The VMs end
when we do (see `lab.process`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ebpf_mig.errors import PreflightError, VmmError
from ebpf_mig.lab.heartbeat import Heartbeat
from ebpf_mig.lab.netns import ADDRESSES, PORT, Link
from ebpf_mig.lab.program import find_program
from ebpf_mig.lab.scenario import ARM64, MIB, Scenario
from ebpf_mig.linux.process import private_directory, spawn, stop
from ebpf_mig.vmm.qemu.adapter import DEFAULT_BINARY, PACKAGE
from ebpf_mig.vmm.qemu.migration import QemuOptions

ENVIRONMENT = "EBPF_MIG_QEMU"
_START_S = 30.0
_FAST_FIRMWARE = "qboot.rom"
"""Boots the guest in 0.1 s where SeaBIOS needs seconds under an emulating KVM; part of qemu-system-data."""


@dataclass
class QemuVm:
    """One QEMU of the pair."""

    role: str
    process: subprocess.Popen[bytes]
    qmp: str
    log: Path
    heartbeat: Heartbeat

    @property
    def pid(self) -> int:
        return self.process.pid

    def last_line(self) -> str:
        """The last line the VMM printed, to be quoted in an error."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if "warning" not in line]
        return lines[-1] if lines else "it printed nothing"


def find_binary(wanted: str | None) -> str:
    """The VMM to use; PreflightError if there is none."""
    return find_program(wanted, ENVIRONMENT, DEFAULT_BINARY, f"apt-get install {PACKAGE}, or name the binary")


class QemuPair:
    """Source and destination. They start on entering the context and end on leaving it."""

    def __init__(
        self, scenario: Scenario, binary: str | None = None, extra: Sequence[str] = (), link: Link | None = None
    ) -> None:
        self.scenario = scenario
        self.binary = find_binary(binary)
        self._extra = list(extra)
        self._link = link
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> QemuPair:
        with contextlib.ExitStack() as guard:
            self._stack = guard
            self.directory = guard.enter_context(private_directory())
            guest = self.directory / "guest.elf"
            _write(guest, self.scenario.guest())
            self.source = self._start("source", ["-kernel", str(guest)])
            self.destination = self._start("destination", ["-kernel", str(guest), "-incoming", "defer"])
            self.uri = self._uri()
            self._wait_until_up()
            self._stack = guard.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def options(self) -> QemuOptions:
        """The migration settings that the scenario asks for."""
        s = self.scenario
        wanted = {"auto-converge": True} if s.auto_converge else {}
        return QemuOptions(s.bandwidth_bytes, s.downtime_ms, s.multifd_channels, s.postcopy, wanted)

    def _start(self, role: str, more: Sequence[str]) -> QemuVm:
        qmp, log = self.directory / f"{role}.qmp", self.directory / f"{role}.log"
        read_end, write_end = os.pipe()
        heartbeat = Heartbeat(read_end)  # owns read_end and ends once every write end is closed
        self._stack.callback(heartbeat.join)
        with os.fdopen(write_end, "wb", buffering=0) as serial, log.open("wb") as stderr:
            with self._link.inside(role) if self._link else contextlib.nullcontext():
                process = spawn([*self._command(role, qmp), *more], serial, stderr)
            self._stack.callback(stop, process)
        return QemuVm(role, process, str(qmp), log, heartbeat)

    def _command(self, role: str, qmp: Path) -> list[str]:
        s = self.scenario
        accel = "kvm" if s.dirty_ring is None else f"kvm,dirty-ring-size={s.dirty_ring}"
        machine = ["virt,gic-version=host", "-cpu", "host"] if ARM64 else ["pc"]
        command = [self.binary, "-name", f"ebpf-mig-{role},debug-threads=on", "-machine", *machine, "-accel", accel]
        command += ["-m", str(s.memory_bytes // MIB), "-smp", str(s.vcpus)]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-msg", "timestamp=on"]
        command += ["-serial", "stdio", "-qmp", f"unix:{qmp},server=on,wait=off"]
        if not ARM64 and self._has_fast_firmware():
            command += ["-bios", _FAST_FIRMWARE]
        return command + [part.replace("{role}", role).replace("{dir}", str(self.directory)) for part in self._extra]

    def _has_fast_firmware(self) -> bool:
        shares = [Path(self.binary).resolve().parent.parent / "share/qemu", Path("/usr/share/qemu")]
        return any((share / _FAST_FIRMWARE).exists() for share in shares)

    def _uri(self) -> str:
        if self.scenario.transport == "unix":
            return f"unix:{self.directory}/migration"
        if self._link:
            return f"tcp:{ADDRESSES['destination']}:{PORT}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"tcp:127.0.0.1:{probe.getsockname()[1]}"

    def _wait_until_up(self) -> None:
        """Waits until both monitors exist and every vCPU of the guest has written output."""
        letters = {chr(ord("A") + index) for index in range(self.scenario.vcpus)}
        patience = _START_S + 2 * self.scenario.fill_s()
        deadline = time.monotonic() + patience
        while True:
            for vm in (self.source, self.destination):
                if (status := vm.process.poll()) is not None:
                    raise VmmError(f"the {vm.role} QEMU ended at once (status {status}): {vm.last_line()}")
            seen = letters & self.source.heartbeat.letters()
            if seen == letters and Path(self.destination.qmp).exists():
                return
            if time.monotonic() > deadline:
                raise VmmError(
                    f"the guest did not come up within {patience:.0f} s: {len(seen)} of {len(letters)} vCPUs "
                    f"wrote to the serial port; QEMU says: {self.source.last_line()}"
                )
            time.sleep(0.01)


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise PreflightError(f"cannot write {path}: {error.strerror}", "make room, or set TMPDIR") from error
