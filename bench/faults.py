# SPDX-License-Identifier: Apache-2.0
"""Faults with a known answer, made for real: each is a traced migration in which one thing takes most of the downtime.

In: a file for the recording; and whether the fault is on, or the same migration runs without it. Out: that file.

Most are migrations of the lab's QEMUs. Nagle needs two binaries of Cloud Hypervisor. Three faults lie inside the
kernel, where a VMM cannot be made to have them at will: the truth machine has them (`tests.truth`).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench.disturbed import (
    LARGE,
    QUICK,
    Cause,
    Lab,
    SmallLink,
    contention,
    group,
    loop_device,
    migrate,
    nothing,
    pin,
    quota,
    slow_proxy,
    source_alone,
    stopped_again_and_again,
)  # fmt: skip
from ebpf_mig.lab.netns import Link
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording.file import RecordingWriter
from ebpf_mig.vmm.cloud_hypervisor.lab import ChPair
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.integration import ch_migrations
from tests.truth import harness, kvm
from tests.truth.parts import Plan

MS = 1_000_000
VCPUS = 8
HELD_NS = 60 * MS
WAIT_S = 0.15
"""How long the manager waits, each time."""
SLOW_LINK = 100 * 125_000
SLOW_DISK = 2 * MIB
NAGLE = "EBPF_MIG_BENCH_NAGLE"
"""Two binaries of Cloud Hypervisor, separated by `:`: without and with TCP_NODELAY."""
Make = Callable[[Path, bool], None]


@dataclass(frozen=True)
class Fault:
    """One fault and its answer."""

    name: str
    how: str
    answers: frozenset[str]
    """The rules that say it."""
    make: Make
    side: str = ""
    """The side that the cause must name; empty: any."""
    waits: str = ""
    """It is other load on the CPUs of this side, whose threads must have waited for it by the kernel's account. It must
    not be outranked by the VMs."""
    throttles: bool = False
    """It is a quota: a thread waits for a CPU, too, but nobody has it."""
    timed: str = ""
    """The truth machine's own clock must show that this phase took as long."""


def nagle(path: Path, on: bool) -> None:
    """Cloud Hypervisor over TCP."""
    names = os.environ[NAGLE].split(":")
    with tempfile.TemporaryDirectory() as directory:
        pair = ChPair(ch_migrations.QUICK, names[not on])
        path.write_bytes(ch_migrations.migrate(Path(directory), pair).path.read_bytes())


def full_buffer(path: Path, on: bool) -> None:
    """A program in between takes the bytes slowly. What is behind the buffer is not seen."""
    migrate(path, LARGE, proxy=slow_proxy if on else None)


def slow_link(path: Path, on: bool) -> None:
    """The bandwidth of a link between two network namespaces. It takes 2.0 s to send the guest's working set."""
    migrate(path, replace(LARGE, downtime_ms=5000), network=Link(SLOW_LINK if on else 0))


def slow_reader(path: Path, on: bool) -> None:
    """The destination does not read most of the time."""
    migrate(path, LARGE, stopped_again_and_again if on else nothing, network=SmallLink())


def slow_disk(path: Path, on: bool) -> None:
    """The source has writes under way when it stops, on a disk that its control group throttles."""
    with tempfile.TemporaryDirectory() as directory, loop_device(Path(directory)) as device:
        number = Path(device).stat().st_rdev
        limit = f"{os.major(number)}:{os.minor(number)} {SLOW_DISK}"
        drive = f"if=none,id=disk,file={device},format=raw,cache=none,aio=threads,file.locking=off"

        def writes(lab: Lab) -> None:
            for _ in range(4):
                lab.source("human-monitor-command", **{"command-line": 'qemu-io disk "aio_write 0 256k"'})

        def throttled(lab: Lab) -> contextlib.AbstractContextManager[Path]:
            return group("blkio", lab.pair.source.pid, {"blkio.throttle.write_bps_device": limit})

        migrate(path, QUICK, throttled if on else nothing, extra=("-drive", drive), first=writes)


def manager(path: Path, on: bool) -> None:
    """The manager takes its time at pre-switchover, and before `cont`."""
    migrate(path, QUICK, manager_s=WAIT_S if on else 0)


def many_vcpus(path: Path, on: bool) -> None:
    """The guest's vCPUs all spin, and so do those of another guest on the source's only CPU. Without the fault, the
    guest has one vCPU: several would wait for each other.

    The vCPUs of the source have stopped in the blackout. What is left to send is so much that its threads need a CPU
    again and again, and the limit so high that the guest stops although that takes long.
    """
    one = Scenario(memory_bytes=64 * MIB, working_set_bytes=32 * MIB, pages_per_s=None, downtime_ms=5000)
    guest = replace(one, vcpus=VCPUS, working_set_bytes=one.working_set_bytes // VCPUS)
    with another(guest) if on else contextlib.nullcontext():
        migrate(path, guest if on else one, source_alone if on else nothing)


@contextlib.contextmanager
def another(guest: Scenario) -> Iterator[None]:
    """A VM that is not migrated, with all its threads on one CPU."""
    with QemuPair(guest) as pair:
        pin(pair.source.pid)
        yield


def beside(cause: Cause, guest: Scenario = QUICK, *, lasting: bool = False) -> Make:
    """A migration, and the cause beside it."""
    return lambda path, on: migrate(path, guest, cause if on else nothing, lasting=lasting)


def truth(plan: Plan) -> Make:
    """The truth machine with that plan; without the fault, with the default one."""

    def make(path: Path, on: bool) -> None:
        run = harness.migrate(plan if on else Plan(log=plan.log))
        if run.recording is None:
            raise RuntimeError("the truth machine has no recording")
        with RecordingWriter(str(path), run.recording.header, force=True) as writer:
            writer.write_many(run.recording.events)
        path.with_suffix(".truth").write_text(json.dumps(run.truth))

    return make


def _answers(*rules: str) -> frozenset[str]:
    return frozenset(rules)


FAULTS = (
    Fault("nagle", "Cloud Hypervisor 52.0 over TCP, which lacks TCP_NODELAY", _answers("nagle"), nagle),
    Fault("buffer", "a proxy that forwards some 20 MB/s", _answers("buffer"), full_buffer),
    Fault("link", "100 Mbit/s between two network namespaces (tbf)", _answers("link"), slow_link),
    Fault("reader", "the destination is stopped 8 of 9 ms", _answers("reader", "window"), slow_reader),
    Fault("srcu", "a reader that sleeps 100 ms in a page fault while a memslot is added during the load",
          _answers("srcu"), truth(Plan(srcu_ns=100 * MS)), "destination"),
    Fault("ioctl", "a memslot of 64 GiB is added during the load", _answers("ioctl"),
          truth(Plan(added_slot_bytes=64 * kvm.GIB)), "destination", timed="state.load"),
    Fault("block", "1 MiB of writes under way at the stop, to a disk of 2 MiB/s", _answers("block"), slow_disk),
    Fault("slots_lock", "another thread's KVM_CLEAR_DIRTY_LOG of some 60 ms", _answers("slots_lock"),
          truth(Plan(delays={"fetch.kernel": HELD_NS}, log="initially-set")), timed="fetch.kernel"),
    Fault("fetch", "the log of 64 GiB is read and cleared", _answers("fetch"),
          truth(Plan(large_slot_bytes=64 * kvm.GIB, log="initially-set")), timed="fetch.kernel"),
    Fault("cpu-source", "6 others spin on the source's only CPU", _answers("cpu"), beside(contention("source")),
          "source", waits="source"),
    Fault("cpu-destination", "6 others spin on the destination's only CPU", _answers("cpu"),
          beside(contention("destination")), "destination", waits="destination"),
    Fault("reader-cpu",
          "6 others spin on the destination's only CPU, and 24 MiB to read", _answers("reader", "window", "cpu"),
          beside(contention("destination"), LARGE), waits="destination"),
    Fault("management", "the manager waits 150 ms on each side", _answers("management"), manager),
    Fault("vcpus", "8 spinning vCPUs, and 8 of another guest, on the source's only CPU",
          _answers("vcpus", "cpu"), many_vcpus, "source", waits="source"),
    Fault("quota", "a tenth of one CPU for the source, which a busy process uses up", _answers("quota"),
          beside(quota, LARGE, lasting=True), "source", throttles=True),
)  # fmt: skip

UNMADE = {
    "mmu_lock": "no migration can be made to wait for it at will; `tests.truth.workloads mmu-lock` makes the waits",
    "retransmission": "loss needs netem or nftables: tests/integration/test_retransmission.py",
    "steal": "nothing here can withhold a CPU from this kernel",
    "real-time": "the VMs of the lab have no real-time policy",
    "rcu": "no system call of a VMM waits for a grace period other than SRCU's at will",
    "fault": "a lazy destination needs postcopy, whose faults come after the blackout",
    "timer": "a VMM that polls while its vCPUs stop: Cloud Hypervisor before 54, for less than half of its blackout",
    "wait": "it names what no other rule knows",
    "late": "a reader that is late has a cause of its own: it has no CPU, waits, or works",
}
"""Rules without a fault of their own, and why. The last rules of the table name no cause, so no fault can have them."""
