# SPDX-License-Identifier: Apache-2.0
"""The terminal report: one screen that says first how long, why, and what would help.

In: a breakdown. Out: text of 80 to 100 columns, with colour if asked for. Every duration is in ms with three
decimals; shares are of the downtime. Meaning never depends on colour. All names are made printable, because they come
from the recording.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.text import Text

from ebpf_mig.breakdown import Breakdown, PhaseName, Side, Vcpu, Verdict, bounds
from ebpf_mig.report import answer, details
from ebpf_mig.report.canvas import PLAIN, Canvas
from ebpf_mig.report.rows import PhaseRow, Row, ms, phase_rows
from ebpf_mig.report.waterfall import bar, ruler

MAX_VCPUS = 4
SCREEN = 40
"""Lines of the report; if there are more, spare rows are left out."""
_BAR_AT = 56
_LABEL_AT = 13
_ANSWER_AT = 11
_SIDES = {Side.SOURCE: "cyan", Side.DESTINATION: "magenta", Side.BOTH: "blue"}
_VERDICTS = {Verdict.COMPLETE: "green", Verdict.BOUNDED: "yellow", Verdict.INCOMPLETE: "bold red"}
_UNIT = re.compile(r"(?<=\d) (?=(?:ms|%|[KMGT]iB|B)(?!\w))")
_JOINED = "\ue000"
"""Stands for a space at which no line ends. Names cannot contain it: it is not printable."""
_PLAIN = str.maketrans({"…": "...", "→": "->", "±": "+-", "≤": "<=", "≥": ">="})


def render(breakdown: Breakdown, canvas: Canvas = PLAIN, *, verbose: bool = False) -> str:
    """The report as text with a final newline. The same breakdown and canvas give the same bytes."""
    rows = [row for row in details.rows(breakdown) if verbose or not row.verbose]
    while True:
        text = printed(_lines(breakdown, canvas.bounded(), rows, verbose), canvas)
        spare = max((row.spare for row in rows), default=0)
        if verbose or not spare or text.count("\n") <= SCREEN:
            return text
        del rows[max(at for at, row in enumerate(rows) if row.spare == spare)]


def printed(lines: Iterable[tuple[Text, int]], canvas: Canvas) -> str:
    """Lines with the indent of their continuation, as text."""
    canvas = canvas.bounded()
    out = io.StringIO()
    console = Console(
        force_jupyter=False,
        file=out,
        width=canvas.width,
        force_terminal=canvas.colour,
        color_system="standard" if canvas.colour else None,
        no_color=not canvas.colour,
        legacy_windows=False,
        _environ={},
    )
    for line, indent in lines:
        for part in _folded(line, indent, canvas.width, console):
            part.rstrip()
            console.print(part, soft_wrap=True, markup=False, highlight=False, emoji=False)
    text = out.getvalue()
    return text if canvas.unicode else text.translate(_PLAIN).encode("ascii", "backslashreplace").decode()


def _folded(line: Text, indent: int, width: int, console: Console) -> Iterator[Text]:
    """The line in parts of the width. A number stays beside its unit."""
    if line.cell_len <= width:
        yield line
        return
    head, rest = line.divide([indent])
    rest.plain = _UNIT.sub(_JOINED, rest.plain)
    for at, part in enumerate(rest.wrap(console, width - indent)):
        part.plain = part.plain.replace(_JOINED, " ")
        yield Text.assemble(head if at == 0 else " " * indent, part)


def _lines(b: Breakdown, canvas: Canvas, rows: Sequence[Row], verbose: bool) -> Iterator[tuple[Text, int]]:
    """The blocks of the report with an empty line between each two."""
    blocks = (
        [*_top(b, canvas)],
        [*_answer(b)],
        [*_waterfall(b, canvas, verbose)],
        [*_vcpus(b, verbose)],
        [*_details(rows)],
    )
    for at, block in enumerate(block for block in blocks if block):
        if at:
            yield Text(), 0
        yield from block


def _top(b: Breakdown, canvas: Canvas) -> Iterator[tuple[Text, int]]:
    left, right = answer.headline(b), answer.verdict(b)
    gap = canvas.width - len(left) - len(right)
    style = _VERDICTS.get(b.completeness.verdict, "")
    if gap > 1:
        yield Text.assemble((left, "bold"), " " * gap, (right, style)), 2
    else:
        yield Text(left, "bold"), 2
        yield Text(right, style), 2
    yield Text(answer.migration(b)), 2
    ends = b.migration.source, b.migration.destination
    if None in ends or len({end.host for end in ends if end}) > 1 or answer.paired(b):
        yield Text(answer.ends(b)), 2


def _answer(b: Breakdown) -> Iterator[tuple[Text, int]]:
    rows = list(answer.rows(b))
    if rows and (option := answer.see(b)):
        rows.append(Row("see", option))
    for row in rows:
        yield Text.assemble("  ", (f"{row.label:{_ANSWER_AT - 2}}", "dim"), (row.text, row.style)), _ANSWER_AT


def _waterfall(b: Breakdown, canvas: Canvas, verbose: bool) -> Iterator[tuple[Text, int]]:
    window = b.window_ns
    if not window:
        return
    width = canvas.width - _BAR_AT
    scale = ruler(b.blackout, window, width, "downtime", unicode=canvas.unicode) if b.blackout else ""
    yield Text.assemble((f"{'phase':13}{'what happens':23}{'ms':>11}{'share':>7}  ", "dim"), (scale, "bold")), 2
    before = ""
    for row in phase_rows(b, every=verbose):
        yield _phase(row, window, width, canvas.unicode, repeated=row.phase == before), 2
        before = row.phase
    if b.blackout_ns is not None:
        took = bounds.limited(b.blackout_ns, b.clock.bound_ns, b.clock)
        yield Text(f"{'downtime':13}{'':23}{took:>11}{'100 %':>7}", "bold"), 2
    else:
        took = bounds.limited(window, b.window_bound_ns, b.clock)
        yield Text(f"{'window':13}{'':23}{took:>11}", "bold"), 2


def _phase(row: PhaseRow, window: int, width: int, unicode: bool, *, repeated: bool) -> Text:
    colour = "yellow" if row.phase == PhaseName.UNATTRIBUTED else _SIDES.get(row.side, "")
    name = "" if repeated else row.phase
    return Text.assemble(
        (f"{name:13}", "bold" if row.phase.startswith("fetch.") else ""),
        f"{row.words:23}{row.took:>11}{row.where:>7}  ",
        (bar(row.spans, window, width, unicode=unicode), colour),
    )


def _vcpus(b: Breakdown, verbose: bool) -> Iterator[tuple[Text, int]]:
    vcpus = b.vcpus
    if len(vcpus) < 2:
        return
    yield Text(f"{'vCPU':13}{'downtime ms':>15}{'kick to stop':>16}{'stop at':>13}{'start at':>13}", "dim"), 2
    slowest = sorted(vcpus, key=lambda v: (-(v.blackout_ns if v.blackout_ns is not None else 1 << 63), v.vcpu))
    shown = len(vcpus) if verbose else MAX_VCPUS
    for vcpu in slowest[:shown]:
        yield _vcpu(vcpu), 2
    if (more := len(vcpus) - shown) > 0:
        yield Text(f"... {more} more, slowest first", "dim"), 2


def _vcpu(vcpu: Vcpu) -> Text:
    own = f"{vcpu.vcpu:<13}{ms(vcpu.blackout_ns):>15}"
    return Text(f"{own}{ms(vcpu.kick_ns):>16}{ms(vcpu.stop):>13}{ms(vcpu.start):>13}")


def _details(rows: Iterable[Row]) -> Iterator[tuple[Text, int]]:
    before = ""
    for row in rows:
        label = "" if row.label == before else row.label
        before = row.label or before
        head = f"{label:{_LABEL_AT}}" if len(label) < _LABEL_AT else f"{label}  "
        yield Text.assemble((head, row.style or "dim"), (row.text, row.style)), _LABEL_AT
