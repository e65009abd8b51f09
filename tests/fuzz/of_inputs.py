# SPDX-License-Identifier: Apache-2.0
"""Targets whose input comes from VMMs, the kernel, a scraper or a user.

In: bytes. Out: nothing, or an undocumented exception.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import socket
import struct
import tempfile
import threading
from pathlib import Path
from unittest import mock

import click

from ebpf_mig.commands import exporter, settings
from ebpf_mig.compare import benchmark
from ebpf_mig.errors import EbpfMigError, PreflightError, UsageError, VmmError
from ebpf_mig.exporter import webconfig
from ebpf_mig.exporter.metrics import Metrics
from ebpf_mig.exporter.web import Web
from ebpf_mig.linux import btf, descriptors, procfs
from ebpf_mig.linux.kallsyms import Symbols
from ebpf_mig.vmm.cloud_hypervisor import event_monitor
from ebpf_mig.vmm.cloud_hypervisor.api import Api
from ebpf_mig.vmm.cloud_hypervisor.log import LogPlace
from ebpf_mig.vmm.firecracker.api import Api as FirecrackerApi
from ebpf_mig.vmm.firecracker.log import LogPlace as FirecrackerLog
from ebpf_mig.vmm.qemu import migration as qemu
from ebpf_mig.vmm.qemu import monitor
from tests.fuzz.target import Target, corpus


@functools.cache
def _scratch() -> Path:
    place = Path(tempfile.mkdtemp(prefix="ebpf-mig-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _file(name: str, data: bytes) -> Path:
    path = _scratch() / name
    path.write_bytes(data)
    return path


class _Peer:
    """Listens on a UNIX socket. Each client gets the current bytes, line by line per request, or all at once."""

    def __init__(self, name: str, *, by_line: bool) -> None:
        self.path = str(_scratch() / name)
        self.data = b""
        self._by_line = by_line
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            with client, contextlib.suppress(OSError):
                client.settimeout(1)
                self._talk(client)

    def _talk(self, client: socket.socket) -> None:
        if not self._by_line:
            client.recv(65536)
            client.sendall(self.data)
            return
        greeting, *answers = self.data.split(b"\n")
        client.sendall(greeting + b"\n")
        for answer in answers:
            asked = client.recv(65536)
            if not asked:
                return
            name = asked.partition(b'"id": "')[2].partition(b'"')[0]
            client.sendall(answer.replace(b"@ID", name) + b"\n")


@functools.cache
def _peer(name: str, by_line: bool) -> _Peer:
    return _Peer(name, by_line=by_line)


def qmp(data: bytes) -> None:
    """A QMP monitor that sends the input, one line per command."""
    peer = _peer("qmp", True)
    peer.data = data
    with (
        mock.patch.object(monitor, "GREETING_S", 0.2),
        mock.patch.object(monitor, "COMMAND_S", 0.2),
        mock.patch.object(qemu, "_CANCEL_S", 0.1),
        contextlib.suppress(VmmError),
        contextlib.closing(qemu.QemuMigration(peer.path, None, "tcp:127.0.0.1:1")) as migration,
    ):
        migration.prepare()
        migration.run(0.1)


def http(data: bytes) -> None:
    """An HTTP API that answers every request with the input."""
    peer = _peer("api", False)
    peer.data = data
    api, firecracker = Api(peer.path, "source"), FirecrackerApi(peer.path, "source")
    for ask in (
        firecracker.instance,
        firecracker.memory_bytes,
        lambda: firecracker.pause(1),
        api.ping,
        api.state,
        lambda: api.call("GET", "x", timeout_s=1),
        lambda: api.knows("vm.send-migration", "x"),
    ):
        with contextlib.suppress(VmmError):
            ask()


def ch_log(data: bytes) -> None:
    """A log of Cloud Hypervisor, or of Firecracker."""
    place = LogPlace(str(_file("log", data)), 0)
    figures = place.figures()
    assert all(0 <= ms < 10**12 for ms in figures.values())
    assert len(place.failure()) <= 500
    assert all(0 <= us < 10**12 for us in FirecrackerLog(place.path, 0).figures().values())


def ch_events(data: bytes) -> None:
    """An event file of Cloud Hypervisor."""
    found, rest = event_monitor.decode(data.decode(errors="replace"))
    assert len(rest) <= len(data)
    written_events = [event_monitor.MonitorEvent(name, stamp, 10**15) for name, stamp in found]
    marks = event_monitor.marks(1, written_events, (0, 0))
    assert all(mark.doubt_ns >= 0 for mark in marks)


@functools.cache
def _proc() -> Path:
    root = _scratch() / "proc"
    for place in ("7/task/8/fd", "7/fd", "7/net", "sys/kernel"):
        (root / place).mkdir(parents=True, exist_ok=True)
    return root


def proc(data: bytes) -> None:
    """Every /proc file of a process has the input as its content."""
    root = _proc()
    for name in ("stat", "status", "comm", "cmdline", "statm", "syscall", "net/tcp", "task/8/stat", "task/8/status",
                 "task/8/comm", "task/8/syscall"):  # fmt: skip
        (root / "7" / name).write_bytes(data)
    for place in (root / "7/fd/3", root / "7/task/8/fd/3"):
        place.unlink(missing_ok=True)
        text = data.replace(b"\0", b"")[:200] or b"x"
        os.symlink(text, place)  # noqa: PTH211

    with mock.patch.object(procfs, "path", lambda *parts: "/".join((str(root), *map(str, parts)))):
        facts = (procfs.is_alive, procfs.start_time, procfs.threads_of, procfs.comm, procfs.command_line,
                 procfs.resident_bytes, procfs.exists,
                 descriptors.holds_vm, descriptors.holds_kvm, descriptors.vcpus_of)  # fmt: skip
        for fact in facts:
            fact(7)
        procfs.processes()
        procfs.cpu_ticks(7, 8)
        procfs.in_kvm_run(7, 8)
        list(descriptors.links(7))
        for raising in (lambda: procfs.fields(7, 8), lambda: procfs.process_of(7), lambda: procfs.numbers(7)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                raising()


def symbols(data: bytes) -> None:
    """/proc/kallsyms."""
    names = Symbols(data.decode(errors="replace").splitlines())
    for address in (0, 1, 0xFFFFFFFF81000000, (1 << 64) - 1):
        assert isinstance(names.name(address), str)


@functools.cache
def _web() -> Web:
    listener = socket.create_server(("127.0.0.1", 0))
    server = Web(listener, Metrics())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def web(data: bytes) -> None:
    """A request to the exporter by a client that then closes. The exporter keeps running."""
    with contextlib.suppress(OSError), socket.create_connection(_web().server_address[:2], 5) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):
            pass
    with socket.create_connection(_web().server_address[:2], 5) as client:
        client.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.")


def web_config(data: bytes) -> None:
    """The exporter's web configuration."""
    with contextlib.suppress(UsageError, PreflightError):
        webconfig.load(str(_file("web.yml", data)))


def toml_config(data: bytes) -> None:
    """The exporter's configuration file."""
    with contextlib.suppress(UsageError):
        settings.read(str(_file("exporter.toml", data)), click.Context(exporter.command), set())


def btf_blob(data: bytes) -> None:
    """BTF of a kernel, and of a module based on it."""
    path = str(_file("btf", data))
    with contextlib.suppress(PreflightError):
        btf.forget()
        btf.offsets(path, [("outer", "first"), ("outer", "inner"), ("outer", "last"), ("x", "y")])
    with contextlib.suppress(PreflightError):
        btf.forget()
        btf.functions(path, ["f", "g"], path)


def bench(data: bytes) -> None:
    """A result file of `bench`."""
    try:
        found = benchmark.decode(data, "x")
    except EbpfMigError:
        return
    assert benchmark.decode(benchmark.encode(found).encode(), "x") == found


def _btf_seeds() -> list[bytes]:
    """BTF of a struct, a union in it, an enum, a function and its parameters, by the documented layout."""
    names = b"\0int\0outer\0first\0inner\0last\0f\0g\0"

    def kind(name: int, number: int, vlen: int, size: int, *words: int) -> bytes:
        return struct.pack("=III", name, number << 24 | vlen, size) + struct.pack(f"={len(words)}I", *words)

    types = kind(1, 1, 0, 4, 32) + kind(0, 6, 1, 4, 11, 1) + kind(0, 5, 1, 4, 17, 1, 0)
    types += kind(5, 4, 3, 16, 11, 1, 0, 0, 3, 64, 23, 1, 96) + kind(0, 2, 0, 4)
    types += kind(0, 13, 2, 1, 11, 5, 23, 1) + kind(28, 12, 1, 6) + kind(30, 12, 1, 6)
    head = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    return [head + types + names]


TARGETS = [
    Target("qmp", lambda: corpus("qmp"), qmp),
    Target("http", lambda: corpus("http"), http),
    Target("ch-log", lambda: corpus("ch-log"), ch_log),
    Target("ch-events", lambda: corpus("ch-events"), ch_events),
    Target("proc", lambda: corpus("proc"), proc),
    Target("symbols", lambda: corpus("symbols"), symbols),
    Target("web", lambda: corpus("web"), web),
    Target("web-config", lambda: corpus("web-config"), web_config),
    Target("toml-config", lambda: corpus("toml-config"), toml_config),
    Target("btf", _btf_seeds, btf_blob),
    Target("bench", lambda: corpus("bench"), bench),
]
