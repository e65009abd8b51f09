# SPDX-License-Identifier: Apache-2.0
"""Each side's part of the downtime: one side alone measures what both together show, and never more than the blackout.

The witness is the same recording with both sides, where the blackout is seen directly.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ebpf_mig.analysis.parts import Parts, observe
from ebpf_mig.analysis.result import Analysis
from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import Recording, read_recording

DATA = Path(__file__).parents[2] / "data"
RECORDINGS = sorted(path.stem for path in DATA.glob("*.rec"))
COMPLETED = [
    name for name in RECORDINGS if not any(word in name for word in ("aborted", "cancelled", "died", "failed"))
]
ONE_HOST = [name for name in COMPLETED if "-cpr-" in name or name.startswith("firecracker")]
"""Live updates and snapshots: both sides are on one host, or even one process, so there is no side alone."""
POSTCOPY = [name for name in COMPLETED if "postcopy" in name]


def parts(found: Analysis) -> Parts:
    return observe(found.traced, found.attribution)


def alone(recording: Recording, pid: int) -> Parts:
    """What a host on which only this process ran can measure."""
    header = recording.header
    mine = msgspec.structs.replace(header, targets=[t for t in header.targets if t.pid == pid])
    events = [event for event in recording.events if getattr(event, "pid", pid) == pid]
    return parts(analyse(Recording(header=mine, events=events)))


@pytest.mark.parametrize("name", [name for name in COMPLETED if name not in ONE_HOST])
def test_each_side_alone_measures_its_part_exactly(name: str) -> None:
    recording = read_recording(DATA / f"{name}.rec")
    whole = analyse(recording)
    both, blackout = parts(whole), whole.breakdown.blackout_ns
    assert whole.traced.source is not None and whole.traced.destination is not None and blackout is not None
    source, destination = alone(recording, whole.traced.source.pid), alone(recording, whole.traced.destination.pid)
    assert both.stop is not None and both.start is not None and both.start - both.stop == blackout
    assert (source.stop, source.until_state_ns) == (both.stop, both.until_state_ns)
    assert (destination.start, destination.destination_ns) == (both.start, both.destination_ns)
    assert source.source_ns == (None if name in POSTCOPY else both.source_ns)
    assert source.start is None and source.destination_ns is None
    assert destination.stop is None and destination.source_ns is None and destination.until_state_ns is None
    assert source.until_state_ns is not None and destination.destination_ns is not None
    assert 0 < source.until_state_ns + destination.destination_ns <= blackout
    assert 0 < (both.source_ns or 0) <= blackout


@pytest.mark.parametrize("name", sorted(set(RECORDINGS) - set(COMPLETED)))
def test_a_guest_that_did_not_move_has_no_parts(name: str) -> None:
    found = parts(analyse(read_recording(DATA / f"{name}.rec")))
    assert (found.source_ns, found.destination_ns) == (None, None)


def test_nagle_s_wait_is_in_the_destinations_part() -> None:
    """The destination had begun to restore when the rest of the state was held back for 41 ms."""
    recording = read_recording(DATA / "qemu-10.0-ring.rec")
    destination = analyse(recording).traced.destination
    assert destination is not None
    took = alone(recording, destination.pid).destination_ns
    assert took is not None and took > 41_000_000
