# SPDX-License-Identifier: Apache-2.0
"""One place in the kernel that a program of ours hangs on, and how often that program ran.

In: what `functions` and `attach` choose. Out: the same words in the process that loads and in the one that attaches.
"""

from __future__ import annotations

from dataclasses import dataclass

TRACEPOINT = "tracepoint"
"""A raw tracepoint; the other ways are named in `kernelcalls`."""


@dataclass(frozen=True)
class Hook:
    """One attachment: `how` is `tracepoint`, or a kind of probe on the function `target`."""

    how: str
    target: str
    program: str
    signals: tuple[str, ...] = ()
    btf_id: int = 0
    in_module: bool = False
    provoked: bool = True

    @property
    def key(self) -> str:
        """Names the loaded program: an fentry program is loaded for one function."""
        return self.program if self.how == TRACEPOINT else f"{self.program}:{self.target}"


def run_statistics(fd: int) -> tuple[int, int]:
    """(run time in ns, runs) of the program behind a descriptor, as the kernel tells in fdinfo."""
    with open(f"/proc/self/fdinfo/{fd}") as info:  # noqa: PTH123
        fields = dict(line.split(":", 1) for line in info if ":" in line)
    return int(fields.get("run_time_ns", "0")), int(fields.get("run_cnt", "0"))
