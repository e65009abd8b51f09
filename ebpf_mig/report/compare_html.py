# SPDX-License-Identifier: Apache-2.0
"""`bench` and `diff` as an HTML page: the rows of the text, and each figure's distribution over the runs.

In: a `Sheet`. Out: a page that loads nothing. A distribution is a dot for each run, and a line at the median; A is
above B. All values are in a table, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from ebpf_mig.report import html_frame as frame
from ebpf_mig.report.compare_rows import Line, Sheet
from ebpf_mig.report.html_markup import escaped, table
from ebpf_mig.report.terms import term
from ebpf_mig.text import ms

_WIDTH, _ROW, _RADIUS = 400, 12, 3.5
_SIDES = (("source", "A"), ("destination", "B"))


def render(sheet: Sheet) -> str:
    """The page; the same sheet gives the same bytes."""
    return "".join(frame.page(sheet.headline, list(_body(sheet))))


def _body(sheet: Sheet) -> Iterator[str]:
    yield from (f"<p class='soft'>{escaped(line, 1000)}</p>\n" for line in sheet.about)
    if sheet.headline.lower() != "; ".join(sheet.results).lower():
        yield from (f"<p>{escaped(line)}</p>\n" for line in sheet.results)
    gate = [
        f"<td class='{'incomplete' if one.outcome == 'FAIL' else 'w'}'>{one.outcome}</td>"
        f"<td>{escaped(one.condition)}</td><td>{escaped(one.why, 1000)}</td>"
        for one in sheet.gate
    ]
    yield from frame.section("Gate", table("gate", ("gate", "fails if", "what was found"), gate))
    pair = bool(sheet.about)
    rows = [_row(sheet, line, pair) for line in sheet.lines]
    drawn = any(line.samples for line in sheet.lines)
    figures = table("figures", (*sheet.head, "distribution") if drawn else sheet.head, rows)
    if drawn and pair:
        figures += "<p class='soft'>Each dot is a run: A above, B below. The line is the median.</p>\n"
    elif drawn:
        figures += "<p class='soft'>Each dot is a run. The line is the median.</p>\n"
    yield from frame.section("Figures", figures)
    yield from frame.section("Notes", "".join(f"<p>{escaped(note, 1000)}</p>\n" for note in sheet.notes))
    yield from frame.section("Runs", "".join(_runs(sheet, pair)))


def _row(sheet: Sheet, line: Line, pair: bool) -> str:
    numbers = [name.startswith("#") for name in sheet.head]
    first, *more = line.cells
    shown = f"<td class='w'>{f'<b>{term(first)}</b>' if line.clear else term(first)}</td>"
    for cell, number in zip(more, numbers[1:], strict=True):
        shown += f"<td class='n'>{escaped(cell)}</td>" if number else f"<td>{escaped(cell)}</td>"
    return f"{shown}<td class='bars'>{_distribution(line, pair)}</td>" if line.samples else shown


def _distribution(line: Line, pair: bool) -> str:
    """The runs of each side as dots from the smallest value to the largest of all."""
    values = [value for side in line.samples for value in side]
    if not values:
        return ""
    least, span = min(values), max(max(values) - min(values), 1)
    height = _ROW * len(line.samples)

    def x(value: float) -> float:
        return _RADIUS + (_WIDTH - 2 * _RADIUS) * (value - least) / span

    about = "; ".join(
        f"{f'{letter}: ' if pair else ''}{ms(min(side))} to {ms(max(side))} ms"
        for side, (_, letter) in zip(line.samples, _SIDES, strict=False)
        if side
    )
    drawn = f"<svg class='dots' viewBox='0 0 {_WIDTH} {height}' role='img' aria-label='{about}'><title>{about}</title>"
    for at, (side, (name, _)) in enumerate(zip(line.samples, _SIDES, strict=False)):
        middle = _ROW * at + _ROW / 2
        drawn += "".join(
            f"<circle class='{name}' cx='{x(v):.1f}' cy='{middle}' r='{_RADIUS}'/>" for v in sorted(set(side))
        )
        if side:
            drawn += f"<path class='error' d='M{x(median(side)):.1f} {_ROW * at}v{_ROW}'/>"
    return f"{drawn}</svg>"


def _runs(sheet: Sheet, pair: bool) -> Iterator[str]:
    """All values, in order of size: a figure that a run did not measure has fewer."""
    rows = [
        f"<td class='w'>{escaped(line.cells[0])}</td>{f'<td>{letter}</td>' if pair else ''}<td>{_listed(side)}</td>"
        for line in sheet.lines
        for side, (_, letter) in zip(line.samples, _SIDES, strict=False)
    ]
    head = ("figure", "side of the comparison", "ms, in order") if pair else ("figure", "ms, in order")
    if rows:
        yield f"<details><summary>All values</summary>\n{table('values', head, rows)}</details>\n"


def _listed(side: Sequence[int]) -> str:
    return ", ".join(ms(value) for value in sorted(side)) or "-"
