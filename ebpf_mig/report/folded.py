# SPDX-License-Identifier: Apache-2.0
"""The stacks of the window as folded lines, the input of flamegraph.pl, inferno and others.

In: rows of `analysis.stacks`. Out: a line for each, with the frames from the outermost on, and ns:

    off-CPU;source;quiesce;qemu-system-x86 20372;entry_SYSCALL_64_after_hwframe;...;schedule 1234567
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ebpf_mig.analysis.stacks import Stack
from ebpf_mig.text import printable

_BETWEEN = ";"


def render(stacks: Sequence[Stack]) -> str:
    """The lines in a fixed order, with a final newline; empty without rows."""
    return "".join(f"{_BETWEEN.join(map(_frame, path(row)))} {row.duration_ns}\n" for row in stacks if row.duration_ns)


def path(row: Stack) -> Iterable[str]:
    """The frames of a row from the outermost on. The first four say what was measured, and where."""
    return row.kind, row.side, row.phase, row.thread, *reversed(row.frames)


def _frame(name: str) -> str:
    """A name that cannot be taken for two frames, or for none."""
    return printable(name).replace(_BETWEEN, ":").strip() or "?"
