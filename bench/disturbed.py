# SPDX-License-Identifier: Apache-2.0
"""A traced migration of the lab's QEMUs in which something disturbs one side, and what disturbs it.

In: a file for the recording, a scenario, and a cause. Out: that file. Needs root and /dev/kvm; some causes need control
groups of version 1, loop devices or network namespaces.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from bench.waited import watching
from ebpf_mig.lab.netns import Link
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.linux import procfs
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.integration.test_results import Qmp

SPINNERS, PREFERRED, BETTER = 6, -10, -5
"""Other load, its priority, and that of the side that has none. A guest spins, too: the recorder needs a rest."""
SPIN = "import os\nos.sched_setaffinity(0, [{cpu}])\nos.setpriority(0, 0, {nice})\nwhile True: pass"
QUOTA_US, PERIOD_US = 10_000, 100_000
SLOW_DISK = 2 * MIB
READS_S, STOPS_S = 0.001, 0.008
"""A slow reader runs and is stopped in turn."""
ENDS_S = 60
SMALL_BUFFERS = "4096 65536 262144"
QUICK = Scenario(memory_bytes=64 * MIB, working_set_bytes=2 * MIB, pages_per_s=20_000)
LARGE = Scenario(memory_bytes=64 * MIB, working_set_bytes=24 * MIB, pages_per_s=None, downtime_ms=2000)
"""Dirties its whole working set in each pass, so that the last pages take long to send."""


class Lab(NamedTuple):
    """A running pair, its monitors, and its network if it has one of its own."""

    pair: QemuPair
    source: Qmp
    destination: Qmp
    link: Link | None


Cause = Callable[[Lab], AbstractContextManager[object]]
"""What makes the fault, from before the migration to its end."""


@contextlib.contextmanager
def nothing(_lab: Lab) -> Iterator[None]:
    """No fault."""
    yield


def migrate(
    path: Path,
    scenario: Scenario,
    cause: Cause = nothing,
    *,
    network: Link | None = None,
    extra: tuple[str, ...] = (),
    proxy: Callable[[int], int] | None = None,
    manager_s: float | None = None,
    first: Callable[[Lab], None] = lambda _lab: None,
    lasting: bool = False,
) -> None:
    """One migration of QEMU under `ebpf-mig record`. `proxy` gets the destination's port and returns the source's.

    `first` is called right before it. `manager_s`: a manager holds the source at pre-switchover, and the destination
    before `cont`, for so long each. `lasting`: the cause lasts until the recorder has ended. Beside the recording, the
    kernel's account of waits for a CPU is written (`bench.waited`).
    """
    kind = QemuPair if manager_s is None else HeldPair
    with network or contextlib.nullcontext() as link, kind(scenario, None, extra, link) as pair:
        lab = Lab(pair, Qmp(pair.source.qmp), Qmp(pair.destination.qmp), link)
        pids = {vm.role: vm.pid for vm in (pair.source, pair.destination)}
        with recorder(path, *pids.values()) as recorded:
            with cause(lab), watching(path.with_suffix(".waited"), pids):
                first(lab)
                run(lab, proxy, manager_s)
                if lasting:
                    recorded()
            recorded()


class HeldPair(QemuPair):
    """The destination starts the guest only when its manager says so."""

    def _command(self, role: str, qmp: Path) -> list[str]:
        return super()._command(role, qmp) + (["-S"] if role == "destination" else [])


def run(lab: Lab, proxy: Callable[[int], int] | None, manager_s: float | None) -> None:
    """Begins the migration and waits until the guest runs at the destination."""
    source, destination, uri = lab.source, lab.destination, lab.pair.uri
    destination("migrate-incoming", uri=uri)
    if manager_s is not None:
        source.capability("pause-before-switchover")
    if proxy:
        uri = f"tcp:127.0.0.1:{proxy(int(uri.rpartition(':')[2]))}"
    source(
        "migrate-set-parameters", **{"max-bandwidth": 1 << 40, "downtime-limit": lab.pair.scenario.downtime_ms or 300}
    )
    source("migrate", uri=uri)
    if manager_s is not None:
        source.reaches("pre-switchover")
        time.sleep(manager_s)
        source("migrate-continue", state="pre-switchover")
    if source.reaches("completed", "failed") != "completed":
        raise RuntimeError(f"the migration failed: {source('query-migrate')}")
    if manager_s is not None:
        time.sleep(manager_s)
        destination("cont")
    until = time.monotonic() + 30
    while not destination.runs():
        if time.monotonic() > until:
            raise RuntimeError("the guest does not run at the destination")
        time.sleep(0.02)


@contextlib.contextmanager
def recorder(path: Path, *pids: int) -> Iterator[Callable[[], None]]:
    """`ebpf-mig record` of these processes, which ends by itself after their migration; a function that awaits it."""
    named = [word for pid in pids for word in ("--pid", str(pid))]
    command = [sys.executable, "-m", "ebpf_mig.cli", "record", *named, "-o", str(path), "--force"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:

        def recorded() -> None:
            if process.wait(ENDS_S):
                raise RuntimeError(f"the recorder failed: {process.stderr and process.stderr.read()}")

        try:
            said = process.stderr.readline() if process.stderr else ""
            if "tracing" not in said:
                raise RuntimeError(f"the recorder failed: {said}")
            os.setpriority(os.PRIO_PROCESS, process.pid, 0)  # it is no part of the fault
            yield recorded
        finally:
            process.kill()


def contention(role: str) -> Cause:
    """Threads of others spin on the only CPU of one side. The other side has a CPU, and is preferred there."""

    @contextlib.contextmanager
    def cause(lab: Lab) -> Iterator[None]:
        apart(lab, role, BETTER)
        with spinning(max(os.sched_getaffinity(0)), SPINNERS):
            yield

    return cause


def apart(lab: Lab, role: str, nice: int = 0) -> None:
    """Gives the last CPU to one side, and the first to the other, whose threads get a priority there."""
    for vm in (lab.pair.source, lab.pair.destination):
        pin(vm.pid, max if vm.role == role else min)
        for tid in procfs.threads_of(vm.pid) if vm.role != role else ():
            os.setpriority(os.PRIO_PROCESS, tid, nice)


@contextlib.contextmanager
def spinning(cpu: int, count: int) -> Iterator[None]:
    """So many processes that never sleep on this CPU."""
    started = [subprocess.Popen([sys.executable, "-c", SPIN.format(cpu=cpu, nice=PREFERRED)]) for _ in range(count)]
    time.sleep(0.2)
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def pin(pid: int, which: Callable[[set[int]], int] = max) -> None:
    """Puts all threads of a process, and those that they start, on the last CPU, or on another one."""
    for tid in procfs.threads_of(pid):
        os.sched_setaffinity(tid, [which(os.sched_getaffinity(0))])


@contextlib.contextmanager
def source_alone(lab: Lab) -> Iterator[None]:
    """All threads of the source share the last CPU; the destination has another one."""
    apart(lab, "source")
    yield


@contextlib.contextmanager
def group(controller: str, pid: int, limits: dict[str, str]) -> Iterator[Path]:
    """A control group of version 1 with this process, and with these limits by file name."""
    path = Path(f"/sys/fs/cgroup/{controller}/ebpf-mig-bench-{os.getpid()}")
    path.mkdir()
    try:
        for name, text in limits.items():
            (path / name).write_text(text)
        (path / "cgroup.procs").write_text(str(pid))
        yield path
    finally:
        for one in (path / "cgroup.procs").read_text().split():
            (path.parent / "cgroup.procs").write_text(one)
        path.rmdir()


@contextlib.contextmanager
def quota(lab: Lab) -> Iterator[None]:
    """The source's control group may use a tenth of one CPU, and a busy process is in it."""
    limits = {"cpu.cfs_quota_us": str(QUOTA_US), "cpu.cfs_period_us": str(PERIOD_US)}
    pin(lab.pair.source.pid)
    busy = [sys.executable, "-c", SPIN.format(cpu=max(os.sched_getaffinity(0)), nice=-20)]
    with group("cpu", lab.pair.source.pid, limits) as made, subprocess.Popen(busy) as process:
        (made / "cgroup.procs").write_text(str(process.pid))
        try:
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def beside(act: Callable[[], object], pause_s: float) -> Iterator[None]:
    """Repeats something in a thread, until the end or the first error of the other side."""
    over = threading.Event()

    def loop() -> None:
        with contextlib.suppress(OSError):
            while not over.wait(pause_s):
                act()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def stopped_again_and_again(lab: Lab) -> Iterator[None]:
    """The destination is stopped most of the time, as a reader that has something else to do."""
    pid = lab.pair.destination.pid

    def pulse() -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(STOPS_S)
        os.kill(pid, signal.SIGCONT)

    with beside(pulse, READS_S):
        yield


def small_buffers(link: Link) -> None:
    """Both sides of the link get small TCP buffers."""
    for role in ("source", "destination"):
        with link.inside(role):
            for name in ("tcp_rmem", "tcp_wmem"):
                Path(f"/proc/sys/net/ipv4/{name}").write_text(SMALL_BUFFERS)


class SmallLink(Link):
    """A fast link between hosts with small TCP buffers."""

    def __enter__(self) -> Link:
        super().__enter__()
        small_buffers(self)
        return self


def slow_proxy(port: int) -> int:
    """Forwards to `port`, 64 KiB at a time with a rest after each: some 20 MB/s. Returns its own port."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    listener.bind(("127.0.0.1", 0))
    listener.listen()

    def serve() -> None:
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", port))
        threading.Thread(target=pass_on, args=(far, near, 0.0), daemon=True).start()
        pass_on(near, far, 0.002)

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def pass_on(source: socket.socket, target: socket.socket, rest_s: float) -> None:
    """Passes bytes on, and then the end of the stream."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
            time.sleep(rest_s)
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def loop_device(directory: Path) -> Iterator[str]:
    """A loop device of 64 MiB."""
    image = directory / "disk"
    image.write_bytes(bytes(64 * MIB))
    made = subprocess.run(["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True)
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
