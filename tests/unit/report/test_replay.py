# SPDX-License-Identifier: Apache-2.0
"""Recordings of real migrations, replayed: the same bytes in, the same report out.

Beside each recording stands its report as text. `UPDATE_REPORTS=1 ./check tests/unit/report/test_replay.py` writes them
anew; the difference then belongs into the review.
"""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from ebpf_mig.breakdown import Breakdown, sides_of
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import SEND, Mark, Transfer
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.report import json as json_report
from ebpf_mig.report import text as text_report

DATA = Path(__file__).parents[2] / "data"
RECORDINGS = sorted(DATA.glob("*.rec"))
QEMU = [
    path
    for path in RECORDINGS
    if path.stem.startswith("qemu")
    and not path.stem.endswith(("cancelled", "died", "failed"))
    and "cpr" not in path.stem
]
LIVE_UPDATES = [path for path in RECORDINGS if "cpr" in path.stem]
UNSTOPPED = [path for path in RECORDINGS if path.stem.startswith("qemu") and path not in (*QEMU, *LIVE_UPDATES)]
CLOUD_HYPERVISOR = [
    path for path in RECORDINGS if path.stem.startswith("cloud") and not path.stem.endswith(("died", "failed"))
]
FIRECRACKER = [path for path in RECORDINGS if path.stem.startswith("firecracker")]
FULL_BUFFER = DATA / "qemu-7.2-unix.rec"
"""Its source blocked in a send of state until the destination had read what was before it."""
TWO_PROCESSES = [
    path
    for path in (*QEMU, *LIVE_UPDATES, *CLOUD_HYPERVISOR)
    if path != FULL_BUFFER and not path.stem.endswith("cpr-exec")
]
COMPLETED = [path for path in RECORDINGS if not path.stem.endswith(("cancelled", "died", "failed"))]


def load(path: Path) -> tuple[Recording, Breakdown]:
    recording = read_recording(path)
    return recording, analyse(recording).breakdown


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_report_is_the_same_as_ever(path: Path) -> None:
    _, breakdown = load(path)
    text = text_report.render(breakdown)
    golden = path.with_suffix(".txt")
    if os.environ.get("UPDATE_REPORTS"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert all(len(line) <= 80 for line in text.splitlines())


def alone(recording: Recording, breakdown: Breakdown) -> Breakdown:
    """What a recorder of the destination alone would have seen."""
    assert breakdown.migration.destination is not None
    pid = breakdown.migration.destination.pid
    header = replace(recording.header, targets=[t for t in recording.header.targets if t.pid == pid])
    events = [e for e in recording.events if getattr(e, "pid", pid) == pid]
    return analyse(replace(recording, header=header, events=events)).breakdown


@pytest.mark.parametrize("path", TWO_PROCESSES, ids=lambda path: path.stem)
def test_a_destination_alone_loads_and_resumes_as_beside_the_source(path: Path) -> None:
    recording, both = load(path)
    found = alone(recording, both)
    for phase in ("state.load", "resume"):
        ours, theirs = found.phase_ns(phase), both.phase_ns(phase)
        assert ours is not None and theirs is not None
        assert abs(ours - theirs) <= max(200_000, theirs // 20), phase


def test_a_destination_alone_does_not_see_a_source_that_waits_for_room_in_a_unix_socket() -> None:
    """The reader never slept, so nothing shows when the bytes came. The load is too long, by that wait at most."""
    recording, both = load(FULL_BUFFER)
    found = alone(recording, both)
    ours, theirs = found.phase_ns("state.load"), both.phase_ns("state.load")
    assert ours is not None and theirs is not None
    blocked = max(t.end_ns - t.begin_ns for t in recording.events if isinstance(t, Transfer) and t.direction == SEND)
    assert 0 < ours - theirs < blocked
    assert found.phase_ns("resume") == both.phase_ns("resume")


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_order_of_events_does_not_matter(path: Path) -> None:
    recording, breakdown = load(path)
    shuffled = list(recording.events)
    random.Random(1).shuffle(shuffled)
    turned = replace(recording, events=shuffled)
    turned = replace(recording, events=shuffled)
    assert json_report.render(analyse(turned).breakdown) == json_report.render(breakdown)


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_json_reads_back_as_the_breakdown(path: Path) -> None:
    _, breakdown = load(path)
    assert msgspec.json.decode(json_report.render(breakdown), type=Breakdown) == breakdown


@pytest.mark.parametrize("path", COMPLETED, ids=lambda path: path.stem)
def test_partition_is_exact(path: Path) -> None:
    _, breakdown = load(path)
    aborted = path.stem.startswith("aborted")
    seen = [p.phase for p in breakdown.phases if p.duration_ns]
    assert tuple((p.phase, p.side) for p in breakdown.phases) == sides_of(aborted, seen)
    spans = sorted(span for phase in breakdown.phases for span in phase.spans)
    assert spans[0][0] == 0 and spans[-1][1] == breakdown.window_ns
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
    assert all((p.duration_ns or 0) == sum(end - begin for begin, end in p.spans) >= 0 for p in breakdown.phases)


@pytest.mark.parametrize("path", QEMU, ids=lambda path: path.stem)
def test_what_every_version_has_in_common(path: Path) -> None:
    """Both sides found, the guest's own order, the migration's sockets and not QMP's."""
    recording, b = load(path)
    assert b.migration.result == "completed" and b.completeness.verdict == "complete"
    assert b.migration.source is not None and b.migration.destination is not None
    pids = {target.role: target.pid for target in recording.header.targets}
    assert (b.migration.source.pid, b.migration.destination.pid) == (pids["source"], pids["destination"])
    assert b.migration.mode == ("postcopy" if "postcopy" in path.stem else "precopy")
    assert b.migration.transport == ("unix" if "unix" in path.stem else "tcp")
    assert b.migration.connections == (3 if "multifd" in path.stem else 1)
    assert b.dirty_log.mode == ("ring" if "ring" in path.stem else "manual")
    assert len(b.vcpus) == (3 if "3vcpus" in path.stem else 1)
    assert b.phase_ns("state.load") > 0 and b.phase_ns("state.save") > 0
    assert all(socket.bytes < 1 << 26 for socket in b.sockets)


@pytest.mark.parametrize("path", [p for p in FIRECRACKER if p in COMPLETED], ids=lambda path: path.stem)
def test_a_snapshot_that_a_second_process_loads(path: Path) -> None:
    """Witnesses: what the caller saw of each call, and Firecracker's own times."""
    recording, b = load(path)
    assert (b.migration.result, b.migration.mode, b.migration.transport) == ("completed", "snapshot", "file")
    assert b.completeness.verdict == "complete" and b.blackout_ns is not None
    marks = {e.name: e for e in recording.events if isinstance(e, Mark)}
    at = {name.removeprefix("firecracker.API."): mark.at_ns for name, mark in marks.items()}
    assert at["load.begin"] - at["pause.end"] <= b.blackout_ns <= at["load.end"] - at["pause.begin"]
    kind = "diff" if "diff" in path.stem else "full"
    own = {name: mark.value * 1000 for name, mark in marks.items()}
    answered, done = (own[f"firecracker.{by}{kind}_create_snapshot_us"] for by in ("", "vmm_"))
    took = {phase.phase: phase.duration_ns or 0 for phase in b.phases}
    assert 0 < took["memory.send"] + took["state.send"] <= done, "its main thread has then written all"
    assert 0 < took["memory.send"] + took["state.send"] + took["sync"] <= answered
    assert answered <= at["create.end"] - at["create.begin"]
    assert 0 < took.get("memory.load", 0) + took["state.load"] <= own["firecracker.load_snapshot_us"]
    assert ("memory.load" in took) is ("uffd" not in path.stem), "a handler serves it later"
    assert took["unattributed"] <= b.window_ns // 50


@pytest.mark.parametrize("path", LIVE_UPDATES, ids=lambda path: path.stem)
def test_live_updates(path: Path) -> None:
    """Seen by `record` alone: two vCPUs, each with one stop and one start, and nothing that no rule explains."""
    _, b = load(path)
    assert (b.migration.mode, b.migration.result, b.completeness.verdict) == ("cpr", "completed", "complete")
    assert b.migration.paused_before is False
    assert [(row.vcpu, row.blackout_ns is not None) for row in b.vcpus] == [(0, True), (1, True)]
    assert b.phase_ns("unattributed") == 0 and b.phase_ns("pause") > 0 and b.phase_ns("state.load") > 0
    assert b.live_update is not None and b.migration.source is not None and b.migration.destination is not None
    executed = "exec" in path.stem
    assert (b.migration.source.pid == b.migration.destination.pid) is executed
    assert b.live_update.descriptors == (None if executed else 6)
    assert (b.phase_ns("exec") > 0, b.phase_ns("startup") > 0) == (executed, executed)
    assert b.live_update.slowest == ("SET_USER_MEMORY_REGION" if executed else "")


@pytest.mark.parametrize("path", CLOUD_HYPERVISOR, ids=lambda path: path.stem)
def test_cloud_hypervisor_beside_its_own_log(path: Path) -> None:
    """Its downtime is cut to whole ms, begins before the pause and ends when Complete is answered."""
    _, b = load(path)
    assert b.migration.result == "completed" and b.completeness.verdict == "complete"
    assert b.migration.mode == next((mode for mode in ("postcopy", "local") if mode in path.stem), "precopy")
    assert b.dirty_log.mode == ("legacy" if b.migration.mode == "precopy" else "none")
    late = b.pausing.kicked_late_ns if b.pausing else 0
    for witness in (w for w in b.witnesses if w.span is not None):
        ours = witness.span[1] - witness.span[0] if witness.span else 0
        off = max(witness.value_ns - ours, ours - witness.value_ns - 1_000_000) - witness.doubt_ns
        assert off <= 1_500_000 + late * (witness.name == "ch.downtime_ms"), witness
    if b.migration.mode == "precopy":
        fetches = [fetch for fetch in b.dirty_log.fetches if fetch.ioctls]
        assert len(fetches) == (2 if "-54-" in path.stem else 1), "v53 and later fetch once more after the snapshot"


@pytest.mark.parametrize("path", [p for p in CLOUD_HYPERVISOR if "tcp" in p.stem], ids=lambda path: path.stem)
def test_the_wire_stall_of_cloud_hypervisor_has_a_name(path: Path) -> None:
    _, b = load(path)
    assert b.wire and b.wire[0].reason == "Nagle, delayed ACK"
    assert b.wire[0].in_flight_ns > 0.6 * (b.blackout_ns or 0)
    assert "B behind 16 B not acknowledged" in b.wire[0].evidence


def test_a_source_that_died_after_the_stop() -> None:
    """A real failure: the system call filter killed the source while it saved the state."""
    _, b = load(DATA / "cloud-hypervisor-54-local-source-died.rec")
    assert b.migration.result == "failed" and b.blackout_ns is None
    assert b.window_ns is not None and b.phase_ns("pause") > 0 and b.phase_ns("resume") == 0


@pytest.mark.parametrize("version", ["52", "54"])
@pytest.mark.parametrize("transport", ["tcp", "unix", "local", "4connections-2vcpus"])
def test_each_part_of_cloud_hypervisors_downtime_is_placed(version: str, transport: str) -> None:
    _, b = load(DATA / f"cloud-hypervisor-{version}-{transport}.rec")
    rows = {w.name.removeprefix("ch.").removesuffix("_ms"): w for w in b.witnesses}
    parts = {"state", "send_state", "complete", "recv_snapshot", "restore", "resume", "state_to_resume", "downtime"}
    assert parts <= rows.keys() and all(rows[name].span is not None for name in parts)
    assert ("final_iter" in rows and rows["final_iter"].span is not None) is (transport != "local")
    assert ("second dirty-log fetch" in rows["state"].explanation) is (version == "54" and transport != "local")
    assert ("sent but not received (Nagle, delayed ACK)" in rows["send_state"].explanation) is (
        transport not in {"unix", "local"}
    )
    assert b.pausing is not None and b.pausing.noticed_ns > 0 and "paused..resumed" in rows


def test_a_receiver_that_keeps_asking_after_its_sender_died() -> None:
    _, b = load(DATA / "cloud-hypervisor-54-source-died.rec")
    assert b.migration.result == "failed" and b.blackout_ns is None
    assert any("keeps calling" in note for note in b.notes)


def test_a_failure_after_the_stop_is_an_aborted_blackout() -> None:
    _, b = load(DATA / "cloud-hypervisor-54-failed.rec")
    assert b.migration.result == "failed" and b.blackout_ns
    assert b.vcpus[0].start is not None and b.phase_ns("state.save") > 0 and b.phase_ns("state.send") == 0


@pytest.mark.parametrize("path", UNSTOPPED, ids=lambda path: path.stem)
def test_migrations_that_ended_before_the_stop(path: Path) -> None:
    _, b = load(path)
    assert b.migration.result in {"cancelled", "failed"}
    assert b.blackout_ns is None and b.window_ns is None
    assert all(phase.duration_ns is None for phase in b.phases)
    assert b.dirty_log.passes
