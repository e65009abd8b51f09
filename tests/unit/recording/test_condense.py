# SPDX-License-Identifier: Apache-2.0
"""A long recording is read in little memory, and its report is that of all events, to the byte."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

from bench.reading import SEED, stretched
from ebpf_mig import collector
from ebpf_mig.analysis import condensed
from ebpf_mig.analysis.result import Analysis
from ebpf_mig.collector import analyse, analyse_file
from ebpf_mig.errors import RecordingError
from ebpf_mig.recording import condense
from ebpf_mig.recording.condense import read_condensed
from ebpf_mig.recording.events import AnyEvent, Header, Ioctl, OwnCost, Segment, Transfer
from ebpf_mig.recording.file import Recording, RecordingWriter, read_recording
from ebpf_mig.report import json as json_report
from ebpf_mig.report import text as text_report
from tests.fuzz import mutate

DATA = Path(__file__).parents[2] / "data"
LONG = 6000
NEAR = 60
"""Of blocks of 16 events: beyond what a switchover takes."""


def written(path: Path, header: Header, events: list[AnyEvent], size: int) -> Path:
    """A recording with `size` events in a block."""
    with path.open("wb") as stream:
        writer = RecordingWriter(stream, header)
        for at in range(0, len(events), size):
            writer.write_many(events[at : at + size])
            writer.flush()
    return path


def long_one(path: Path, count: int = LONG, size: int = 16) -> Path:
    seed = read_recording(SEED)
    return written(path, seed.header, [*stretched(seed.header, seed.events, count)], size)


def said(analysis: Analysis) -> tuple[str, str]:
    return json_report.render(analysis.breakdown), text_report.render(analysis.breakdown)


def totals(events: list[AnyEvent]) -> list[int]:
    moved = [event for event in events if isinstance(event, Transfer)]
    arrived = [event for event in events if isinstance(event, Segment)]
    return [sum(e.bytes for e in moved), sum(e.calls for e in moved), sum(e.payload for e in arrived)]


def test_a_short_recording_is_read_as_it_is() -> None:
    found = read_condensed(str(SEED))
    assert (found.recording, found.sums) == (read_recording(SEED), {})


def test_a_long_one_is_smaller_and_its_report_is_the_same(tmp_path: Path) -> None:
    path = long_one(tmp_path / "long.rec")
    found, plain = read_condensed(str(path), near=NEAR), read_recording(path)
    assert len(found.recording.events) < 0.6 * len(plain.events)
    assert totals(found.recording.events) == totals(plain.events)
    analysis = analyse(found.recording)
    assert condensed.is_exact(analysis, found)
    assert said(analysis) == said(analyse(plain))


def test_so_is_one_of_blocks_as_they_are_written(tmp_path: Path) -> None:
    path = long_one(tmp_path / "long.rec", 300_000, 4096)
    found, plain = read_condensed(str(path)), read_recording(path)
    assert len(found.recording.events) < 0.65 * len(plain.events)
    assert said(analyse_file(str(path))) == said(analyse(plain))


@pytest.mark.parametrize("seed", range(3))
def test_whatever_a_recording_holds_its_report_is_the_same_or_it_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(condensed, "SHOWN_BEFORE_NS", 0)
    random = Random(seed)
    contents = [path.read_bytes() for path in sorted(DATA.glob("*.rec")) if path.stat().st_size < 40_000]
    exact = 0
    for content in contents:
        base = read_recording(content)
        events = list(base.events)
        if random.random() < 0.7:
            with suppress(ValueError, StopIteration, ZeroDivisionError):
                events = list(stretched(base.header, events, 4 * len(events)))
        else:
            with suppress(RecordingError):
                events = read_recording(mutate.recording(content, random, contents)).events
        if random.random() < 0.1:
            random.shuffle(events)
        path = written(tmp_path / "x.rec", base.header, events, random.choice((4, 16, 64)))
        found = read_condensed(str(path), near=random.choice((0, 1, 2)))
        analysis = analyse(found.recording)
        if found.sums and condensed.is_exact(analysis, found):
            exact += 1
            assert said(analysis) == said(analyse(read_recording(path)))
    assert exact, "each report was made from the whole recording"


@pytest.mark.parametrize("what", ["window", "act", "first data", "begin", "own cost"])
def test_where_a_sum_could_hide_something_the_whole_recording_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = long_one(tmp_path / "long.rec")
    found = read_condensed(str(path), near=NEAR)
    destination = max(found.sums, key=lambda pid: len(found.sums[pid]))
    begin, _ = found.sums[destination][-1]
    analysis = analyse(found.recording)
    assert condensed.is_exact(analysis, found)
    events = list(found.recording.events)
    if what == "window":
        found.sums[destination].append((begin, analysis.origin_ns))
    elif what == "act":
        acts = (e for e in events if isinstance(e, Ioctl) and e.pid == destination)
        events.append(replace(next(acts), begin_ns=begin + 1, end_ns=begin + 1))
    elif what == "first data":
        segment = next(e for e in events if isinstance(e, Segment) and e.pid == destination and e.payload)
        events.append(replace(segment, at_ns=begin + 1, socket=1))
    elif what == "begin":
        found.sums[destination].append((analysis.traced.since - 1, analysis.traced.since))
    else:
        events.append(OwnCost(begin + 1, 1000, 10))
        late = OwnCost(analysis.origin_ns - 1, 1000, 10)
        assert condensed.is_exact(analyse(replace(found.recording, events=[*found.recording.events, late])), found)
    changed: Recording = replace(found.recording, events=events)
    assert not condensed.is_exact(analyse(changed), found)


def test_what_is_not_exact_is_read_again_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = long_one(tmp_path / "long.rec")
    short = read_condensed(str(path), near=NEAR)
    monkeypatch.setattr(collector, "read_condensed", lambda _: short)
    read: list[int] = []

    def prepared(recording: Recording) -> Recording:
        read.append(len(recording.events))
        return recording

    monkeypatch.setattr(condensed, "is_exact", lambda *_: False)
    plain = read_recording(path)
    assert said(analyse_file(str(path), prepared)) == said(analyse(plain))
    assert read == [len(short.recording.events), len(plain.events)]


def test_the_begin_of_a_stream_and_empty_calls_stay() -> None:
    call = Transfer(10, 20, 7, 7, 3, 1, 99, 1, 100, 5, 5, 0, 0)
    calls = [replace(call, begin_ns=10 * at, end_ns=10 * at + 5, position=100 * at) for at in range(1, 7)]
    calls[3] = replace(calls[3], bytes=0)
    taken: list[AnyEvent] = []
    condenser = condense._Condenser(0, taken.extend)
    condenser.take(list(calls))
    assert [(e.begin_ns, e.bytes, e.calls) for e in taken if isinstance(e, Transfer)] == [
        (40, 0, 1),
        (10, 100, 1),
        (20, 400, 4),
    ]
    assert condenser.sums == {7: [(20, 65)]}


def test_of_data_with_sequence_numbers_the_first_and_the_last_segment_stay() -> None:
    old = [Segment(at, 7, 99, 100, 0, 0, 0, 0) for at in range(1, 7)]
    new = [replace(segment, seq=100 * segment.at_ns, received=100 * segment.at_ns) for segment in old]
    again = [*new[:4], replace(new[4], received=100), new[5]]
    for segments, expected in (
        (old, [(1, 100), (6, 500)]),
        (new, [(1, 100), (2, 100), (6, 100)]),
        (again, [(at, 100) for at in range(1, 7)]),
    ):
        taken: list[AnyEvent] = []
        condenser = condense._Condenser(0, taken.extend)
        condenser.take([segments[0]])
        condenser.take(list(segments[1:]))
        assert [(e.at_ns, e.payload) for e in taken if isinstance(e, Segment)] == expected


def test_calls_beside_the_first_data_stay() -> None:
    call = Transfer(10, 20, 7, 7, 3, 1, 99, 1, 100, 5, 5, 0, 0)
    calls = [replace(call, begin_ns=10 * at, end_ns=10 * at + 5, position=100 * at) for at in range(1, 7)]
    taken: list[AnyEvent] = []
    condense._Condenser(0, taken.extend).take([*calls, Segment(42, 7, 99, 100, 0, 0, 0, 0)])
    assert sum(isinstance(event, Transfer) for event in taken) == len(calls)
