# SPDX-License-Identifier: Apache-2.0
"""One round: a real migration, a process that is killed or stopped at a random instant, and what must hold afterwards.

In: a `Node`, a pair of VMs, a random generator. Out: a `Fault`, and how the round ended; or `BrokenError`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from ebpf_mig.collector import analyse
from ebpf_mig.errors import EbpfMigError
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.vmm.qemu.migration import QemuMigration
from tests.faults.node import COUNTED_S, MODULES, BrokenError, Node, wait_for
from tests.integration.exporters import NAMED, PROGRAM

VICTIMS = ("tracer", "source", "destination", "watch", "listener", "analyst", "supervisor")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
SCENARIO = Scenario(memory_bytes=64 * MIB, working_set_bytes=8 * MIB, pages_per_s=1000, bandwidth_bytes=16 << 20)
"""Half a second of pre-copy, so that the instant can be before, in and after the switchover."""
AGE_S = 1.5
"""A VM that migrates within 0.3 s of its creation can be missed (docs/exporter.md)."""
VMMS = ("source", "destination")


@dataclass
class Fault:
    """What happens to whom, and when: seconds after the migration is triggered, or after the tracer is started."""

    victim: str
    signum: int
    after_s: float
    resumed_s: float
    """After SIGSTOP: how much later SIGCONT comes."""
    hit: int | None = None
    said: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, random: Random, victims: tuple[str, ...]) -> Fault:
        victim, signum = random.choice(victims), random.choice(SIGNALS)
        longest = 4.0 if victim == "tracer" else 1.2
        return cls(victim, signum, random.uniform(0, longest), random.uniform(0.02, 3.0))

    @property
    def kind(self) -> str:
        return f"{self.victim} {signal.Signals(self.signum).name}"

    @property
    def spares_the_vms(self) -> bool:
        return self.victim not in VMMS or self.signum == signal.SIGSTOP


def strike(fault: Fault, pid: int | None) -> None:
    """Sends the signal, and SIGCONT after a stop."""
    fault.hit = pid
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, fault.signum)
        if fault.signum == signal.SIGSTOP:
            time.sleep(fault.resumed_s)
            os.kill(pid, signal.SIGCONT)


def play(fault: Fault, node: Node, pair: QemuPair, directory: Path, settled_at: float) -> str:
    """The round. Returns how it ended, in a few words."""
    counted = node.migrations()
    tracer = Tracer(pair, directory) if fault.victim == "tracer" else None
    time.sleep(max(0.0, settled_at - time.monotonic()))
    results: list[str] = []
    ends = (pair.source.qmp, pair.destination.qmp, pair.uri)
    with contextlib.closing(QemuMigration(*ends, pair.options())) as migration:
        migration.prepare()

        def migrate() -> None:
            try:
                results.append(migration.run(60).result)
            except EbpfMigError as error:
                results.append(f"error: {error}")

        if tracer is not None:
            hitting = threading.Timer(fault.after_s, strike, (fault, tracer.process.pid))
            hitting.start()
            tracer.armed(60.0)
        moving = threading.Thread(target=migrate)
        moving.start()
        if tracer is None:
            time.sleep(fault.after_s if fault.victim != "analyst" else 0)
            find = {"source": pair.source.pid, "destination": pair.destination.pid}
            if fault.victim == "analyst":
                moving.join(60)  # it works after the migration
                time.sleep(fault.after_s)
            strike(fault, find[fault.victim] if fault.victim in find else node.pid(fault.victim))
        else:
            hitting.join()
        moving.join(70)
        if moving.is_alive():
            raise BrokenError("the migration hangs")
    (result,) = results
    if fault.spares_the_vms and result != "completed":
        raise BrokenError(f"the VMs were not killed, and the migration is {result}")
    if tracer is not None:
        tracer.check(fault)
    return f"{result}, {_check_exporter(fault, node, counted, result)}"


def _check_exporter(fault: Fault, node: Node, before: float, result: str) -> str:
    if fault.victim == "supervisor":
        return _check_supervisor(fault, node)
    sure = fault.spares_the_vms and fault.victim != "watch"
    if sure:
        wait_for(lambda: node.migrations() > before, COUNTED_S, lambda: "the migration is not counted")
    if fault.hit is not None and fault.signum != signal.SIGSTOP and fault.victim in MODULES:
        node.check_ended(fault.victim, fault.hit)
    node.check_ready()
    if not sure:  # it may be counted, once
        deadline = time.monotonic() + 3.0
        while node.migrations() == before and time.monotonic() < deadline:
            time.sleep(0.1)
    counted = node.migrations() - before
    if counted > 1:
        raise BrokenError(f"one migration is counted {counted:.0f} times")
    node.check_nothing_left()
    return "counted" if counted else "not counted"


def _check_supervisor(fault: Fault, node: Node) -> str:
    """Killed or terminated, it takes all with it; stopped, it goes on."""
    if fault.signum == signal.SIGSTOP:
        node.check_ready()
        node.check_nothing_left()
        return "went on"
    status = node.process.wait(20)
    wanted = -signal.SIGKILL if fault.signum == signal.SIGKILL else 0
    if status != wanted:
        raise BrokenError(f"the exporter exits with {status}, not with {wanted}")
    node.check_nothing_left(running=False)
    node.start()
    return f"exit {status}"


class Tracer:
    """`record` of both VMs."""

    def __init__(self, pair: QemuPair, directory: Path) -> None:
        self._file, self._log = directory / "traced.rec", directory / "tracer.log"
        pids = ["--pid", str(pair.source.pid), "--pid", str(pair.destination.pid)]
        with self._log.open("w") as log:
            command = [*PROGRAM, "record", *pids, "-o", str(self._file), "--force"]
            self.process = subprocess.Popen(command, stderr=log)
        self._file.unlink(missing_ok=True)

    def armed(self, seconds: float) -> None:
        """Waits until it traces, or has ended, or so long."""
        deadline = time.monotonic() + seconds
        while "tracing" not in self._log.read_text() and time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.02)

    def check(self, fault: Fault) -> None:
        """Its exit code is as documented, and a finished recording reads without damage."""
        try:
            status = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise BrokenError("the tracer does not end") from None
        documented: dict[int, tuple[int, ...]] = {signal.SIGKILL: (-9, 0), signal.SIGTERM: (143, 0)}
        if status not in documented.get(fault.signum, (0,)):
            raise BrokenError(f"the tracer exits with {status}: {self._log.read_text()[-300:]!r}")
        if not self._file.exists():
            if status == 0:
                raise BrokenError("the tracer exits with 0 and there is no recording")
            return
        try:
            recording = read_recording(self._file)
            analyse(recording)
        except EbpfMigError as error:
            if status != -9:
                raise BrokenError(f"a finished recording does not read: {error}") from error
            return
        if recording.truncated and status != -9:
            raise BrokenError("a finished recording is cut")


def new_pair() -> tuple[QemuPair, float]:
    """Two VMs that run, and the moment (monotonic) from which on they may migrate. Call it in the main thread: they die
    with the thread that started them.
    """
    pair = QemuPair(SCENARIO, None, NAMED)
    pair.__enter__()
    return pair, time.monotonic() + AGE_S
