# SPDX-License-Identifier: Apache-2.0
"""The markdown report, for a comment on a merge request: the answer is visible, the rest is folded in.

In: a breakdown. Out: GitHub's markdown, made from the same rows as the text. At most 30 lines are visible; all other
rows are in `<details>`. Text from the recording is escaped, so it can neither format nor link anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from urllib.parse import quote

from ebpf_mig.breakdown import Breakdown, bounds
from ebpf_mig.report import answer, details
from ebpf_mig.report.rows import Row, ms, phase_rows
from ebpf_mig.text import printable

VISIBLE = 30
"""Most lines outside of `<details>`."""
_SPECIAL = re.compile(r"([\\`*_\[\]#|~^$])")
_ANSWER = {"mostly": "Mostly", "because": "Because", "not": "Not", "help": "Help"}


def render(b: Breakdown, picture: str = "") -> str:
    """The report with a final newline; the same breakdown gives the same bytes.

    `picture`: the file beside the report with its timeline (`svg.render`); empty if there is none.
    """
    return "\n".join(_lines(b, picture)) + "\n"


def escaped(text: str, limit: int = 1000) -> str:
    """`text` on one line, with all that markdown or HTML would interpret made harmless."""
    plain = _SPECIAL.sub(r"\\\1", printable(text, limit))
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;").replace(
        "://", ":&#47;&#47;"
    )  # fmt: skip


def _lines(b: Breakdown, picture: str) -> Iterator[str]:
    yield f"### {escaped(answer.headline(b))}"
    yield ""
    yield f"{escaped(answer.migration(b))}; {escaped(answer.verdict(b))}"
    yield ""
    yield from _answer(answer.rows(b))
    yield from _phases(b)
    if picture:
        yield f"![Timeline of the window]({quote(picture)})"
        yield ""
    rows = list(details.rows(b))
    doubts = [row for row in rows if row.label in ("incomplete", "bounded")]
    yield from (f"> {escaped(row.label)}: {escaped(row.text)}\n" for row in doubts[:1])
    yield "<details><summary>Dirty log, network, waits, cross-checks</summary>"
    yield ""
    yield "| what | how much |"
    yield "|---|---|"
    yield from _table(rows)
    yield ""
    if len(b.vcpus) > 1:
        yield "| vCPU | downtime ms | kick to stop | stop at | start at |"
        yield "|---|--:|--:|--:|--:|"
        for v in b.vcpus:
            yield f"| {v.vcpu} | {ms(v.blackout_ns)} | {ms(v.kick_ns)} | {ms(v.stop)} | {ms(v.start)} |"
        yield ""
    yield "</details>"


def _answer(rows: Iterable[Row]) -> Iterator[str]:
    """One list item for each label; its further rows follow on the same line."""
    items: list[list[str]] = []
    for row in rows:
        if row.label:
            items.append([f"- **{_ANSWER.get(row.label, row.label)}** {escaped(row.text)}"])
        elif items:
            items[-1].append(escaped(row.text))
    for first, *more in items:
        yield first + "".join(f"<br>{text}" for text in more)
    if items:
        yield ""


def _phases(b: Breakdown) -> Iterator[str]:
    if not b.window_ns:
        return
    yield "| phase | what happens | ms | share |"
    yield "|---|---|--:|--:|"
    for row in phase_rows(b):
        yield f"| {escaped(row.phase)} | {row.words} | {row.took} | {escaped(row.where)} |"
    if b.blackout_ns is not None:
        took = bounds.limited(b.blackout_ns, b.clock.bound_ns, b.clock)
        yield f"| **downtime** | | **{took}** | **100 %** |"
    yield ""


def _table(rows: Iterable[Row]) -> Iterator[str]:
    before = ""
    for row in rows:
        label = "" if row.label == before else row.label
        before = row.label or before
        yield f"| {escaped(label)} | {escaped(row.text, 2000)} |"
