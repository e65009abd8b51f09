# SPDX-License-Identifier: Apache-2.0
"""A figure that was not measured is never shown as 0: it is null in the breakdown, and no number in a report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from ebpf_mig.analysis.lanes import view
from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.exporter.observation import Observation, observe
from ebpf_mig.linux import kvm
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.report import csv, html, tables, text

DATA = Path(__file__).parents[2] / "data"
ONE_SIDE = [DATA / "hosts" / f"{side}.rec" for side in ("source", "destination")]


def without(recording: Recording, *kinds: type) -> Recording:
    return replace(recording, events=[e for e in recording.events if not isinstance(e, kinds)])


def absent(recording: Recording, signal: str) -> Recording:
    """The recording as made on a kernel that lacks what the signal needs."""
    attach = recording.header.attach | {signal: "absent: not in this kernel"}
    return replace(recording, header=replace(recording.header, attach=attach))


def seen_by_a_node(b: Breakdown) -> Observation:
    return observe(b, at=0, recording="x.rec", vmm="qemu", vm="vm", trigger="start")


def test_a_recording_that_a_node_kept_without_the_vcpus_accounts_has_no_brownout() -> None:
    """Earlier versions of `watch` and `exporter` dropped these events, but recorded the signal as traced."""
    whole = read_recording(ONE_SIDE[0])
    b = analyse(whole).breakdown
    assert b.dirty_log.passes[0].brownout is not None and not any("brownout" in note for note in b.notes)
    kept = without(whole, ev.VcpuSpan, ev.Samples)
    assert kept.header.attach["brownout"] == "tracepoint"
    b = analyse(kept).breakdown
    assert all(one.brownout is None and one.baseline is None for one in b.dirty_log.passes)
    assert b.dirty_log.final is not None and b.dirty_log.final.split is None
    assert [note for note in b.notes if "the brownout is unknown" in note] != []
    assert "brownout, worst" not in text.render(b)


def test_lock_waits_are_unknown_if_no_span_measured_them() -> None:
    """A vCPU without a span in a pass has no lock wait only if other spans of the process measure lock waits."""
    whole = read_recording(ONE_SIDE[0])
    events = [replace(e, lock_ns=-1) if isinstance(e, ev.VcpuSpan) else e for e in whole.events]
    for recording, known in ((whole, True), (replace(whole, events=events), False)):
        shares = [
            v.lock_wait_ns
            for one in analyse(recording).breakdown.dirty_log.passes
            for stretch in (one.brownout, one.baseline)
            if stretch is not None
            for v in stretch.vcpus
        ]
        assert shares and all((share is not None) == known for share in shares)


def test_a_pause_is_not_said_to_be_without_naps_where_waits_were_not_traced() -> None:
    whole = read_recording(DATA / "cloud-hypervisor-54-tcp.rec")
    found = analyse(whole).breakdown.pausing
    assert found is not None and found.naps
    found = analyse(absent(without(whole, ev.OffCpu), "off-cpu")).breakdown.pausing
    assert found is not None and found.noticed_ns > 0
    assert (found.naps, found.asleep_ns, found.polling, found.kicked_late_ns) == (None, None, None, None)


def test_losses_are_not_known_where_the_recording_was_cut_off() -> None:
    whole = read_recording(DATA / "qemu-7.2-tcp.rec")
    assert analyse(whole).breakdown.completeness.lost == {}
    found = analyse(replace(without(whole, ev.Ending), truncated=True)).breakdown
    assert found.completeness.lost is None and found.completeness.unpaired is None
    assert "losses not known" in text.render(found) and "nothing lost" not in text.render(found)
    assert tables.migration_row("x", whole.header, found)["lost"] is None


@pytest.mark.parametrize("path", ONE_SIDE, ids=lambda path: path.stem)
def test_the_other_side_has_no_durations(path: Path) -> None:
    recording = read_recording(path)
    found = analyse(recording)
    b = found.breakdown
    unmeasured = {p.phase for p in b.phases if p.duration_ns is None}
    other = "destination" if path.stem == "source" else "source"
    assert {p.phase for p in b.phases if p.side == other} <= unmeasured
    assert b.window_ns == sum(p.duration_ns or 0 for p in b.phases)
    rows = [line.split(",") for line in csv.render(b).splitlines()]
    assert all(row[2] == row[3] == "" for row in rows if row[0] in unmeasured)
    assert all(row["duration_ns"] is None for row in tables.phase_rows("x", b) if row["phase"] in unmeasured)
    assert not unmeasured & seen_by_a_node(b).phases.keys()
    page = html.render(b, view(found))
    for phase in unmeasured:
        cells = (
            f">{phase}</button></td><td[^>]*>[^<]+</td><td[^>]*>[a-z]+</td><td data-label='ms' class='n'>not seen</td>"
        )
        assert re.search(cells, page), phase


def test_a_destination_alone_does_not_show_the_sources_log() -> None:
    recording = read_recording(ONE_SIDE[1])
    b = analyse(recording).breakdown
    row = tables.migration_row("x", recording.header, b)
    assert (row["passes"], row["precopy_bytes"], row["final_bytes"]) == (None, None, None)
    assert seen_by_a_node(b).final_bytes is None


def kept(event: ev.AnyEvent, signal: str) -> bool:
    """Whether the event would be recorded without the signal."""
    if isinstance(event, ev.Ioctl):
        log, memslot = kvm.is_dirty_log(event.cmd), kvm.is_memslot(event.cmd)
        return not (log if signal == "dirty-log" else not log and not memslot if signal == "state" else False)
    return not isinstance(event, {"kick": ev.Kick, "socket": (ev.Transfer, ev.Socket)}.get(signal, ()))


@pytest.mark.parametrize(
    ("signal", "unmeasured"),  # phases that no other event shows
    [
        ("kick", {"pause"}),
        ("dirty-log", {"fetch.kernel", "fetch.user"}),
        ("state", {"state.save", "state.load"}),
        ("socket", {"memory.send", "state.send", "handover", "management"}),
    ],
)
def test_a_phase_whose_signal_was_not_traced_has_no_duration(signal: str, unmeasured: set[str]) -> None:
    whole = read_recording(DATA / "qemu-7.2-tcp.rec")
    assert all(p.duration_ns is not None for p in analyse(whole).breakdown.phases)
    blind = absent(replace(whole, events=[e for e in whole.events if kept(e, signal)]), signal)
    found = analyse(blind)
    b = found.breakdown
    assert b.window_ns is not None and b.completeness.verdict == "bounded"
    unmeasured = {p.phase for p in b.phases if p.phase in unmeasured and not p.spans}
    assert {p.phase for p in b.phases if p.duration_ns is None} == unmeasured != set()
    assert not unmeasured & seen_by_a_node(b).phases.keys()
    for shown in (text.render(b), html.render(b, view(found)), csv.render(b)):
        assert shown
    if signal == "socket":
        assert b.migration.connections is None and b.dirty_log.passes
        assert all((p.bytes, p.send_ns, p.pages_at_most) == (None, None, None) for p in b.dirty_log.passes)
        assert tables.migration_row("x", whole.header, b)["precopy_bytes"] is None
        assert "sends were not traced" in text.render(b) and " 0 B" not in text.render(b)
    if signal == "dirty-log":
        assert b.dirty_log.mode == "unknown" and "no dirty logging" not in text.render(b)


def test_a_nodes_histograms_do_not_count_locks_that_were_not_traced() -> None:
    b = analyse(read_recording(DATA / "qemu-7.2-tcp.rec")).breakdown
    fetches = [
        replace(fetch, ioctls=[replace(i, lock_wait_ns=None, off_cpu_ns=None) for i in fetch.ioctls])
        for fetch in b.dirty_log.fetches
    ]
    blind = replace(b, dirty_log=replace(b.dirty_log, fetches=fetches))
    assert set(seen_by_a_node(b).fetch["blackout"]) == {"lock", "off_cpu", "kernel", "user"}
    assert set(seen_by_a_node(blind).fetch["blackout"]) == {"kernel", "user"}
