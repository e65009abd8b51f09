# SPDX-License-Identifier: Apache-2.0
"""Targets whose input is a recording: reading, analysis with every report, joining.

In: bytes. Out: nothing, or an undocumented exception.
"""

from __future__ import annotations

import contextlib
import io
import json
import zlib
from collections.abc import Callable
from random import Random
from xml.etree import ElementTree

from ebpf_mig.analysis import lanes, stacks, whatif
from ebpf_mig.analysis.result import Analysis
from ebpf_mig.collector import analyse
from ebpf_mig.commands.changes import parse_changes
from ebpf_mig.errors import EbpfMigError, RecordingError
from ebpf_mig.joining.merge import joined
from ebpf_mig.recording.events import AnyEvent
from ebpf_mig.recording.file import RecordingReader, RecordingWriter, read_recording
from ebpf_mig.recording.redact import redacted
from ebpf_mig.report import csv, folded, html, perfetto, pprof, speedscope, svg, tables, text
from ebpf_mig.report import json as json_report
from tests.fuzz import invariants, mutate
from tests.fuzz.target import Target, corpus

SEPARATOR = b"\0--next--\0"


def reader(data: bytes) -> None:
    """A recording that was read can be written and read again."""
    try:
        recording = read_recording(data)
    except RecordingError:
        return
    assert recording.truncated == bool(recording.reason)
    if zlib.crc32(data) % 4:
        return
    stream = io.BytesIO()
    with RecordingWriter(stream, recording.header) as writer:
        writer.write_many(recording.events)
    again = read_recording(stream.getvalue())
    assert (again.header, again.events) == (recording.header, recording.events)


def blocks(data: bytes) -> None:
    """The recording is read block by block from a stream that yields a few bytes at a time, like a pipe."""

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(7 if size is None or size < 0 else size, 7))

    def taken(source: bytes | io.BytesIO) -> tuple[list[AnyEvent], str, int] | str:
        try:
            with RecordingReader(source) as found:
                return list(found), found.reason, found.unknown
        except RecordingError as error:
            return str(error)

    assert taken(data) == taken(Slow(data))


def whole_way(data: bytes) -> None:
    """The analysis and its invariants, then some of the other reports. The input's checksum selects which."""
    try:
        recording = read_recording(data)
    except RecordingError:
        return
    turn = zlib.crc32(data)
    if turn % 5 == 0:
        recording = redacted(recording)
    analysis = analyse(recording)
    said = json_report.render(analysis.breakdown)
    invariants.check(analysis.breakdown, said)
    if turn % 4 == 0:
        assert json_report.render(analyse(recording).breakdown) == said, "not the same bytes"
    with contextlib.suppress(EbpfMigError):
        OTHERS[turn % len(OTHERS)](analysis)


def every_report(data: bytes) -> None:
    """All reports of one recording."""
    try:
        recording = read_recording(data)
    except RecordingError:
        return
    for one in (recording, redacted(recording)):
        analysis = analyse(one)
        invariants.check(analysis.breakdown, json_report.render(analysis.breakdown))
        for other in OTHERS:
            with contextlib.suppress(EbpfMigError):
                other(analysis)


def _html(analysis: Analysis) -> None:
    page = html.render(analysis.breakdown, lanes.view(analysis))
    json.loads(page.partition("id='data'>")[2].partition("</script>")[0])


def _tables(analysis: Analysis) -> None:
    csv.render(analysis.breakdown)
    tables.migration_row("x", analysis.header, analysis.breakdown)
    tables.phase_rows("x", analysis.breakdown)


def _stacks(analysis: Analysis) -> None:
    rows = stacks.observe(analysis)
    for line in folded.render(rows).splitlines():
        frames, _, ns = line.rpartition(" ")
        assert int(ns) > 0 and all(frames.split(";")), line
    json.loads(speedscope.render(rows, "x"))
    pprof.render(rows, analysis.header, analysis.attribution.window)


OTHERS: list[Callable[[Analysis], object]] = [
    lambda analysis: text.render(analysis.breakdown),
    _html,
    _tables,
    lambda analysis: perfetto.render(analysis.breakdown, analysis.header, lanes.view(analysis)),
    _stacks,
    lambda analysis: ElementTree.fromstring(svg.render(analysis.breakdown, lanes.view(analysis))),  # noqa: S314
    lambda analysis: whatif.predict(analysis, parse_changes(["bandwidth=25Gbit", "fetch=0", "rearm=0"])),
]


def joining(data: bytes) -> None:
    """Joins two recordings; then analyses, writes and reads the result."""
    first, _, second = data.partition(SEPARATOR)
    try:
        whole = joined(read_recording(first), read_recording(second))
    except EbpfMigError:
        return
    said = json_report.render(analyse(whole).breakdown)
    invariants.check(analyse(whole).breakdown, said)
    stream = io.BytesIO()
    with RecordingWriter(stream, whole.header) as writer:
        writer.write_many(whole.events)
    again = read_recording(stream.getvalue())
    assert again.events == whole.events, "what was joined cannot be read again"


def _pairs() -> list[bytes]:
    files = corpus("join")
    return [a + SEPARATOR + b for a in files for b in files]


class JoinTarget(Target):
    """Mutates one of the two recordings."""

    def change(self, data: bytes, random: Random, seeds: list[bytes]) -> bytes:
        """A mutated pair."""
        halves = data.split(SEPARATOR, 1)
        at = random.randrange(len(halves))
        halves[at] = mutate.recording(halves[at], random, [seed.split(SEPARATOR, 1)[0] for seed in seeds])
        return SEPARATOR.join(halves)


TARGETS = [
    Target("reader", lambda: corpus("reader"), reader, recording=True),
    Target("blocks", lambda: corpus("reader"), blocks, recording=True),
    Target("whole", lambda: corpus("whole"), whole_way, recording=True),
    Target("reports", lambda: corpus("whole"), every_report, recording=True),
    JoinTarget("join", _pairs, joining, recording=True),
]
