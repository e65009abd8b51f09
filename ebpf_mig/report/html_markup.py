# SPDX-License-Identifier: Apache-2.0
"""What the HTML report's tables are made of: escaped text, figures, cells, and the table itself.

In: text from the recording, figures, rows of cells. Out: HTML. Durations in ms with three decimals; a dash if not
measured.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from ebpf_mig.report.terms import term
from ebpf_mig.text import printable

_MANY = 40
"""Rows that a table shows without being opened."""
_WIDE = 7
"""Columns that fit on a tablet."""


def escaped(text: str, limit: int = 400) -> str:
    """Text from the recording, escaped for HTML, also inside quotes."""
    return html.escape(printable(text, limit))


def milliseconds(ns: float | None) -> str:
    """`12.345`, or a dash."""
    return "-" if ns is None else f"{ns / 1e6:.3f}"


def size(count: int | None) -> str:
    """Bytes in the largest binary unit that keeps them at 1 or above."""
    if count is None:
        return "-"
    power = min(max(count.bit_length() - 1, 0) // 10, 4)
    return f"{count} B" if power == 0 else f"{count / (1 << 10 * power):.1f} {'KMGT'[power - 1]}iB"


def limits_of_tcp(info: dict[str, int] | None) -> str:
    """What limited TCP, in whole ms because TCP counts in jiffies."""
    if not info:
        return "-"
    busy, rwnd, sndbuf = (info.get(name, 0) // 1000 for name in ("busy_us", "rwnd_limited_us", "sndbuf_limited_us"))
    bounds = f" (± {info.get('resolution_us', 0) // 1000})"
    retransmits = f", {info['retransmits']} retransmits" if info.get("retransmits") else ""
    return f"busy {busy} ms, receiver's window {rwnd}, send buffer {sndbuf}{bounds}{retransmits}"


def table(name: str, head: Sequence[str], rows: Iterable[str]) -> str:
    """A table, nothing without rows; a `#` before a column's name aligns it as numbers."""
    lines = [f"<tr>{_labelled(row, head)}</tr>\n" for row in rows]
    if not lines:
        return ""
    cells = "".join(
        f"<th class='n' scope='col'>{term(h[1:])}</th>"
        if h.startswith("#")
        else f"<th scope='col'>{term(h)}</th>"
        if h
        else "<td></td>"
        for h in head
    )
    wide = " class='wide'" if len(head) > _WIDE else ""
    whole = f"<div class='scroll'><table id='{name}'{wide}>\n<thead><tr>{cells}</tr></thead>\n"
    whole += f"<tbody>\n{''.join(lines)}</tbody></table></div>\n"
    return whole if len(lines) <= _MANY else f"<details><summary>{len(lines)} rows</summary>\n{whole}</details>\n"


def _labelled(row: str, head: Sequence[str]) -> str:
    """The cells of a row with the heads of their columns: on a narrow screen, a row is a list of them."""
    first, *cells = row.split("<td")
    labels = (html.escape(h.lstrip("#")) for h in head)
    return first + "".join(f"<td data-label='{label}'{cell}" for label, cell in zip(labels, cells, strict=False))


def count_cell(value: int | None) -> str:
    return f"<td class='n'>{'-' if value is None else value}</td>"


def ns_cell(value: int | None) -> str:
    return f"<td class='n'>{milliseconds(value)}</td>"
