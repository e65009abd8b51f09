# SPDX-License-Identifier: Apache-2.0
"""Standard streams that were closed by whoever started us (`>&-`): taken by /dev/null before anything else takes them.

In: nothing. Out: descriptors 0, 1 and 2 that are open. Else the next file or socket gets such a number, and what is
meant for a terminal is written into it. A closed stdin is empty. Writing to a closed stdout is an error; what is
written to a closed stderr is lost.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO


def reserve() -> None:
    """To be called before the first file is opened."""
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, flags)  # the lowest free number: those below are open by now
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)
    sys.stdin = sys.stdin or _stream(0, "r")
    sys.stdout = sys.stdout or _stream(1, "w")
    sys.stderr = sys.stderr or _stream(2, "w")


def _stream(fd: int, mode: str) -> TextIO:
    return open(fd, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # type: ignore[return-value]
