# SPDX-License-Identifier: Apache-2.0
"""Lines of the terminal report: a label, a duration and details.

In: names, ns, bytes. Out: `Row`s; text.py puts them on the screen.
"""

from __future__ import annotations

from typing import NamedTuple

from rich.text import Text

from ebpf_mig.breakdown import PairedBy, Pairing
from ebpf_mig.text import ms, printable, size

__all__ = ["Row", "figure", "ms", "paired", "remark"]

_LABEL = 21
_TEXT_AT = 23
_FIGURE_TEXT_AT = 35


class Row(NamedTuple):
    """A line of the report; text that does not fit continues on the next line, indented."""

    text: Text
    indent: int = 2
    spare: int = 0
    """0: never left out. If the screen is too small, rows with the highest value are left out first."""


def figure(label: str, ns: int, text: str, style: str = "") -> Row:
    """A duration in the same column as those of the phases, with details."""
    name = (f"{printable(label, _LABEL):{_LABEL}}", style or "dim")
    return Row(Text.assemble(name, (f"{ms(ns):>9} ms  ", style), text), _FIGURE_TEXT_AT)


def remark(label: str, text: str, style: str = "") -> Row:
    """A label and words."""
    return Row(Text.assemble((f"{printable(label, _LABEL):{_TEXT_AT}}", style or "dim"), text), _TEXT_AT)


def paired(found: Pairing | None) -> str:
    """How the two sides were found to belong together, if no connection shows it."""
    if found is None or found.by == PairedBy.CONNECTION:
        return ""
    if found.by == PairedBy.REQUEST:
        return ", not seen to be connected"
    moved = size(found.bytes or 0)
    return f", paired by {moved} equal to the byte" if found.by == PairedBy.STREAM else f", likely: {moved} fit in time"
