# SPDX-License-Identifier: Apache-2.0
"""Two Cloud Hypervisors with the tiny guest: the counterpart of `vmm.qemu.lab`.

In: a `Scenario`. Out: pids, API sockets, a URL to migrate to, heartbeats, notes for the report. If this KVM cannot
save nested state, a small library is compiled and preloaded, and the report has a note on it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from ebpf_mig.errors import PreflightError, VmmError
from ebpf_mig.lab.heartbeat import Heartbeat
from ebpf_mig.lab.netns import ADDRESSES, PORT, Link
from ebpf_mig.lab.program import find_program
from ebpf_mig.lab.scenario import MIB, Scenario, require_x86
from ebpf_mig.linux import kvm
from ebpf_mig.linux.process import private_directory, spawn, stop
from ebpf_mig.vmm.cloud_hypervisor.migration import ChOptions

ENVIRONMENT = "EBPF_MIG_CLOUD_HYPERVISOR"
DEFAULT_BINARY = "cloud-hypervisor"
PRELOAD_NOTE = (
    "KVM here cannot save nested state: the lab preloads a library into the VMM that answers with an empty one"
)
SECCOMP_NOTE = (
    "the lab starts the VMM with --seccomp log: with some C libraries its filter kills it in a local migration"
)
"""Seen with 54.0.0 built for glibc 2.36: the sending thread calls newfstatat (262) and is killed during the
migration.
"""
_START_S = 30.0
_GET_NESTED_STATE = 0xC080AEBE
_SOURCE = Path(__file__).with_name("nested_state.c")


@dataclass
class ChVm:
    """One VMM of the pair."""

    role: str
    process: subprocess.Popen[bytes]
    api: str
    log: Path
    events: Path
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
        "install a release from github.com/cloud-hypervisor/cloud-hypervisor, or name it",
    )


def lacks_nested_state() -> bool:
    """Whether KVM_GET_NESTED_STATE fails with EINVAL, tested on a temporary vCPU."""
    opened: list[int] = []
    state = bytearray(struct.pack("=HHI", 0, 0, 8192).ljust(8192, b"\0"))
    try:
        opened.append(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        opened.append(fcntl.ioctl(opened[-1], kvm.CREATE_VM, 0))
        opened.append(fcntl.ioctl(opened[-1], kvm.CREATE_VCPU, 0))
        fcntl.ioctl(opened[-1], _GET_NESTED_STATE, state)
    except OSError as error:
        return error.errno == errno.EINVAL
    finally:
        for fd in reversed(opened):
            os.close(fd)
    return False


def build_preload(directory: Path) -> Path:
    """Compiles our library; PreflightError if there is no C compiler."""
    library = directory / "nested_state.so"
    command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(_SOURCE), "-ldl"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise PreflightError(
            "a C compiler is needed for the library to preload", "apt-get install gcc libc6-dev"
        ) from error
    if run.returncode:
        raise PreflightError(
            f"{_SOURCE.name} does not compile: {run.stderr.strip()[:300]}", "apt-get install libc6-dev"
        )
    return library


class ChPair:
    """Source and destination. They start on entering the context and end on leaving it."""

    def __init__(
        self,
        scenario: Scenario,
        binary: str | None = None,
        *,
        local: bool = False,
        tls_dir: str | None = None,
        preload: bool = True,
        seccomp: str | None = None,
        link: Link | None = None,
    ) -> None:
        """`preload` False: a KVM that cannot save nested state fails the migration, after the stop."""
        require_x86("Cloud Hypervisor")
        self.scenario = scenario
        self.binary = find_binary(binary)
        self.local = local
        self._link = link
        self.tls_dir = tls_dir
        self._preload = preload
        self._seccomp = seccomp or ("log" if local else None)
        self.notes: list[str] = []
        self._stack = contextlib.ExitStack()
        self._prefix: list[str] = []

    def __enter__(self) -> ChPair:
        with contextlib.ExitStack() as guard:
            self._stack = guard
            self.directory = guard.enter_context(private_directory())
            guest = self.directory / "guest.elf"
            guest.write_bytes(self.scenario.guest())
            if self._preload and lacks_nested_state():
                self.notes.append(PRELOAD_NOTE)
                self._prefix = ["/usr/bin/env", f"LD_PRELOAD={build_preload(self.directory)}"]
            if self.local and self._seccomp == "log":
                self.notes.append(SECCOMP_NOTE)
            s = self.scenario
            memory = f"size={s.memory_bytes // MIB}M" + (",shared=on" if self.local else "")
            machine = ["--kernel", str(guest), "--cpus", f"boot={s.vcpus}", "--memory", memory]
            self.source = self._start("source", [*machine, "--serial", "tty", "--console", "off"])
            self.destination = self._start("destination", [])
            self.uri = self._uri()
            self._wait_until_up()
            self._stack = guard.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def options(self) -> ChOptions:
        """The migration settings that the scenario asks for."""
        s = self.scenario
        return ChOptions(
            local=self.local,
            downtime_ms=s.downtime_ms,
            connections=s.multifd_channels,
            postcopy=s.postcopy,
            tls_dir=self.tls_dir,
            source_log=str(self.source.log),
            destination_log=str(self.destination.log),
            source_events=str(self.source.events),
            destination_events=str(self.destination.events),
        )

    def _start(self, role: str, more: list[str]) -> ChVm:
        api, log, events = (self.directory / f"{role}.{kind}" for kind in ("api", "log", "events"))
        read_end, write_end = os.pipe()
        heartbeat = Heartbeat(read_end)
        self._stack.callback(heartbeat.join)
        command = [*self._prefix, self.binary, "--api-socket", f"path={api}", "--log-file", str(log), "-vv"]
        command += [
            "--event-monitor",
            f"path={events}",
            *(["--seccomp", self._seccomp] if self._seccomp else []),
            *more,
        ]
        with os.fdopen(write_end, "wb", buffering=0) as serial, (self.directory / f"{role}.err").open("wb") as stderr:
            with self._link.inside(role) if self._link else contextlib.nullcontext():
                process = spawn(command, serial, stderr)
            self._stack.callback(stop, process)
        return ChVm(role, process, str(api), log, events, heartbeat)

    def _uri(self) -> str:
        if self.scenario.transport == "unix" or self.local:
            return f"unix:{self.directory}/migration"
        if self._link:
            return f"tcp:{ADDRESSES['destination']}:{PORT}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"tcp:127.0.0.1:{probe.getsockname()[1]}"

    def _wait_until_up(self) -> None:
        letters = {chr(ord("A") + index) for index in range(self.scenario.vcpus)}
        deadline = time.monotonic() + _START_S + 2 * self.scenario.fill_s()
        while not (letters <= self.source.heartbeat.letters() and Path(self.destination.api).exists()):
            for vm in (self.source, self.destination):
                if (status := vm.process.poll()) is not None:
                    raise VmmError(
                        f"the {vm.role} Cloud Hypervisor ended at once (status {status}): {self._last_line(vm)}"
                    )
            if time.monotonic() > deadline:
                raise VmmError(f"the guest did not come up; Cloud Hypervisor says: {self._last_line(self.source)}")
            time.sleep(0.01)

    def _last_line(self, vm: ChVm) -> str:
        for name in (f"{vm.role}.err", f"{vm.role}.log"):
            with contextlib.suppress(OSError):
                lines = (self.directory / name).read_text(errors="replace").strip().splitlines()
                if lines:
                    return lines[-1]
        return "nothing"
