# SPDX-License-Identifier: Apache-2.0
"""Many recordings as two tables: one row per migration, and one row per phase.

In: recordings with the breakdowns made of them. Out: rows, their columns, and the tables as CSV or Parquet bytes.
Columns are a public format: added, never renamed or removed. Durations are ns, `began` is UTC; what was not measured is
null. A recording that cannot be read has a row with the reason, so that a sum over the fleet cannot omit it silently.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from ebpf_mig.breakdown import Breakdown, Result
from ebpf_mig.errors import PreflightError
from ebpf_mig.recording.events import Header
from ebpf_mig.text import printable

Row = dict[str, str | int | datetime | None]

MIGRATIONS: dict[str, type] = {
    "recording": str,
    "began": datetime,
    "result": str,
    "verdict": str,
    "error": str,
    "blackout_ns": int,
    "window_ns": int,
    "total_ns": int,
    "fetch_kernel_ns": int,
    "fetch_user_ns": int,
    "final_bytes": int,
    "final_pages": int,
    "final_send_ns": int,
    "passes": int,
    "precopy_bytes": int,
    "vcpus": int,
    "dirty_log_mode": str,
    "mode": str,
    "transport": str,
    "connections": int,
    "vmm": str,
    "vmm_version": str,
    "source_host": str,
    "source_pid": int,
    "destination_host": str,
    "destination_pid": int,
    "kernel": str,
    "tool": str,
    "lost": int,
    "observer_ns": int,
    "clock_bound_ns": int,
}
"""Column: type. `recording` is the key: the file's path below the directory."""

PHASES: dict[str, type] = {
    "recording": str,
    "position": int,
    "phase": str,
    "side": str,
    "duration_ns": int,
    "spans": int,
    "begin_ns": int,
    "end_ns": int,
}
"""`position` is the phase's place in every report; begin and end are from the window's begin, null if not seen."""


def migration_row(name: str, header: Header, b: Breakdown) -> Row:
    """One recording as one row."""
    m, final = b.migration, b.dirty_log.final
    return {
        "recording": name,
        "began": _began(header),
        "result": m.result,
        "verdict": b.completeness.verdict,
        "error": None,
        "blackout_ns": b.blackout_ns,
        "window_ns": b.window_ns,
        "total_ns": m.total_ns,
        "fetch_kernel_ns": final.kernel_ns if final else None,
        "fetch_user_ns": final.user_ns if final else None,
        "final_bytes": final.bytes if final else None,
        "final_pages": final.pages if final else None,
        "final_send_ns": final.send_ns if final else None,
        "passes": len(b.dirty_log.passes) if m.source else None,
        "precopy_bytes": _together([p.bytes for p in b.dirty_log.passes]) if m.source else None,
        "vcpus": len(b.vcpus),
        "dirty_log_mode": b.dirty_log.mode,
        "mode": m.mode,
        "transport": m.transport,
        "connections": m.connections,
        "vmm": m.vmm,
        "vmm_version": m.vmm_version,
        "source_host": m.source.host if m.source else None,
        "source_pid": m.source.pid if m.source else None,
        "destination_host": m.destination.host if m.destination else None,
        "destination_pid": m.destination.pid if m.destination else None,
        "kernel": header.kernel,
        "tool": header.tool,
        "lost": None if b.completeness.lost is None else sum(b.completeness.lost.values()),
        "observer_ns": b.completeness.observer_ns,
        "clock_bound_ns": b.clock.bound_ns,
    }


def _together(known: Sequence[int | None]) -> int | None:
    """The sum; null if one of its parts is null."""
    return sum(one or 0 for one in known) if None not in known else None


def fits(rows: Iterable[Row]) -> bool:
    """Whether every figure fits 64 bits; a damaged recording can hold any number."""
    return all(-(1 << 63) <= cell < 1 << 63 for row in rows for cell in row.values() if isinstance(cell, int))


def unreadable_row(name: str, why: str) -> Row:
    """The row of a recording that could not be read."""
    return dict.fromkeys(MIGRATIONS) | {
        "recording": name,
        "result": Result.UNKNOWN,
        "verdict": "unreadable",
        "error": why,
    }


def phase_rows(name: str, b: Breakdown) -> list[Row]:
    """One row per phase, in order, also for phases that were not seen; no rows without a window."""
    if b.window_ns is None:
        return []
    return [
        {
            "recording": name,
            "position": position,
            "phase": p.phase,
            "side": p.side,
            "duration_ns": p.duration_ns,
            "spans": len(p.spans),
            "begin_ns": p.spans[0][0] if p.spans else None,
            "end_ns": p.spans[-1][1] if p.spans else None,
        }
        for position, p in enumerate(b.phases)
    ]


def _began(header: Header) -> datetime | None:
    """When tracing was armed, by the wall clock of the recording's host; None if it is missing or no valid time."""
    if header.clock is None:
        return None
    wall = header.clock.realtime_ns + header.begin_ns - header.clock.monotonic_ns
    try:
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=wall // 1000)
    except OverflowError:
        return None


def to_csv(columns: dict[str, type], rows: Iterable[Row]) -> bytes:
    """RFC 4180 with a header line, in UTF-8. A text that a spreadsheet would run as a formula gets a `'` before it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(columns)
    writer.writerows([_cell(row[name]) for name in columns] for row in rows)
    return out.getvalue().encode()


def _cell(value: str | int | datetime | None) -> str | int:
    match value:
        case None:
            return ""
        case datetime():
            return value.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        case str():
            text = printable(value, 4000)
            return f"'{text}" if text[:1] in {"=", "+", "-", "@"} else text
        case _:
            return value


def require_parquet() -> None:
    """PreflightError without pyarrow."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise PreflightError(
            f"Parquet needs pyarrow: {error}", "pip install 'ebpf-mig[parquet]', or use --format csv"
        ) from error


def to_parquet(columns: dict[str, type], rows: Sequence[Row]) -> bytes:
    """A Parquet file; pyarrow is there (`require_parquet`)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[type, Any] = {str: pa.string(), int: pa.int64(), datetime: pa.timestamp("us", tz="UTC")}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    cells = {
        name: [printable(value, 4000) if isinstance(value := row[name], str) else value for row in rows]
        for name in columns
    }
    out = io.BytesIO()
    pq.write_table(pa.table(cells, schema=schema), out)
    return out.getvalue()
