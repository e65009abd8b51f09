# SPDX-License-Identifier: Apache-2.0
"""The tables of `bench` and `diff`, 80 columns, ASCII except for names that users chose.

In: a `Sheet`. Out: text with a final newline.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ebpf_mig.report.compare_rows import Sheet

_WIDTH = 80


def render(sheet: Sheet) -> str:
    """What was measured, the figures, what is missing or doubtful, what follows, the gate."""
    notes = [line for note in sheet.notes for line in textwrap.wrap(note, _WIDTH, subsequent_indent="  ")]
    gate = [f"{one.outcome}  {one.condition}: {one.why}" for one in sheet.gate]
    after = ["", *sheet.results, *gate] if sheet.results or gate else []
    return "\n".join([*(sheet.about or [sheet.headline]), "", *_table(sheet), *notes, *after]) + "\n"


def _table(sheet: Sheet) -> Iterator[str]:
    """Columns as wide as what is in them, numbers to the right; nothing without rows."""
    if not sheet.lines:
        return
    numbers = [name.startswith("#") for name in sheet.head]
    rows = [tuple(name.lstrip("#") for name in sheet.head), *(line.cells for line in sheet.lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    between = "  " if sum(widths) + 2 * (len(widths) - 1) <= _WIDTH else " "
    for row in rows:
        cells = (
            f"{cell:>{width}}" if number else f"{cell:{width}}"
            for cell, width, number in zip(row, widths, numbers, strict=True)
        )
        yield between.join(cells).rstrip()
