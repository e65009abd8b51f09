# SPDX-License-Identifier: Apache-2.0
"""Gives memory back that only compiling needed: the compiler's pages of code and its freed heap.

In: nothing. Out: a smaller resident set; what is needed again is read again from the page cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

_MADV_DONTNEED = 4
_COMPILER = re.compile(r"/lib(?:LLVM|clang|bcc)[^/]*$")
_LINE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (....) \S+ \S+ \S+ *(.*)$")


def give_back() -> None:
    """Does what it can; failing is harmless."""
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # glibc only
        libc.malloc_trim(0)
    with contextlib.suppress(OSError):
        for begin, end in _clean_mappings(Path("/proc/self/smaps").read_text()):
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _clean_mappings(smaps: str) -> list[tuple[int, int]]:
    """The compiler's read-only mappings of which no page was ever written: dropping them loses nothing."""
    found: list[tuple[int, int]] = []
    current: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if match := _LINE.match(line):
            ours = "w" not in match[3] and _COMPILER.search(match[4])
            current = (int(match[1], 16), int(match[2], 16)) if ours else None
        elif current and line.startswith("Anonymous:") and line.split()[1] == "0":
            found.append(current)
    return found
