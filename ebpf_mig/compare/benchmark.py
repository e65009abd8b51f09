# SPDX-License-Identifier: Apache-2.0
"""The result of a benchmark: the breakdown of every run, as one JSON file, schema `ebpf-mig/bench/1`.

In: the breakdown of each run. Out: the file, and samples read from it: one list of durations for each figure. Runs
with losses and failed runs stay in the file and are marked. A figure that a run did not measure is not in the sample.
"""

from __future__ import annotations

import msgspec
from msgspec import field

from ebpf_mig.breakdown import OF_FILES, PHASES, Breakdown, PhaseName, Result, Struct, Verdict
from ebpf_mig.errors import UsageError

SCHEMA = "ebpf-mig/bench/1"

FETCH = "fetch"
"""fetch.kernel and fetch.user together: the final dirty-log fetch."""
FIGURES: tuple[str, ...] = ("blackout", "window", "total", FETCH, *(phase for phase, _ in PHASES))
"""The figures that can be compared, in the order of the tables."""


class Run(Struct, frozen=True, kw_only=True):
    """One migration. `breakdown` is None if there is nothing to analyse; `error` then gives the reason."""

    breakdown: Breakdown | None
    """Null: there is nothing to analyse."""
    error: str = ""
    """Why the migration did not complete; empty if it completed."""
    recording: str = ""
    """The file of the recording, seen from this file's folder; empty if it was not kept."""


class Benchmark(Struct, frozen=True, kw_only=True):
    """A result file."""

    schema: str = SCHEMA
    """Name and version of this schema."""
    scenario: str
    """The scenario's name, or `command`."""
    settings: dict[str, int | str | bool | None] = field(default_factory=dict)
    """The scenario's settings: numbers with their unit in the name (bytes, ms, per s), and switches."""
    command: list[str] = field(default_factory=list)
    """The command of each run, if the scenario is `command`."""
    host: str = ""
    """Name of the host."""
    kernel: str = ""
    """Release of the host's kernel."""
    tool: str = ""
    """Name and version of the tool that made this file."""
    warm_up: int = 0
    """Number of warm-up runs, which are not in `runs`."""
    runs: list[Run] = field(default_factory=list)
    """In the order in which they were made."""

    def sample(self, figure: str) -> list[int]:
        """The figure's value in ns in every run that measured it."""
        values = (value_of(run.breakdown, figure) for run in self.runs if run.breakdown is not None)
        return [value for value in values if value is not None]

    def failed(self) -> int:
        """Runs whose migration did not complete, or left nothing to analyse."""
        return sum(run.breakdown is None or run.breakdown.migration.result != Result.COMPLETED for run in self.runs)

    def incomplete(self) -> int:
        """Runs in which events were lost."""
        return sum(
            run.breakdown is not None and run.breakdown.completeness.verdict == Verdict.INCOMPLETE for run in self.runs
        )


def value_of(breakdown: Breakdown, figure: str) -> int | None:
    """A figure of one completed migration in ns; None if it was not measured. KeyError for an unknown figure."""
    if figure not in FIGURES:
        raise KeyError(figure)
    if breakdown.migration.result != Result.COMPLETED or breakdown.window_ns is None:
        return None
    took: dict[str, int | None] = {phase.phase: phase.duration_ns for phase in breakdown.phases}
    match figure:
        case "blackout":
            return breakdown.blackout_ns
        case "window":
            return breakdown.window_ns
        case "total":
            return breakdown.migration.total_ns
        case "fetch":
            kernel, user = took.get(PhaseName.FETCH_KERNEL), took.get(PhaseName.FETCH_USER)
            return None if kernel is None or user is None else kernel + user
        case _:
            return took.get(figure, 0 if figure in OF_FILES else None)


def encode(benchmark: Benchmark) -> str:
    """The text of the result file: one run per line, so that a version control system can show changes."""
    whole = msgspec.json.encode(msgspec.structs.replace(benchmark, runs=[])).decode("utf-8")
    runs = ",\n".join(msgspec.json.encode(run).decode("utf-8") for run in benchmark.runs)
    head, _, tail = whole.rpartition('"runs":[]')
    return f'{head}"runs":[\n{runs}\n]{tail}\n'


def decode(data: bytes, name: str) -> Benchmark:
    """Reads a result file. UsageError with `name` if it is not one."""
    try:
        benchmark = msgspec.json.decode(data, type=Benchmark)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{name} is neither a recording nor a result of ebpf-mig bench: {error}") from error
    if benchmark.schema != SCHEMA:
        raise UsageError(f"{name} has the schema {benchmark.schema!r}, not {SCHEMA}", "use a newer ebpf-mig")
    return benchmark


def of_recording(breakdown: Breakdown, name: str) -> Benchmark:
    """A single recording as a benchmark of one run, so that it can be compared."""
    host = breakdown.migration.source.host if breakdown.migration.source else ""
    return Benchmark(scenario=name, host=host, runs=[Run(breakdown=breakdown)])
