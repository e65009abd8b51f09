# SPDX-License-Identifier: Apache-2.0
"""The halves of a migration, each from one host's recording only, fit together by their id."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from prometheus_client.exposition import generate_latest

from ebpf_mig.collector import analyse
from ebpf_mig.exporter.metrics import Metrics
from ebpf_mig.exporter.observation import Observation, observe, with_parts
from ebpf_mig.recording.events import ClockPair
from ebpf_mig.recording.file import Recording, read_recording

DATA = Path(__file__).parents[2] / "data"
WALL_NS = 1_700_000_000_000_000_000


def half(recording: Recording, pid: int | None, ahead_ns: int = 0) -> Observation:
    """What the exporter of a host reports on which only this process ran, its wall clock ahead by `ahead_ns`."""
    header = msgspec.structs.replace(
        recording.header,
        targets=[t for t in recording.header.targets if pid in (None, t.pid)],
        clock=ClockPair(0, WALL_NS + ahead_ns, 100),
    )
    events = [event for event in recording.events if pid is None or getattr(event, "pid", pid) == pid]
    found = analyse(Recording(header=header, events=events))
    seen = observe(found.breakdown, at=0, recording="x.rec", vmm="qemu", vm="vm", trigger="start")
    return with_parts(seen, found)


@pytest.mark.parametrize("name", ["qemu-7.2-tcp", "qemu-10.0-ring", "cloud-hypervisor-54-tcp", "qemu-11.1-multifd"])
def test_halves_of_two_hosts_join_to_the_blackout(name: str) -> None:
    recording = read_recording(DATA / f"{name}.rec")
    whole = analyse(recording)
    breakdown = whole.breakdown
    assert breakdown.migration.source and breakdown.migration.destination and breakdown.blackout_ns
    source = half(recording, breakdown.migration.source.pid)
    destination = half(recording, breakdown.migration.destination.pid, ahead_ns=3_000_000)
    assert (source.role, destination.role) == ("source", "destination")
    assert source.blackout_ns is None and destination.blackout_ns is None
    assert source.migration == destination.migration == half(recording, None).migration != ""
    assert source.stopped_at_ns and destination.started_at_ns
    assert destination.started_at_ns - source.stopped_at_ns == breakdown.blackout_ns + 3_000_000
    assert source.started_at_ns is None and destination.stopped_at_ns is None
    assert source.until_state_ns and destination.destination_ns
    assert source.until_state_ns + destination.destination_ns <= breakdown.blackout_ns


def test_a_source_that_does_not_know_the_result_still_has_its_half() -> None:
    """Its last bytes were not answered before tracing ended. The destination's half shows that it completed."""
    seen = half(read_recording(DATA / "machines" / "source.rec"), None)
    assert seen.result == "unknown" and seen.migration and seen.stopped_at_ns and seen.source_ns
    metrics = Metrics(clock=lambda: 0.0)
    metrics.migration(seen)
    text = generate_latest(metrics.registry).decode()
    assert f'ebpf_mig_migration_part_seconds{{migration="{seen.migration}",role="source"}}' in text
    assert re.findall(r"^ebpf_mig_downtime_part_seconds_count\S+ ([1-9].*)$", text, re.MULTILINE) == []
    other = half(read_recording(DATA / "machines" / "destination.rec"), None)
    assert other.migration == seen.migration and other.result == "completed"


def test_a_migration_that_did_not_complete_has_no_id_and_no_part() -> None:
    for name in ("qemu-7.2-cancelled", "aborted-qemu-7.2", "cloud-hypervisor-54-failed"):
        seen = half(read_recording(DATA / f"{name}.rec"), None)
        assert seen.result != "completed" and not seen.migration
        assert seen.source_ns is None and seen.destination_ns is None and seen.stopped_at_ns is None
