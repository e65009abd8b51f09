# SPDX-License-Identifier: Apache-2.0
"""The bars of the waterfall: spans of a window drawn with block characters, to an eighth of a column.

In: spans in ns from the window's begin, the window's length, a width in columns. Out: strings of that width.
"""

from __future__ import annotations

from collections.abc import Sequence

from ebpf_mig.breakdown import Span

_LEFT = " ▏▎▍▌▋▊▉█"
"""A column filled from its left, by eighths. There is no such set from the right, only ▕ and ▐."""


def bar(spans: Sequence[Span], window_ns: int, width: int, *, unicode: bool = True) -> str:
    """`spans` at their place in the window. A span however short leaves a mark."""
    eighths = width * 8
    drawn = 0
    for begin, end in spans:
        first = min(max(begin, 0) * eighths // window_ns, eighths - 1)
        after = min(max(-(-end * eighths // window_ns), first + 1), eighths)
        drawn |= ((1 << (after - first)) - 1) << first
    columns = ((drawn >> (8 * at)) & 0xFF for at in range(width))
    return "".join(map(_block if unicode else _ascii, columns))


def ruler(span: Span, window_ns: int, width: int, label: str, *, unicode: bool = True) -> str:
    """A dimension line over `span`, with `label` in its middle if that fits."""
    begin = min(max(span[0], 0) * width // window_ns, width - 1)
    end = min(max(-(-span[1] * width // window_ns), begin + 1), width)
    left, line, right = "├─┤" if unicode else "|-|"
    inside = end - begin - 2
    if inside < 0:
        drawn = "│" if unicode else "|"
    elif inside >= len(label) + 4:
        drawn = left + f" {label} ".center(inside, line) + right
    else:
        drawn = left + line * inside + right
    return (" " * begin + drawn).ljust(width)


def _block(eighths: int) -> str:
    """The block character nearest to a column's eighths, the leftmost in bit 0."""
    count = eighths.bit_count()
    if eighths & 1 or not eighths:
        return _LEFT[count]
    if eighths & 0x80:
        return "▐" if count >= 4 else "▕"
    late = eighths >= 1 << 4 and not eighths & 0x0F
    if count >= 4:
        return "▐" if late else "▌"
    return "▕" if late else "▏"


def _ascii(eighths: int) -> str:
    count = eighths.bit_count()
    return "#" if count >= 4 else ":" if count else " "
