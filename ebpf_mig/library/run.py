# SPDX-License-Identifier: Apache-2.0
"""`load` and `join`: read recordings into a `Run`, the main object of the library.

In: paths, bytes or binary streams. Out: a `Run` with the breakdown and tables. RecordingError if the input is not a
recording.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.errors import UsageError
from ebpf_mig.library import tables
from ebpf_mig.library.table import Table
from ebpf_mig.recording.events import Header
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.report.answer import headline
from ebpf_mig.text import printable

if TYPE_CHECKING:
    from ebpf_mig.analysis.result import Analysis

Source = str | Path | bytes | BinaryIO
FORMS = ("text", "json", "csv", "html", "svg", "markdown", "folded", "speedscope")


class Run:
    """One recorded migration. It is immutable; tables are built on first use."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._analysis: Analysis = analyse(recording)

    @property
    def breakdown(self) -> Breakdown:
        """The result of the analysis: the output of `ebpf-mig report --format json` as an object."""
        return self._analysis.breakdown

    @property
    def header(self) -> Header:
        """The host and processes of the recording, and how it was made."""
        return self._recording.header

    @property
    def origin_ns(self) -> int:
        """The zero point of all tables, on CLOCK_MONOTONIC of the recording's host."""
        return self._analysis.origin_ns

    @cached_property
    def phases(self) -> Table:
        """One row per phase, in the order of reports."""
        return tables.phases(self.breakdown)

    @cached_property
    def vcpus(self) -> Table:
        """One row per vCPU: when it stopped and started."""
        return tables.vcpus(self.breakdown)

    @cached_property
    def passes(self) -> Table:
        """One row per pre-copy pass."""
        return tables.passes(self.breakdown)

    @cached_property
    def sockets(self) -> Table:
        """One row per migration socket, side and direction that was used in the window."""
        return tables.sockets(self.breakdown)

    @cached_property
    def ioctls(self) -> Table:
        """One row per KVM ioctl other than KVM_RUN, in order of time."""
        return tables.ioctls(self._analysis)

    @cached_property
    def waits(self) -> Table:
        """One row per recorded wait off the CPU, in order of time."""
        return tables.waits(self._analysis)

    @cached_property
    def stacks(self) -> Table:
        """One row per kernel stack in the window: time off the CPU, and samples, by side, phase and thread."""
        return tables.stacks(self._analysis)

    @cached_property
    def events(self) -> tables.Events:
        """One row per event, in order of time. `events.of("Transfer")` has all fields of one kind."""
        return tables.Events(self._analysis, self._recording.events)

    def report(self, form: str = "text") -> str:
        """The report of `ebpf-mig report` as a string, in one of `FORMS`. UsageError for any other form."""
        match form:
            case "text":
                from ebpf_mig.report import text

                return text.render(self.breakdown)
            case "json":
                from ebpf_mig.report import json

                return json.render(self.breakdown)
            case "csv":
                from ebpf_mig.report import csv

                return csv.render(self.breakdown)
            case "html":
                from ebpf_mig.analysis import lanes
                from ebpf_mig.report import html

                return html.render(self.breakdown, lanes.view(self._analysis))
            case "svg":
                from ebpf_mig.analysis import lanes
                from ebpf_mig.report import svg

                return svg.render(self.breakdown, lanes.view(self._analysis))
            case "markdown":
                from ebpf_mig.report import markdown

                return markdown.render(self.breakdown)
            case "folded":
                from ebpf_mig.analysis import stacks
                from ebpf_mig.report import folded

                return folded.render(stacks.observe(self._analysis))
            case "speedscope":
                from ebpf_mig.analysis import stacks
                from ebpf_mig.report import speedscope

                return speedscope.render(stacks.observe(self._analysis), headline(self.breakdown))
        raise UsageError(f"there is no report {form!r}", f"choose one of {', '.join(FORMS)}")

    def __repr__(self) -> str:
        m = self.breakdown.migration
        return f"<Run: {headline(self.breakdown)}; {m.result}, {m.mode}, {self.breakdown.completeness.verdict}>"

    def _repr_html_(self) -> str:
        """The blackout and the waterfall, for notebooks."""
        from ebpf_mig.report.html import summary

        return summary(self.breakdown)


def load(source: Source) -> Run:
    """Reads and analyses a recording of one host, or a joined one. RecordingError if the source is not a recording.

    `source`: a path, the bytes themselves, or an open binary stream. A recording that was cut off is read up to the
    cut; `run.breakdown.completeness` reports it.
    """
    return Run(read_recording(source))


def join(
    source: Source,
    destination: Source,
    *,
    clock_ahead_ns: int | None = None,
    clock_doubt_ns: int = 0,
    pid: int | None = None,
) -> Run:
    """Joins the recordings of a migration's two hosts, in any order, as `ebpf-mig join` does.

    `clock_ahead_ns`: how far the destination's wall clock is ahead of the source's, from PTP or chrony.
    `clock_doubt_ns`: the error bound of that. `pid` selects one of several migrations. JoinError (a RecordingError) if
    they do not belong together.
    """
    from ebpf_mig.joining.merge import Hint, joined

    hint = None if clock_ahead_ns is None else Hint(clock_ahead_ns, clock_doubt_ns)
    names = _name(source, "the first recording"), _name(destination, "the second recording")
    return Run(joined(read_recording(source), read_recording(destination), names, hint, pid))


def _name(source: Source, otherwise: str) -> str:
    return printable(str(source)) if isinstance(source, str | Path) else otherwise
