# SPDX-License-Identifier: Apache-2.0
"""The script of both emulated machines of a pair: runs a QEMU, a recorder, and on the source the migration.

In: `source` or `destination`, and the wire's delay. Out: /out/ROLE.rec. The guest's serial port is the machine's second
one, which leads to the outer host. Readings of this machine's clock are written there, too. The destination is ready
once it listens; there is no other synchronisation.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.linux.process import private_directory, spawn, stop
from ebpf_mig.vmm.qemu.lab import find_binary
from ebpf_mig.vmm.qemu.monitor import Monitor

ADDRESSES = {"source": "10.78.0.1", "destination": "10.78.0.2"}
MIGRATION, READY = 4444, 4445
SERIAL = "/dev/ttyS1"
MACHINE = "pc-i440fx-7.2"
"""A machine type that the QEMUs of both user lands have."""
GUEST = Scenario(memory_bytes=64 * MIB, working_set_bytes=MIB // 4, pages_per_s=20_000)
"""Beats every 3 ms if nothing else uses the CPU."""
PATIENCE_S = 180.0
WARM_UP_S, AFTER_S = 3.0, 5.0


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _connect_wire(role: str, delay: str) -> None:
    for module in ("virtio_pci", "virtio_net", "sch_netem"):
        _run("modprobe", module)
    until = time.monotonic() + 20
    while not (names := [path.name for path in Path("/sys/class/net").iterdir() if path.name != "lo"]):
        if time.monotonic() > until:
            raise SystemExit("the wire has no end here")
        time.sleep(0.1)
    name = names[0]
    _run("ip", "address", "add", f"{ADDRESSES[role]}/24", "dev", name)
    _run("ip", "link", "set", name, "up")
    _run("tc", "qdisc", "add", "dev", name, "root", "netem", "delay", delay)


@contextmanager
def _clock_told() -> Iterator[None]:
    """Writes CLOCK_MONOTONIC to the second serial port ten times a second, each in one write: `C1234;`."""
    port = os.open(SERIAL, os.O_WRONLY | os.O_NOCTTY)
    tty.setraw(port)
    over = threading.Event()

    def tell() -> None:
        while not over.wait(0.1):
            os.write(port, b"C%d;" % time.monotonic_ns())

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        os.close(port)


@contextmanager
def _vm(role: str, directory: Path) -> Iterator[tuple[int, str]]:
    guest, qmp = directory / "guest.elf", directory / "qmp"
    guest.write_bytes(GUEST.guest())
    command = [find_binary(None), "-machine", MACHINE, "-accel", "kvm", "-m", str(GUEST.memory_bytes // MIB)]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-kernel", str(guest), "-bios", "qboot.rom"]
    command += ["-chardev", f"serial,id=beat,path={SERIAL}", "-serial", "chardev:beat"]
    command += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    if role == "destination":
        command += ["-incoming", f"tcp:0:{MIGRATION}"]
    process = spawn(command, subprocess.DEVNULL, sys.stderr.buffer)
    try:
        while not qmp.exists():
            if process.poll() is not None:
                raise SystemExit(f"QEMU ended with {process.returncode}")
            time.sleep(0.05)
        yield process.pid, str(qmp)
    finally:
        stop(process)


@contextmanager
def _recorder(role: str, pid: int) -> Iterator[None]:
    """Traces while the context is open."""
    command = [sys.executable, "-m", "ebpf_mig.cli", "record", "--pid", str(pid), "--until-eof"]
    command += ["-o", f"/out/{role}.rec"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        _say(line.rstrip())
        if "tracing" in line:
            break
    try:
        yield
    finally:
        _, said = process.communicate(timeout=60)  # closes its standard input
        _say(said)


async def _migrate(qmp: str) -> str:
    monitor = await Monitor.open(qmp, "source")
    try:
        await monitor.execute("migrate", {"uri": f"tcp:{ADDRESSES['destination']}:{MIGRATION}"})
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            answer = await monitor.query("query-migrate")
            if answer.get("status") in {"completed", "failed", "cancelled"}:
                return f"{answer['status']} {answer.get('error-desc', '')} downtime {answer.get('downtime')} ms"
            await asyncio.sleep(0.2)
        return "no end"
    finally:
        await monitor.close()


def _meet() -> None:
    """Source: waits for the destination."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection((ADDRESSES["destination"], READY), 5).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
        else:
            return


def main() -> int:
    """Exit code 0 if the source's QEMU reports that the migration completed."""
    role, delay = sys.argv[1:]
    _connect_wire(role, delay)
    said = "completed"
    with private_directory() as directory, _vm(role, directory) as (pid, qmp), _recorder(role, pid), _clock_told():
        if role == "source":
            _meet()
            time.sleep(WARM_UP_S)
            said = asyncio.run(_migrate(qmp))
            _say(said)
            time.sleep(AFTER_S)
            _meet()
        else:
            with socket.create_server((ADDRESSES[role], READY)) as ready:
                ready.settimeout(PATIENCE_S)
                for _ in range(2):  # before the migration and after it
                    ready.accept()[0].close()
    return 0 if said.startswith("completed") else 1


if __name__ == "__main__":
    sys.exit(main())
