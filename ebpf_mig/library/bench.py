# SPDX-License-Identifier: Apache-2.0
"""`load_bench`: the result of `ebpf-mig bench` as an object.

In: a path, bytes or a binary stream. Out: a `Bench` with a table of its runs. UsageError if it is not such a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.compare import benchmark
from ebpf_mig.compare.benchmark import FIGURES, Benchmark
from ebpf_mig.compare.diff import compare
from ebpf_mig.errors import UsageError
from ebpf_mig.library.table import Row, Table
from ebpf_mig.text import printable

_RUNS = {"run": int, "result": str, "verdict": str, "error": str, **dict.fromkeys(map("{}_ns".format, FIGURES), int)}
_DIFFERENCES = {
    "figure": str,
    "runs_before": int,
    "runs_after": int,
    "before_ns": float,
    "after_ns": float,
    "p": float,
    "effect": float,
    "noise_ns": float,
    "verdict": str,
}


class Bench:
    """The result of many runs of one scenario."""

    def __init__(self, result: Benchmark) -> None:
        self.result = result
        """The whole file, as `ebpf-mig schema bench` describes it."""

    @property
    def breakdowns(self) -> Sequence[Breakdown | None]:
        """The breakdown of each run; None if there was nothing to analyse."""
        return [run.breakdown for run in self.result.runs]

    @cached_property
    def runs(self) -> Table:
        """One row per run: how it ended, and each figure in ns."""
        return Table(_RUNS, self._rows)

    def _rows(self) -> list[Row]:
        rows: list[Row] = []
        for number, run in enumerate(self.result.runs, 1):
            b = run.breakdown
            row: Row = {"run": number, "result": None, "verdict": None, "error": run.error or None}
            if b is not None:
                row |= {"result": b.migration.result.value, "verdict": b.completeness.verdict.value}
            figures = {f"{f}_ns": benchmark.value_of(b, f) if b is not None else None for f in FIGURES}
            rows.append(row | figures)
        return rows

    def compare(self, after: Bench) -> Table:
        """Compares each figure with `after`, as `ebpf-mig diff` does: medians, p-value, effect, verdict."""
        found = compare(self.result, after.result)
        return Table(
            _DIFFERENCES,
            lambda: [
                {
                    "figure": d.figure,
                    "runs_before": d.runs[0],
                    "runs_after": d.runs[1],
                    "before_ns": d.before if d.runs[0] else None,
                    "after_ns": d.after if d.runs[1] else None,
                    "p": d.p if all(d.runs) else None,
                    "effect": d.effect if all(d.runs) else None,
                    "noise_ns": d.noise if all(d.runs) else None,
                    "verdict": d.verdict.value,
                }
                for d in found
            ],
        )

    def __repr__(self) -> str:
        return f"<Bench: {printable(self.result.scenario)}, {len(self.result.runs)} runs>"


def load_bench(source: str | Path | bytes | BinaryIO) -> Bench:
    """Reads a result of `ebpf-mig bench`. UsageError if the file is not one."""
    name = printable(str(source)) if isinstance(source, str | Path) else "the result"
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, str | Path):
        try:
            data = Path(source).read_bytes()
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error
    else:
        data = source.read()
    return Bench(benchmark.decode(data, name))
