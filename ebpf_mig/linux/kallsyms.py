# SPDX-License-Identifier: Apache-2.0
"""Names of kernel functions by address, from /proc/kallsyms, in about a MB.

In: nothing. Out: a `Symbols`. If `kptr_restrict` is set, all addresses read as zero without CAP_SYSLOG, so no address
has a name. This module never returns addresses.
"""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import pairwise

from ebpf_mig.linux import procfs

UNKNOWN = "[unknown]"
_TEXT = frozenset({b"t", b"T", b"w", b"W"})
_BLOCK = 512
"""Names compressed together. One look-up unpacks one block."""


class Symbols:
    """A snapshot of the symbols, without modules that are loaded later. It is kept packed: the exporter holds it."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        """`lines`: as in /proc/kallsyms: address, type, name, and `[module]`."""
        addresses, starts, names = array("Q"), array("I"), bytearray()
        for line in lines:
            row = line.split(None, 3)
            if len(row) > 2 and row[1] in _TEXT and (at := int(row[0], 16)):
                addresses.append(at)
                starts.append(len(names))
                names += row[2] + b"\0"
        order: Sequence[int] = range(len(addresses))
        if any(later < at for at, later in pairwise(addresses)):  # x86 lists modules last, and has them last
            order = sorted(order, key=addresses.__getitem__)
            addresses = array("Q", (addresses[n] for n in order))
        self._addresses = addresses
        self._blocks = [
            zlib.compress(b"\0".join(_name(names, starts[n]) for n in order[at : at + _BLOCK]))
            for at in range(0, len(order), _BLOCK)
        ]
        self._block = lru_cache(16)(self._unpacked)

    def _unpacked(self, number: int) -> list[bytes]:
        return zlib.decompress(self._blocks[number]).split(b"\0")

    def name(self, address: int) -> str:
        """The function that contains an address."""
        place = bisect_right(self._addresses, address) - 1
        if place < 0:
            return UNKNOWN
        first = bisect_left(self._addresses, self._addresses[place])
        return procfs.decoded(max(self._block(n // _BLOCK)[n % _BLOCK] for n in range(first, place + 1)))

    @staticmethod
    @cache
    def of_kernel() -> Symbols:
        """The running kernel's symbols, read once per process. Takes a third of a second: not during a migration."""
        try:
            return Symbols(procfs.lines("kallsyms"))
        except OSError:
            return Symbols(())


def _name(names: bytearray, start: int) -> bytes:
    return bytes(names[start : names.index(b"\0", start)])
