# SPDX-License-Identifier: Apache-2.0
"""The terminal properties that a text report may use. In: nothing. Out: an immutable description."""

from __future__ import annotations

from typing import NamedTuple, Self

MIN_WIDTH, MAX_WIDTH = 60, 100
"""Tables do not fit into less; longer rows are hard to follow."""


class Canvas(NamedTuple):
    """Where a report is drawn."""

    width: int = 80
    colour: bool = False
    unicode: bool = True

    def bounded(self) -> Self:
        """The same canvas with its width limited to what reports support."""
        return self._replace(width=min(max(self.width, MIN_WIDTH), MAX_WIDTH))


PLAIN = Canvas()
"""80 columns without colour: the canvas of a file or a pipe."""
