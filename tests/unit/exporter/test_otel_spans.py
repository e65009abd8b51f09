# SPDX-License-Identifier: Apache-2.0
"""A migration as a trace: both hosts, each with its own recording only, come to the same id and fit together."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ebpf_mig.collector import analyse
from ebpf_mig.errors import UsageError
from ebpf_mig.exporter.observation import observe
from ebpf_mig.exporter.otel_spans import Trace, migration_id, trace_of
from ebpf_mig.recording.events import AnyEvent, ClockPair, Header
from ebpf_mig.recording.file import Recording, read_recording

DATA = Path(__file__).parents[2] / "data"
TCP = (
    "qemu-7.2-tcp",
    "qemu-7.2-multifd",
    "qemu-10.0-multifd",
    "qemu-11.1-tcp",
    "cloud-hypervisor-54-4connections",
    "qemu-10.0-3vcpus",
    "qemu-11.1-multifd",
    "qemu-7.2-postcopy",
    "cloud-hypervisor-52-tcp",
)
CLOCK = ClockPair(0, 1_700_000_000_000_000_000, 100)


def trace(header: Header, events: list[AnyEvent]) -> Trace:
    found = analyse(Recording(header=msgspec.structs.replace(header, clock=CLOCK), events=events))
    seen = observe(found.breakdown, at=0, recording="x.rec", vmm="qemu", vm="vm", trigger="start")
    made = trace_of(found, seen)
    assert made is not None
    return made


def side(header: Header, events: list[AnyEvent], pid: int) -> tuple[Header, list[AnyEvent]]:
    """The recording of a host on which only this process ran."""
    mine = msgspec.structs.replace(header, targets=[t for t in header.targets if t.pid == pid])
    return mine, [event for event in events if getattr(event, "pid", pid) == pid]


@pytest.mark.parametrize("name", TCP)
def test_two_hosts_that_know_nothing_of_each_other_make_one_trace(name: str) -> None:
    recording = read_recording(DATA / f"{name}.rec")
    header, events = recording.header, recording.events
    found = analyse(recording)
    whole, connection = found.breakdown, found.connection
    assert whole.migration.source and whole.migration.destination
    both = trace(header, events)
    source = trace(*side(header, events, whole.migration.source.pid))
    destination = trace(*side(header, events, whole.migration.destination.pid))
    assert source.trace_id == destination.trace_id == both.trace_id
    assert source.span_id == destination.parent_id != "" and not source.parent_id and not destination.span_id
    assert connection.count(":") == 2


def test_spans_are_the_phases_in_wall_clock_time() -> None:
    recording = read_recording(DATA / "qemu-7.2-tcp.rec")
    whole = analyse(recording)
    breakdown, origin = whole.breakdown, whole.origin_ns
    found = trace(recording.header, recording.events)
    took: dict[str, int] = {}
    for span in found.spans:
        took[span.name] = took.get(span.name, 0) + span.end_ns - span.begin_ns
        assert found.root.begin_ns <= span.begin_ns <= span.end_ns <= found.root.end_ns
    assert took.pop("blackout") == breakdown.blackout_ns
    assert took == {p.phase: p.duration_ns for p in breakdown.phases if p.duration_ns}
    assert breakdown.blackout is not None
    (blackout,) = [span for span in found.spans if span.name == "blackout"]
    assert blackout.begin_ns == CLOCK.realtime_ns + origin + breakdown.blackout[0]
    assert found.root.end_ns - found.root.begin_ns == breakdown.migration.total_ns


def test_other_migrations_are_other_traces() -> None:
    ids = {trace(r.header, r.events).trace_id for r in (read_recording(DATA / f"{name}.rec") for name in TCP)}
    assert len(ids) == len(TCP)
    unix = read_recording(DATA / "qemu-7.2-unix.rec")
    assert analyse(unix).connection == "" and trace(unix.header, unix.events).trace_id


def test_endpoints_are_those_of_the_specification() -> None:
    otlp = pytest.importorskip("ebpf_mig.exporter.otlp", reason="missing feature: OpenTelemetry", exc_type=Exception)
    assert otlp.url_of("http://collector:4318") == "http://collector:4318/v1/traces"
    assert otlp.url_of("https://collector/otlp/") == "https://collector/otlp/v1/traces"
    assert otlp.url_of("http://c:4318/v1/traces") == "http://c:4318/v1/traces"
    for bad in ("collector:4317", "grpc://c", "http://", "http://c:99999999", "\n"):
        with pytest.raises(UsageError, match="not an OTLP endpoint"):
            otlp.url_of(bad)


@pytest.mark.parametrize("name", ["qemu-7.2-unix", "qemu-10.0-unix", "qemu-11.1-unix", "cloud-hypervisor-54-unix"])
def test_the_length_of_the_stream_stands_in_for_addresses(name: str) -> None:
    """Behind a forwarder between UNIX sockets no address is common to both hosts. Another VM has another id."""
    recording = read_recording(DATA / f"{name}.rec")
    header, events = recording.header, recording.events
    whole = analyse(recording).breakdown.migration
    assert whole.source and whole.destination
    halves = [trace(*side(header, events, one.pid)) for one in (whole.source, whole.destination)]
    assert halves[0].trace_id == halves[1].trace_id == trace(header, events).trace_id
    lengths = {half.root.attributes["ebpf_mig.stream_bytes"] for half in halves}
    assert len(lengths) == 1 and all(isinstance(length, int) and length > 1 << 20 for length in lengths)
    found = analyse(recording)
    assert migration_id(found, "vm") == halves[0].trace_id != migration_id(found, "other")
