# SPDX-License-Identifier: Apache-2.0
"""What a text report may use of the terminal it goes to. In: nothing. Out: an immutable description."""

from __future__ import annotations

from typing import NamedTuple, Self

MIN_WIDTH, MAX_WIDTH = 60, 100
"""Below, a table breaks apart; above, the eye loses the row."""


class Canvas(NamedTuple):
    """Where a report is drawn."""

    width: int = 80
    colour: bool = False
    unicode: bool = True

    def bounded(self) -> Self:
        """The same with a width that reports can be laid out in."""
        return self._replace(width=min(max(self.width, MIN_WIDTH), MAX_WIDTH))


PLAIN = Canvas()
"""80 columns without colour: what a file or a pipe gets."""
