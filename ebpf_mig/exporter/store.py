# SPDX-License-Identifier: Apache-2.0
"""Keeps the latest recordings, within limits of number and size.

In: a header and events. Out: a file in the state directory and its name. Older recordings are removed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from ebpf_mig.errors import RecordingError
from ebpf_mig.exporter.state_directory import StateDirectory
from ebpf_mig.recording.events import AnyEvent, Header
from ebpf_mig.recording.file import RecordingWriter

DIRECTORY = "/var/lib/ebpf-mig"
"""The default."""
_OURS = re.compile(r"[0-9]{8}T[0-9]{6}\.[0-9]{3}Z-[0-9]+\.rec")
"""Only files with such names are removed."""


class Store:
    """A state directory. UsageError if it cannot be used."""

    def __init__(self, directory: str | Path, keep: int = 100, keep_bytes: int = 1 << 30) -> None:
        self._directory = StateDirectory(str(directory))
        self._keep = keep
        self._keep_bytes = keep_bytes

    def keep(self, header: Header, events: Sequence[AnyEvent], pid: int) -> tuple[str, int]:
        """Writes a recording. Returns its name and a descriptor to read it. UsageError, RecordingError or OSError."""
        self._directory.check()
        name, fd = self._new(pid)
        try:
            with os.fdopen(fd, "wb") as stream, RecordingWriter(stream, header) as writer:
                writer.write_many(events)
            read_end = self._directory.open(name)
        except BaseException:
            self._directory.remove(name)
            raise
        self.prune()
        return name, read_end

    def _new(self, pid: int) -> tuple[str, int]:
        now = time.time()
        for later in range(1000):
            moment = now + later / 1000
            stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(moment)) + f".{int(moment * 1000) % 1000:03}Z"
            name = f"{stamp}-{pid}.rec"
            try:
                return name, self._directory.create(name)
            except FileExistsError:
                continue
        raise RecordingError("no file name is free for a recording")

    def prune(self) -> None:
        """Removes the oldest recordings beyond the limits. The newest always stays."""
        total = 0
        for number, (name, size) in enumerate(sorted(self._files().items(), reverse=True)):
            total += size
            if number and (number >= self._keep or total > self._keep_bytes):
                self._directory.remove(name)

    def size(self) -> tuple[int, int]:
        """(recordings, bytes) held now. UsageError if the directory is gone or cannot be trusted."""
        self._directory.check()
        sizes = self._files().values()
        return len(sizes), sum(sizes)

    def _files(self) -> dict[str, int]:
        return {name: size for name, size in self._directory.entries().items() if _OURS.fullmatch(name)}
