# SPDX-License-Identifier: Apache-2.0
"""Snapshots and restores end a recording by themselves, and nothing that only looks like them does."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import (
    FILE,
    SEND,
    AnyEvent,
    Ending,
    Ioctl,
    Kick,
    Mark,
    Socket,
    Transfer,
    VcpuEnter,
    VcpuExit,
    VcpuState,
)
from ebpf_mig.recording.file import read_recording
from ebpf_mig.tracing.lifecycle import QUIET_NS, STOPPED_NS, MigrationWatch

DATA = Path(__file__).parents[2] / "data" / "snapshots"
REASONS = {
    "cloud-hypervisor-54-handed-over": "migrated",
    "cloud-hypervisor-54-on-demand-restored": "migrated",
    "cloud-hypervisor-54-saved": "saved",
    "qemu-11.1-background": "saved",
    "qemu-11.1-file": "logging-ended",
    "qemu-11.1-file-handed-over": "migrated",
    "qemu-11.1-file-restored": "migrated",
    "qemu-7.2-savevm": "logging-ended",
}


def live(name: str) -> list[AnyEvent]:
    """The events that came while it was recorded, in order. Accounts and the ending came afterwards."""
    found = [e for e in read_recording(DATA / f"{name}.rec").events if not isinstance(e, VcpuState | Ending | Mark)]
    return sorted(found, key=_at)


def _at(event: AnyEvent) -> int:
    return max(getattr(event, name, 0) for name in ("end_ns", "at_ns"))


def pids_of(events: list[AnyEvent]) -> list[int]:
    return sorted({event.pid for event in events if hasattr(event, "pid")})


@pytest.mark.parametrize("name", REASONS)
def test_a_real_one_ends_with_its_reason(name: str) -> None:
    events = live(name)
    pids = pids_of(events)
    watch = MigrationWatch(pids)
    watch.saw(events)
    quiet = STOPPED_NS if name.endswith("background") else QUIET_NS
    assert watch.verdict(_at(events[-1]) + quiet + 1, pids) == REASONS[name]


def test_a_guest_that_stays_stopped_may_still_be_resumed() -> None:
    events = live("cloud-hypervisor-54-saved")
    stopper = next(e.tid for e in events if isinstance(e, Kick))
    written = max(e.end_ns for e in events if isinstance(e, Transfer) and e.tid == stopper)
    events = [e for e in events if _at(e) <= written]
    pids = pids_of(events)
    watch = MigrationWatch(pids)
    watch.saw(events)
    assert watch.verdict(written + STOPPED_NS - 1, pids) is None
    assert watch.verdict(written + STOPPED_NS + 1, pids) == "saved"


def test_who_stops_the_guest_has_to_write() -> None:
    """A log that another thread writes while a monitor reads registers."""
    events = live("cloud-hypervisor-54-saved")
    stopper = next(e.tid for e in events if isinstance(e, Kick))
    others = [e for e in events if not (isinstance(e, Transfer) and e.tid == stopper)]
    assert len(others) < len(events)
    watch = MigrationWatch(pids_of(events))
    watch.saw(others)
    assert watch.verdict(_at(events[-1]) + QUIET_NS + 1, pids_of(events)) is None


PID, VCPU, SAVER, MS = 10, 11, 12, 1_000_000
GET_REGS = 0x8090AE81


def in_the_background(saver: int = SAVER, *, size: int = 1 << 20) -> list[AnyEvent]:
    """The guest is stopped and runs on, and then the thread `saver` writes. Another one reads the registers."""
    read = Ioctl(3 * MS, 4 * MS, PID, VCPU, 5, GET_REGS, 0)
    assert kvm.name_of(read.cmd) in kvm.VCPU_STATE_GET
    return [
        VcpuEnter(MS // 2, PID, VCPU, 5, 0, 0, 1),
        Kick(MS, PID, saver, VCPU, 10),
        VcpuExit(2 * MS, PID, VCPU, 5, MS // 2, -4),
        read,
        VcpuEnter(6 * MS, PID, VCPU, 5, 2 * MS, 0, 2),
        Socket(7 * MS, PID, 20, 70, FILE, "", ""),
        Transfer(7 * MS, 8 * MS, PID, saver, 20, SEND, 70, 1, size, 1, 1, 0, 0),
        Transfer(500 * MS, 501 * MS, PID, saver, 20, SEND, 70, 1, 10, 1, 1, 0, 0),
    ]


def test_a_guest_that_is_written_while_it_runs_ends_with_the_last_write() -> None:
    watch = MigrationWatch([PID])
    watch.saw(in_the_background())
    assert watch.saved == {PID}
    assert watch.verdict(501 * MS + STOPPED_NS - 1, [PID]) is None
    assert watch.verdict(501 * MS + STOPPED_NS, [PID]) == "saved"


@pytest.mark.parametrize(("saver", "size"), [(PID, 1 << 20), (VCPU, 1 << 20), (SAVER, 4096)])
def test_who_only_stops_a_guest_does_not_save_it(saver: int, size: int) -> None:
    """The main thread that writes a log, a vCPU that writes to its console, an event for a monitor."""
    watch = MigrationWatch([PID])
    watch.saw(in_the_background(saver, size=size))
    assert not watch.saved and watch.verdict(10_000 * MS, [PID]) is None
