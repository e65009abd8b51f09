# SPDX-License-Identifier: Apache-2.0
"""Memory that outlives a process: the listener keeps its counters there, and reads them when it is started again.

In: a descriptor of memory (memfd_create(2)) that another process holds open. Out: the last bytes that were saved
completely. There are two places, and `save` overwrites the older one. A process that is killed while it writes leaves
the other one whole; a checksum tells them apart.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib

PLACE_BYTES = 1 << 20
"""The counters have fewer than 2,000 series: some 200 kB."""
_HEAD = struct.Struct("<QII")
"""Sequence number, length and CRC-32 of what follows."""


def create() -> int:
    """A descriptor of empty memory whose size is fixed."""
    fd = os.memfd_create("ebpf-mig-counters", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 2 * PLACE_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


class Checkpoint:
    """What was saved in the memory of `fd`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        found = max((self._read(place) for place in (0, 1)), key=lambda each: each[0])
        self._sequence, self.saved = found
        """`saved`: the newest complete contents; empty if there are none."""

    def _read(self, place: int) -> tuple[int, bytes]:
        data = os.pread(self._fd, PLACE_BYTES, place * PLACE_BYTES)
        sequence, length, crc = _HEAD.unpack_from(data)
        body = data[_HEAD.size : _HEAD.size + length]
        return (sequence, body) if sequence and zlib.crc32(body, sequence & 0xFFFFFFFF) == crc else (0, b"")

    def save(self, body: bytes) -> None:
        """Replaces what was saved. ValueError if it is too long."""
        if len(body) > PLACE_BYTES - _HEAD.size:
            raise ValueError(f"{len(body)} bytes of counters are more than {PLACE_BYTES - _HEAD.size}")
        self._sequence += 1
        head = _HEAD.pack(self._sequence, len(body), zlib.crc32(body, self._sequence & 0xFFFFFFFF))
        os.pwrite(self._fd, head + body, self._sequence % 2 * PLACE_BYTES)
        self.saved = body
