# SPDX-License-Identifier: Apache-2.0
"""The recordings that are kept: the last ones, within limits of number and size.

In: a header and events. Out: a file in the state directory and its name; older files of ours go.
"""

from __future__ import annotations

import contextlib
import re
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from ebpf_mig.errors import UsageError
from ebpf_mig.recording.events import AnyEvent, Header
from ebpf_mig.recording.file import RecordingWriter
from ebpf_mig.text import printable

_OURS = re.compile(r"[0-9]{8}T[0-9]{6}\.[0-9]{3}Z-[0-9]+\.rec")
"""Only files with such names are ever removed."""


class Store:
    """A directory that nobody else can write to. UsageError if it cannot be had."""

    def __init__(self, directory: str | Path, keep: int = 100, keep_bytes: int = 1 << 30) -> None:
        self.directory = Path(directory)
        self._keep = keep
        self._keep_bytes = keep_bytes
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = self.directory.stat().st_mode
        except OSError as error:
            raise UsageError(f"cannot use {printable(str(directory))} as state directory: {error.strerror}") from error
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UsageError(f"{printable(str(directory))} is writable for others", f"chmod go-w {directory}")

    def keep(self, header: Header, events: Sequence[AnyEvent], pid: int) -> Path:
        """Writes a recording and returns its file. UsageError or RecordingError if that fails."""
        now = time.time()
        for later in range(1000):
            moment = now + later / 1000
            stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(moment)) + f".{int(moment * 1000) % 1000:03}Z"
            path = self.directory / f"{stamp}-{pid}.rec"
            if not path.exists():
                break
        try:
            with RecordingWriter(path, header) as writer:
                writer.write_many(events)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self.prune()
        return path

    def prune(self) -> None:
        """Removes the oldest recordings beyond the limits; the newest always stays."""
        total = 0
        for number, path in enumerate(sorted(self._files(), reverse=True)):
            with contextlib.suppress(OSError):
                total += path.lstat().st_size
                if number and (number >= self._keep or total > self._keep_bytes):
                    path.unlink()

    def size(self) -> tuple[int, int]:
        """(recordings, bytes) held now."""
        sizes = []
        for path in self._files():
            with contextlib.suppress(OSError):
                sizes.append(path.lstat().st_size)
        return len(sizes), sum(sizes)

    def _files(self) -> list[Path]:
        return [path for path in self.directory.iterdir() if _OURS.fullmatch(path.name)]
