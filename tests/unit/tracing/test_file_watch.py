# SPDX-License-Identifier: Apache-2.0
"""Snapshots and restores end a recording by themselves, and nothing that only looks like them does."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpf_mig.recording.events import AnyEvent, Ending, Kick, Mark, Transfer, VcpuState
from ebpf_mig.recording.file import read_recording
from ebpf_mig.tracing.lifecycle import QUIET_NS, STOPPED_NS, MigrationWatch

DATA = Path(__file__).parents[2] / "data" / "snapshots"
REASONS = {
    "cloud-hypervisor-54-handed-over": "migrated",
    "cloud-hypervisor-54-on-demand-restored": "migrated",
    "cloud-hypervisor-54-saved": "saved",
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
    assert watch.verdict(_at(events[-1]) + QUIET_NS + 1, pids) == REASONS[name]


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
