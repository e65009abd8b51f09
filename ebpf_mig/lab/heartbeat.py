# SPDX-License-Identifier: Apache-2.0
"""The guest's serial port, with a host timestamp for each byte: a witness of which vCPU ran when, and on which side.

In: the read end of a VMM's serial output. Out: (CLOCK_MONOTONIC ns, letter) pairs, collected by a thread.
"""

from __future__ import annotations

import os
import threading

from ebpf_mig.linux import clock


class Heartbeat:
    """Collects beats until the pipe closes; `beats` grows while it runs."""

    def __init__(self, fd: int) -> None:
        self.beats: list[tuple[int, str]] = []
        self._fd = fd
        self._thread = threading.Thread(target=self._read, name="heartbeat", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with os.fdopen(self._fd, "rb", buffering=0) as pipe:
            while data := pipe.read(256):
                now = clock.monotonic_ns()
                self.beats.extend((now, chr(byte)) for byte in data)

    def letters(self) -> set[str]:
        """The vCPUs whose beats were received."""
        return {letter for _, letter in list(self.beats)}

    def join(self) -> None:
        """Waits for the last beat, after the VMM has ended."""
        self._thread.join(5)
