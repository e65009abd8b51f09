# SPDX-License-Identifier: Apache-2.0
"""Names of kernel functions by address, from /proc/kallsyms, in a few MB.

In: nothing. Out: a `Symbols`. Addresses are zeros without CAP_SYSLOG where `kptr_restrict` is set: then no address has
a name. Addresses themselves never leave this module.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable
from functools import cache
from pathlib import Path

UNKNOWN = "[unknown]"
_TEXT = frozenset("tTwW")


class Symbols:
    """A snapshot; modules that are loaded later are not in it."""

    def __init__(self, lines: Iterable[str]) -> None:
        """Lines as in /proc/kallsyms: address, type, name, and `[module]`."""
        rows = []
        for line in lines:
            address, kind, name, *_ = line.split(None, 3)
            if kind in _TEXT and (at := int(address, 16)):
                rows.append((at, name))
        rows.sort()
        self._addresses = array("Q", (at for at, _ in rows))
        self._starts = array("I")
        names = bytearray()
        for _, name in rows:
            self._starts.append(len(names))
            names += name.encode() + b"\0"
        self._names = bytes(names)

    def name(self, address: int) -> str:
        """The function that an address lies in."""
        place = bisect_right(self._addresses, address) - 1
        if place < 0:
            return UNKNOWN
        start = self._starts[place]
        return self._names[start : self._names.index(b"\0", start)].decode()

    @staticmethod
    @cache
    def of_kernel() -> Symbols:
        """Of the running kernel, read once a process. Takes a third of a second: not while anybody migrates."""
        try:
            with Path("/proc/kallsyms").open() as lines:
                return Symbols(lines)
        except OSError:
            return Symbols(())
