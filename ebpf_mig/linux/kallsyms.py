# SPDX-License-Identifier: Apache-2.0
"""Names of kernel functions by address, from /proc/kallsyms, in a few MB.

In: nothing. Out: a `Symbols`. If `kptr_restrict` is set, all addresses read as zero without CAP_SYSLOG, so no address
has a name. This module never returns addresses.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable
from functools import cache

from ebpf_mig.linux import procfs

UNKNOWN = "[unknown]"
_TEXT = frozenset({b"t", b"T", b"w", b"W"})


class Symbols:
    """A snapshot of the symbols, without modules that are loaded later."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        """`lines`: as in /proc/kallsyms: address, type, name, and `[module]`."""
        rows = []
        for line in lines:
            row = line.split(None, 3)
            if len(row) > 2 and row[1] in _TEXT and (at := int(row[0], 16)):
                rows.append((at, row[2]))
        rows.sort()
        self._addresses = array("Q", (at for at, _ in rows))
        self._starts = array("I")
        names = bytearray()
        for _, name in rows:
            self._starts.append(len(names))
            names += name + b"\0"
        self._names = bytes(names)

    def name(self, address: int) -> str:
        """The function that contains an address."""
        place = bisect_right(self._addresses, address) - 1
        if place < 0:
            return UNKNOWN
        start = self._starts[place]
        return procfs.decoded(self._names[start : self._names.index(b"\0", start)])

    @staticmethod
    @cache
    def of_kernel() -> Symbols:
        """The running kernel's symbols, read once per process. Takes a third of a second: not during a migration."""
        try:
            return Symbols(procfs.lines("kallsyms"))
        except OSError:
            return Symbols(())
