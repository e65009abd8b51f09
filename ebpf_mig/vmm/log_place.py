# SPDX-License-Identifier: Apache-2.0
"""The part of a VMM's log that one migration wrote.

In: a log file on either host, and its length before the migration, since one log may cover many. Out: its new lines. A
VMM subclasses `LogPlace` and reads its figures from them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ebpf_mig.vmm.base import RemoteEnd

LOG_MOST_BYTES = 1 << 24
"""Bytes read from the log's end. A VMM may log a line for each dirty range."""
MOST_THERE_BYTES = 1 << 20
"""Bytes read from the log of a VMM on another host."""


@dataclass(frozen=True)
class LogPlace:
    """A log file, and how long it was when the migration began."""

    path: str
    offset: int
    there: RemoteEnd | None = None
    """The host of the file; None: this one."""

    @classmethod
    def now(cls, path: str, there: RemoteEnd | None = None) -> Self:
        """The file's present end; 0 if the file does not exist yet."""
        if there is not None:
            return cls(path, _size_there(there, path), there)
        try:
            return cls(path, Path(path).stat().st_size)
        except OSError:
            return cls(path, 0)

    def lines(self) -> list[str]:
        """The text written since then; empty if the log cannot be read."""
        if self.there is not None:
            end = _size_there(self.there, self.path)
            since = end - self.offset if self.offset <= end else end
            return self.there.output("tail", "-c", str(min(since, MOST_THERE_BYTES)), self.path).splitlines()
        try:
            with Path(self.path).open("rb") as file:
                end = file.seek(0, 2)
                begin = self.offset if self.offset <= end else 0
                file.seek(max(begin, end - LOG_MOST_BYTES))
                return file.read(LOG_MOST_BYTES).decode(errors="replace").splitlines()
        except OSError:
            return []


def _size_there(there: RemoteEnd, path: str) -> int:
    size = there.output("wc", "-c", path).split()
    return int(size[0]) if size and re.fullmatch(r"\d{1,18}", size[0], re.ASCII) else 0
