# SPDX-License-Identifier: Apache-2.0
"""The CSV report: one line per phase, for spreadsheets and shell scripts.

In: a breakdown. Out: RFC 4180 text with a header line; durations in ns; the phase's first begin and last end from the
window's begin, empty if the phase was not seen. `share` is of the window, `downtime_share` of the downtime. Cells hold
only numbers and our own names, never text from the recording.
"""

from __future__ import annotations

import csv
import io

from ebpf_mig.breakdown import Breakdown, Side, Span
from ebpf_mig.report.rows import cut

COLUMNS = ("phase", "side", "duration_ns", "share", "spans", "begin_ns", "end_ns", "verdict", "downtime_share")


def render(breakdown: Breakdown) -> str:
    """Every phase in order, then the blackout and the window with `both` as their side, if they were measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    window, verdict = breakdown.window_ns, breakdown.completeness.verdict
    rows: list[tuple[str, Side, int | None, list[Span]]] = [
        (p.phase, p.side, p.duration_ns, p.spans) for p in breakdown.phases
    ]
    if breakdown.blackout is not None and breakdown.blackout_ns is not None:
        rows.append(("blackout", Side.BOTH, breakdown.blackout_ns, [breakdown.blackout]))
    if window is not None:
        rows.append(("window", Side.BOTH, window, [(0, window)]))
    for name, side, duration, spans in rows:
        share = f"{duration / window:.6f}" if window and duration is not None else ""
        inside = sum(end - begin for begin, end in cut(spans, breakdown.blackout)) if breakdown.blackout else 0
        dark = breakdown.blackout_ns
        of_downtime = f"{inside / dark:.6f}" if dark and duration is not None else ""
        ends = (spans[0][0], spans[-1][1]) if spans else ("", "")
        known = "" if duration is None else duration
        writer.writerow([name, side, known, share, len(spans), *ends, verdict, of_downtime])
    return out.getvalue()
