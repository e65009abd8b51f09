# SPDX-License-Identifier: Apache-2.0
"""Shows on stderr how a migration goes: a line that is redrawn at a terminal, a line from time to time elsewhere.

In: events as they arrive. Out: text. While the guest is stopped nothing is printed, and no error here ends the tracing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType

import click

from ebpf_mig.recording.events import AnyEvent
from ebpf_mig.tracing.lifecycle import MigrationWatch
from ebpf_mig.tracing.progress import Progress

_REDRAW_S, _LINES_S = 0.1, 2.0
"""Shortest time between two pictures: at a terminal, and of plain lines."""


class LiveLine:
    """Use it as a context manager around the tracing; on its way out it clears the line."""

    def __init__(self, watch: MigrationWatch, *, plain: bool = True, shared: bool = False) -> None:
        """`plain`: also print where stderr is no terminal. `shared`: another process writes to the same terminal."""
        self.watch = watch
        self._progress = Progress(watch, os.sysconf("SC_PAGESIZE"))
        self._terminal = sys.stderr.isatty() and not shared
        self._silent = not (self._terminal or plain)
        self._next = time.monotonic() + (0 if self._terminal else _LINES_S)
        self._drawn = False

    def __enter__(self) -> LiveLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn:
            self._drawn = False
            self._print("\r\x1b[K")

    def show(self, events: Sequence[AnyEvent]) -> None:
        """Takes the next events, which the `MigrationWatch` has seen, and prints if it is time."""
        if self._silent:
            return
        self._progress.saw(events)
        now = time.monotonic()
        if now < self._next or self._progress.quiet:
            return
        text = self._progress.line(self._width()) if self._terminal else self._progress.line()
        if not text:
            return
        if self._terminal:
            self._next, self._drawn = now + _REDRAW_S, True
            self._print(f"\r\x1b[K{text}")
        else:
            self._next = now + _LINES_S
            self._print(f"{text}\n")

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            click.echo(text, err=True, nl=False)

    @staticmethod
    def _width() -> int:
        try:
            return max(20, (os.get_terminal_size(2).columns or 80) - 1)
        except OSError:
            return 79
