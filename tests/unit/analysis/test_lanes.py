# SPDX-License-Identifier: Apache-2.0
"""Lanes of real and of random recordings are in order, disjoint and complete, and so are the reports made of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebpf_mig.analysis.lanes import Slice, View, apart, view
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import AnyEvent, CpuQuota, Header, Ioctl, OffCpu, RunDelay, Segment, Transfer
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.report import html, perfetto
from tests.unit import scripts
from tests.unit.analysis.test_collector_properties import event, header, roles
from tests.unit.report.test_replay import COMPLETED
from tests.unit.script import at


def check(found: View) -> None:
    assert len({(lane.side, lane.pid, lane.tid, lane.kind, lane.name) for lane in found.lanes}) == len(found.lanes)
    for lane in found.lanes:
        last = 0
        for one in lane.slices:
            assert 0 <= one.begin_ns <= one.end_ns
            assert lane.kind in {"mark", "segment"} or one.begin_ns >= last
            last = one.end_ns
    leaving = sorted(flow for lane in found.lanes for s in lane.slices for flow in s.starts)
    assert leaving == sorted(flow for lane in found.lanes for s in lane.slices for flow in s.ends)
    assert leaving == list(range(1, found.flows + 1))


def lengths(call: Ioctl | Transfer | OffCpu, delays: dict[tuple[int, int], int]) -> list[int]:
    """Of the slices of a call. A sleep and the time without a CPU after it are two."""
    whole = call.end_ns - call.begin_ns
    delay = delays.get((call.tid, call.end_ns), 0) if isinstance(call, OffCpu) and not call.preempted else 0
    return [whole - delay, delay] if 0 < delay < whole else [whole]


@pytest.mark.parametrize("path", COMPLETED, ids=lambda path: path.stem)
def test_every_call_of_a_real_recording_is_in_a_lane_uncut(path: Path) -> None:
    recording = read_recording(path)
    analysis = analyse(recording)
    found = view(analysis)
    check(found)
    delays = {(e.tid, e.at_ns): e.delay_ns for e in recording.events if isinstance(e, RunDelay)}
    for kind, of in (("ioctl", Ioctl), ("socket", Transfer), ("wait", OffCpu)):
        drawn = sorted(s.end_ns - s.begin_ns for lane in found.lanes if lane.kind == kind for s in lane.slices)
        seen = [e for e in recording.events if isinstance(e, of)]
        assert drawn == sorted(length for e in seen for length in lengths(e, delays))
    b = analysis.breakdown
    for vcpu in b.vcpus:
        lanes = {lane.side: lane for lane in found.lanes if lane.kind == "vcpu" and lane.name == f"vCPU {vcpu.vcpu}"}
        assert vcpu.stop is not None and vcpu.start is not None
        if b.migration.result == "completed":
            assert lanes["source"].slices[-1].end_ns == found.origin_ns + vcpu.stop
            assert lanes["destination"].slices[0].begin_ns == found.origin_ns + vcpu.start
        else:  # the source took its guest back
            slices = lanes["source"].slices
            after = next(s for s in slices if s.begin_ns == found.origin_ns + vcpu.start)
            assert max(s.end_ns for s in slices if s.begin_ns < after.begin_ns) == found.origin_ns + vcpu.stop


def test_a_thread_that_waits_for_a_cpu_after_its_sleep_does_not_sleep_longer() -> None:
    script = scripts.qemu_7_2()
    source = script.vms[0]
    begin, woken, end = (at(us) for us in (10_000, 10_900, 11_500))
    source.events += [
        OffCpu(begin, end, source.pid, source.pid + 1, ("schedule", "do_poll"), False, 0, 77, 78),
        RunDelay(end, source.pid, source.pid + 1, end - woken),
        *(CpuQuota(at(us), source.pid, 0) for us in (9000, 20_000)),
    ]
    drawn = [s for lane in view(analyse(script.recording)).lanes if lane.kind == "wait" for s in lane.slices]
    assert [(s.name, s.begin_ns, s.end_ns) for s in drawn] == [
        ("sleep", begin, woken),
        ("runnable, not running", woken, end),
    ]
    assert drawn[0].args["in"] == "do_poll"
    assert drawn[1].args == {"why": "waits for a CPU"}


def test_overlap_is_cut_at_the_end_of_what_came_first() -> None:
    cut = apart([Slice(5, 20, "b"), Slice(0, 10, "a"), Slice(6, 8, "c")])
    assert [(s.name, s.begin_ns, s.end_ns) for s in cut] == [("a", 0, 10), ("b", 10, 20), ("c", 20, 20)]


def test_segments_have_a_lane_a_socket() -> None:
    events: list[AnyEvent] = [Segment(30, 1000, 70, 0, 5, 6, 7, 8), Segment(20, 1000, 70, 100, 0, 6, 7, 8)]
    lanes = [
        lane
        for lane in view(analyse(Recording(header=Header(begin_ns=1), events=events))).lanes
        if lane.kind == "segment"
    ]
    assert [(lane.name, [s.name for s in lane.slices]) for lane in lanes] == [
        ("segments on socket 70", ["data arrives", "acknowledgement arrives"])
    ]


def test_queued_requests_are_on_no_threads_lane() -> None:
    script = scripts.qemu_7_2()
    source = script.vms[0]
    for tid in (-source.pid, 5):
        source.receive(100, 200, 5000, 90, tid)
    found = view(analyse(script.recording))
    check(found)
    names = {
        (lane.tid, lane.name) for lane in found.lanes if lane.what.startswith("receives") and lane.pid == source.pid
    }
    assert {(0, "queued receives"), (source.pid + 5, f"thread {source.pid + 5} receives on fd 20")} <= names


def test_a_process_that_is_no_side_has_no_bytes_of_the_migration() -> None:
    script = scripts.qemu_7_2()
    unrelated = script.vm(3000, "unknown")
    unrelated.receive(100, 200, 5000, socket=80)
    assert {counter.pid for counter in view(analyse(script.recording)).counters} == {1000, 2000}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(roles, st.lists(event(), max_size=25), st.integers(0, 9))
def test_any_recording_can_be_shown(names: list[str], events: list[AnyEvent], seed: int) -> None:
    about = header(names)
    analysis = analyse(Recording(header=about, events=events))
    found = view(analysis)
    check(found)
    b = analysis.breakdown
    shuffled = list(events)
    random.Random(seed).shuffle(shuffled)
    turned = view(analyse(Recording(header=about, events=shuffled)))
    assert perfetto.render(b, about, found) == perfetto.render(b, about, turned)
    assert html.render(b, found).endswith("</html>\n")
