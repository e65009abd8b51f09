# SPDX-License-Identifier: Apache-2.0
"""Opens standard streams that the parent process closed (`>&-`), before another file can take their descriptors.

In: nothing. Out: open descriptors 0, 1 and 2. Otherwise the next file or socket would get one of these numbers, and
output for the terminal would be written into it. A closed stdin reads as empty. Writing to a closed stdout is an error;
output to a closed stderr is lost.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO


def reserve() -> None:
    """Call this before the first file is opened."""
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, flags)  # open() takes the lowest free number; the lower ones are open
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)
    sys.stdin = sys.stdin or _stream(0, "r")
    sys.stdout = sys.stdout or _stream(1, "w")
    sys.stderr = sys.stderr or _stream(2, "w")


def _stream(fd: int, mode: str) -> TextIO:
    return open(fd, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # type: ignore[return-value]
