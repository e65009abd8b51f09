# SPDX-License-Identifier: Apache-2.0
"""The text of a prediction, printed below the report that it is based on.

In: a breakdown with a `what_if`. Out: lines of 80 columns, or HTML. ASCII except for text from the user.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ebpf_mig.breakdown import Breakdown, Change
from ebpf_mig.report import html_markup as markup
from ebpf_mig.text import printable

_LABEL, _TEXT_AT = 21, 35


def text(b: Breakdown) -> str:
    """The prediction; empty without one."""
    return "".join(f"{line}\n" for line in _lines(b))


def _lines(b: Breakdown) -> Iterator[str]:
    if b.what_if is None:
        return
    then = b.what_if.blackout_ns
    yield ""
    if then is None:
        yield "what if: no prediction"
    else:
        yield f"what if: blackout {_ms(then)} ms instead of {_ms(b.blackout_ns)} (predicted, not measured)"
    for change in b.what_if.changes:
        label = f"{printable(change.wish, _LABEL):{_LABEL}} {_change(change)}  "
        yield from textwrap.wrap(label + printable(change.why, 1000), 80, subsequent_indent=" " * _TEXT_AT)
    for assumption in b.what_if.assumptions:
        yield from textwrap.wrap(f"{'assumed':22}{assumption}", 80, subsequent_indent=" " * 22)


def _change(change: Change) -> str:
    return "          - " if change.change_ns is None else f"{change.change_ns / 1e6:+9.3f} ms"


def _ms(ns: int | None) -> str:
    return "-" if ns is None else f"{ns / 1e6:.3f}"


def html(b: Breakdown) -> Iterator[str]:
    """The same as a section's content."""
    if b.what_if is None:
        return
    then = b.what_if.blackout_ns
    yield f"<p><b>{markup.milliseconds(then)} ms</b> instead of {markup.milliseconds(b.blackout_ns)}: predicted, not "
    yield "measured.</p>\n"
    rows = [
        f"<td class='w'>{markup.escaped(c.wish)}</td><td class='n'>{markup.milliseconds(c.change_ns)}</td>"
        f"<td>{markup.escaped(c.why, 1000)}</td>"
        for c in b.what_if.changes
    ]
    yield markup.table("what-if", ("wish", "#change ms", "why"), rows)
    yield "<p>Assumed:</p>\n<ul>" + "".join(f"<li>{markup.escaped(a)}</li>" for a in b.what_if.assumptions) + "</ul>\n"
