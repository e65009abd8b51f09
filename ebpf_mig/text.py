# SPDX-License-Identifier: Apache-2.0
"""Text for people: sizes, and escaping of untrusted text.

Names of threads, VMs, hosts and files can carry terminal escapes. In: any text. Out: the same text with every character
that is not printable written as `\\x1b` and the like. In: bytes. Out: `1.4 MiB`. In: ns. Out: `1.234`.
"""

from __future__ import annotations

LIMIT = 200


def printable(text: str, limit: int = LIMIT) -> str:
    """`text` with control, format, surrogate and unassigned characters escaped, cut to `limit` characters.

    Removes everything that a terminal would act on, and bidirectional overrides and line separators.
    """
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def size(count: int) -> str:
    """`count` in the largest binary unit that keeps it at 1 or above."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, 4)
    return f"{count / (1 << 10 * power):.1f} {'KMGT'[power - 1]}iB"


def ms(ns: int | None) -> str:
    """Milliseconds with three decimals; a dash for None."""
    return "-" if ns is None else f"{ns / 1e6:.3f}"
