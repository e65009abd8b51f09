# SPDX-License-Identifier: Apache-2.0
"""The Perfetto trace, decoded with Perfetto's own classes: tracks, slices, flows, sums."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from ebpf_mig.analysis.lanes import view
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import RECEIVE, AnyEvent, Header, Ioctl, OffCpu, RunDelay, Thread, Transfer
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.report import perfetto, protobuf
from tests.conftest import requires
from tests.unit.commands.test_cli import ROOT
from tests.unit.report.test_replay import COMPLETED, RECORDINGS

pb: Any = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="missing: perfetto (PyPI)")


class Decoded:
    """A trace by tracks."""

    def __init__(self, data: bytes) -> None:
        trace = pb.Trace()
        trace.ParseFromString(data)
        self.tracks = {
            p.track_descriptor.uuid: p.track_descriptor for p in trace.packet if p.HasField("track_descriptor")
        }
        self.events: dict[int, list[Any]] = defaultdict(list)
        self.clocks = [p.clock_snapshot for p in trace.packet if p.HasField("clock_snapshot")]
        self.slices: dict[int, list[tuple[str, int, int, dict[str, Any]]]] = defaultdict(list)
        self.starts: list[tuple[int, int, int]] = []
        self.ends: list[tuple[int, int, int]] = []
        self.counters: dict[int, list[int]] = defaultdict(list)
        for packet in trace.packet:
            if packet.HasField("track_event"):
                assert packet.trusted_packet_sequence_id == 1
                self.take(packet)

    def take(self, packet: Any) -> None:
        event, at = packet.track_event, packet.timestamp
        assert event.track_uuid in self.tracks, "a track is described before it is used"
        open_ = self.events[event.track_uuid]
        if event.type == pb.TrackEvent.TYPE_SLICE_BEGIN:
            args = {
                a.name: a.string_value if a.HasField("string_value") else a.int_value for a in event.debug_annotations
            }
            open_.append((event.name, at, args))
            self.starts += [(flow, event.track_uuid, at) for flow in event.flow_ids]
            self.ends += [(flow, event.track_uuid, at) for flow in event.terminating_flow_ids]
        elif event.type == pb.TrackEvent.TYPE_SLICE_END:
            name, begin, args = open_.pop()
            assert not open_ and at >= begin, "slices of one track do not overlap"
            done = self.slices[event.track_uuid]
            assert not done or done[-1][2] <= begin
            done.append((name, begin, at, args))
        elif event.type == pb.TrackEvent.TYPE_COUNTER:
            self.counters[event.track_uuid].append(event.counter_value)

    def named(self, name: str) -> list[tuple[str, int, int, dict[str, Any]]]:
        return [s for uuid, track in self.tracks.items() if track.name == name for s in self.slices[uuid]]


def decode(path: Path) -> tuple[Decoded, Any, Any]:
    recording = read_recording(path)
    found = analyse(recording)
    data = perfetto.render(found.breakdown, recording.header, view(found))
    turned = analyse(replace(recording, events=recording.events[::-1]))
    assert data == perfetto.render(turned.breakdown, recording.header, view(turned))
    return Decoded(data), found.breakdown, recording


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_every_track_is_described_and_every_slice_closed(path: Path) -> None:
    trace, _, recording = decode(path)
    assert not any(trace.events.values()), "every slice that begins ends"
    assert all(not t.parent_uuid or t.parent_uuid in trace.tracks for t in trace.tracks.values())
    pids = {t.process.pid for t in trace.tracks.values() if t.HasField("process")}
    assert pids == {target.pid for target in recording.header.targets}
    ioctls = [e for e in recording.events if isinstance(e, Ioctl)]
    by_thread = defaultdict(int)
    for call in ioctls:
        by_thread[call.pid, call.tid] += 1
    threads = {u: t.thread for u, t in trace.tracks.items() if t.HasField("thread")}
    drawn: dict[tuple[int, int], int] = defaultdict(int)
    for uuid, one in threads.items():
        drawn[one.pid, one.tid] += len(trace.slices[uuid])
    assert {thread: count for thread, count in drawn.items() if count} == by_thread
    sided = {(trace.tracks[u].parent_uuid, t.pid, t.tid) for u, t in threads.items()}
    assert len(sided) == len(threads), "one track per thread and side: execve(2) is called by a thread of both"
    assert trace.clocks[0].primary_trace_clock == 3


@pytest.mark.parametrize("path", COMPLETED, ids=lambda path: path.stem)
def test_totals_are_those_of_the_breakdown(path: Path) -> None:
    trace, b, _ = decode(path)
    ((_, begin, end, about),) = trace.named("window")
    assert end - begin == b.window_ns and about["completeness"] == "complete"
    ((_, begin, end, _),) = trace.named("blackout")
    assert end - begin == b.blackout_ns
    sums: dict[str, int] = defaultdict(int)
    for name, begin, end, _ in trace.named("phases"):
        sums[name] += end - begin
    assert sums == {p.phase: p.duration_ns for p in b.phases if p.spans}
    slots = [s for u, t in trace.tracks.items() if t.name.startswith("memslot ") for s in trace.slices[u]]
    final = [i for fetch in b.dirty_log.fetches for i in fetch.ioctls]
    assert {i.duration_ns for i in final} <= {end - begin for _, begin, end, _ in slots}
    assert all("slot" in args and "return" in args for *_, args in slots)


@pytest.mark.parametrize("path", COMPLETED, ids=lambda path: path.stem)
def test_flows_pair_and_counters_grow(path: Path) -> None:
    trace, b, _ = decode(path)
    assert sorted(f for f, *_ in trace.starts) == sorted(f for f, *_ in trace.ends)
    completed = b.migration.result == "completed"
    where = {flow: trace.tracks[uuid].name for flow, uuid, _ in trace.starts}
    for flow, uuid, at in trace.ends:
        if where[flow].startswith("vCPU"):
            assert trace.tracks[uuid].name == where[flow]
            vcpu = next(v for v in b.vcpus if f"vCPU {v.vcpu}" == where[flow])
            left = next(e for f, u, t in trace.starts if f == flow for _, s, e, _ in trace.slices[u] if s == t)
            assert at - left == vcpu.blackout_ns
        else:
            sent = next(t for f, _, t in trace.starts if f == flow)
            taken = next(e for _, s, e, _ in trace.slices[uuid] if s == at)
            assert where[flow].startswith("sends on") and trace.tracks[uuid].name.startswith("receives on")
            assert sent < taken
    stops = [name for name in where.values() if name.startswith("vCPU")]
    assert len(stops) == (len(b.vcpus) if completed else 0)
    assert len(where) > len(stops) if b.sockets and completed else len(where) == len(stops)
    counted = {trace.tracks[u].name: values for u, values in trace.counters.items()}
    pages = counted.pop("dirty pages", [])
    assert pages == [p.pages for p in b.dirty_log.passes if p.pages is not None]
    rates = counted.pop("dirty pages per second", [])
    assert rates == [p.dirty_pages_per_s for p in b.dirty_log.passes if p.dirty_pages_per_s is not None]
    on_their_way = counted.pop("bytes in flight, at most", [0])
    assert on_their_way[-1] == 0 or not completed, "all has arrived"
    flies = bool(b.sockets) and b.migration.destination is not None and b.migration.mode != "snapshot"
    assert min(on_their_way) >= 0 and (max(on_their_way) > 0) is flies
    assert set(counted) == ({"migration bytes sent", "migration bytes received"} if b.sockets else set())
    assert all(values == sorted(values) and values[0] >= 0 for values in counted.values())


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_all_that_a_thread_does_is_below_its_track(path: Path) -> None:
    trace, _, recording = decode(path)
    wanted: dict[tuple[str, int], int] = defaultdict(int)
    delays = {(e.tid, e.at_ns): e.delay_ns for e in recording.events if isinstance(e, RunDelay)}
    for e in recording.events:
        if isinstance(e, Transfer):
            wanted["receives" if e.direction == RECEIVE else "sends", e.tid] += 1
        elif isinstance(e, OffCpu) and e.begin_ns > 0:
            delay = 0 if e.preempted else delays.get((e.tid, e.end_ns), 0)
            wanted["off", e.tid] += 2 if 0 < delay < e.end_ns - e.begin_ns else 1  # a sleep, and the time after it
    found: dict[tuple[str, int], int] = defaultdict(int)
    for uuid, track in trace.tracks.items():
        parent = trace.tracks.get(track.parent_uuid)
        if parent is not None and parent.HasField("thread") and not track.name.startswith("vCPU"):
            found[track.name.split()[0], parent.thread.tid] += len(trace.slices[uuid])
    assert found == wanted


def test_names_of_slices_are_few_and_constant() -> None:
    names = {name for path in RECORDINGS for one in decode(path)[0].slices.values() for name, *_ in one}
    free = {
        name for name in names if not re.fullmatch(r"[A-Z0-9_]+|0x[0-9a-f]+|[a-z]+\.[a-z]+", name)
    }  # ioctls, phases
    assert free == {
        "window", "blackout", "pause", "quiesce", "exec", "startup", "handover", "sync", "resume", "management",
        "unattributed", "pass", "runs the guest", "send", "receive", "sleep", "runnable, not running",
    }, free  # fmt: skip


def test_hostile_names_and_overlapping_calls() -> None:
    header = Header(begin_ns=1)
    calls: list[AnyEvent] = [Ioctl(10, 50, 7, 8, 3, 0x4010AE42, 0), Ioctl(20, 90, 7, 8, 3, 0x4010AE42, -1)]
    events = [*calls, Thread(7, 8, "\x1b[31m" + "x" * 999)]
    found = analyse(Recording(header=header, events=events))
    trace = Decoded(perfetto.render(found.breakdown, header, view(found)))
    (thread,) = [u for u, t in trace.tracks.items() if t.HasField("thread")]
    assert [(b, e) for _, b, e, _ in trace.slices[thread]] == [(10, 50), (50, 90)]
    assert trace.slices[thread][1][3]["return"] == -1
    assert trace.tracks[thread].thread.thread_name.startswith("\\x1b[31mxxx")


def test_varints() -> None:
    assert protobuf.varint(300) == b"\xac\x02" and protobuf.varint(0) == b"\0"
    assert protobuf.varint(-1) == b"\xff" * 9 + b"\x01"


def test_ioctls_have_their_arguments() -> None:
    trace, b, recording = decode(next(p for p in COMPLETED if p.stem == "qemu-10.0-tcp"))
    called = {(e.begin_ns, e.tid): e for e in recording.events if isinstance(e, Ioctl)}
    seen = [(t.thread.tid, s) for u, t in trace.tracks.items() if t.HasField("thread") for s in trace.slices[u]]
    clears = [(called[begin, tid], args) for tid, (name, begin, _, args) in seen if name == "CLEAR_DIRTY_LOG"]
    assert clears and all(a["pages"] == e.size and a["first_page"] == e.addr and a["slot"] == e.slot for e, a in clears)
    regions = [(called[begin, tid], args) for tid, (name, begin, _, args) in seen if name == "SET_USER_MEMORY_REGION"]
    assert regions and all(a["bytes"] == e.size and a["guest_address"] == e.addr for e, a in regions)
    window = next(args for _, _, _, args in trace.named("window"))
    assert (window["clock_offset_ns"], window["clock_bound_ns"]) == (b.clock.offset_ns, b.clock.bound_ns)


@requires("trace_processor_shell")
def test_trace_processor_answers_in_sql(tmp_path: Path) -> None:
    """The trace processor that the `perfetto` package downloads, if the machine has it."""
    recording = read_recording(path := next(p for p in COMPLETED if p.stem == "qemu-10.0-tcp"))
    b = analyse(recording).breakdown
    trace, query = tmp_path / "t.pftrace", tmp_path / "q.sql"
    trace.write_bytes(perfetto.render(b, recording.header, view(analyse(recording))))
    from_phases = "FROM slice s JOIN track t ON s.track_id = t.id WHERE t.name = 'phases'"
    query.write_text(f"SELECT s.name, SUM(s.dur) {from_phases} GROUP BY 1")
    done = subprocess.run(["trace_processor_shell", "-q", query, trace], capture_output=True, text=True, check=True)
    rows = dict(line.replace('"', "").rsplit(",", 1) for line in done.stdout.splitlines()[1:] if "," in line)
    assert {k: int(v) for k, v in rows.items()} == {p.phase: p.duration_ns for p in b.phases if p.spans}, path


COOKBOOK = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "perfetto.md").read_text(), re.DOTALL)


@requires("trace_processor_shell")
@pytest.mark.parametrize("sql", COOKBOOK)
def test_each_query_of_the_cookbook_has_an_answer(sql: str, tmp_path: Path) -> None:
    recording = read_recording(next(p for p in COMPLETED if p.stem == "qemu-10.0-tcp"))
    found = analyse(recording)
    trace, query = tmp_path / "t.pftrace", tmp_path / "q.sql"
    trace.write_bytes(perfetto.render(found.breakdown, recording.header, view(found)))
    query.write_text(sql)
    done = subprocess.run(["trace_processor_shell", "-q", query, trace], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) > 1 and "[NULL]" not in done.stdout, done.stdout


def test_the_cookbook_names_only_what_is_in_the_trace() -> None:
    """Names and arguments in quotes exist, also where no trace processor can run the queries."""
    trace, _, _ = decode(next(p for p in COMPLETED if p.stem == "qemu-10.0-tcp"))
    slices = [one for track in trace.slices.values() for one in track]
    known = {name for name, *_ in slices} | {t.name for t in trace.tracks.values()}
    known |= {f"debug.{arg}" for *_, args in slices for arg in args} | {"ioctl", "wait"}
    assert len(COOKBOOK) == 5
    assert {word for sql in COOKBOOK for word in re.findall(r"'([^']+)'", sql)} <= known
