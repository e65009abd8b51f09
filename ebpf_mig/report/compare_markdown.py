# SPDX-License-Identifier: Apache-2.0
"""`bench` and `diff` as markdown, for a comment on a merge request: the outcome is visible, the rest is folded in.

In: a `Sheet`. Out: GitHub's markdown, made from the same rows as the text. At most 30 lines are visible; all other rows
are in `<details>`. Rows that say that there is a difference begin in bold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ebpf_mig.report.compare_rows import Gate, Line, Sheet
from ebpf_mig.report.markdown import VISIBLE, escaped

_MOST_CONDITIONS, _MOST_NOTES = 6, 3
"""Rows that are visible; all others are folded in."""


def render(sheet: Sheet) -> str:
    """The comment with a final newline; the same sheet gives the same bytes."""
    gate = sorted(sheet.gate, key=lambda one: ("FAIL", "cannot tell", "pass").index(one.outcome))
    seen, folded = [*_top(sheet, gate[:_MOST_CONDITIONS])], [*_gate(gate[_MOST_CONDITIONS:])]
    notes = [f"> {escaped(note)}" for note in sheet.notes[:_MOST_NOTES]]
    after = [line for note in notes for line in (note, "")]
    room = VISIBLE - len(seen) - len(after) - 3
    if len(sheet.lines) <= room:
        seen += _table(sheet.head, sheet.lines)
    else:
        seen += _table(sheet.head, _first(sheet.lines, room))
        folded += _table(sheet.head, sheet.lines)
    folded += [line for note in sheet.notes[_MOST_NOTES:] for line in (escaped(note), "")]
    details = ["<details><summary>All rows</summary>", "", *folded, "</details>"] if folded else []
    return "\n".join([*seen, *after, *details]).rstrip("\n") + "\n"


def _top(sheet: Sheet, gate: Sequence[Gate]) -> Iterator[str]:
    yield f"### {escaped(sheet.headline)}"
    yield ""
    if sheet.results and sheet.headline.lower() != "; ".join(sheet.results).lower():
        yield escaped("; ".join(sheet.results))
        yield ""
    yield from _gate(gate)
    if sheet.about:
        yield from (f"- {escaped(line)}" for line in sheet.about)
        yield ""


def _gate(gate: Sequence[Gate]) -> Iterator[str]:
    rows = [Line((one.outcome, one.condition, one.why), main=True, clear=one.outcome == "FAIL") for one in gate]
    return _table(("gate", "fails if", "what was found"), rows)


def _first(lines: Sequence[Line], most: int) -> list[Line]:
    """The main rows, as many as there is room for: first those that say something."""
    wanted = sorted((line for line in lines if line.main), key=lambda line: not line.clear)[:most]
    return [line for line in lines if line in wanted]


def _table(head: Sequence[str], lines: Sequence[Line]) -> Iterator[str]:
    if not lines:
        return
    yield f"| {' | '.join(name.lstrip('#') for name in head)} |"
    yield f"|{'|'.join('--:' if name.startswith('#') else '---' for name in head)}|"
    for line in lines:
        first, *more = map(escaped, line.cells)
        yield f"| {' | '.join([f'**{first}**' if line.clear else first, *more])} |"
    yield ""
