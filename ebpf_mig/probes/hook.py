# SPDX-License-Identifier: Apache-2.0
"""A place in the kernel to which one of our BPF programs is attached.

In: the choices of `tiers` and `attach`. Out: a `Hook`, which the loading and the attaching process both use.
"""

from __future__ import annotations

from dataclasses import dataclass

TRACEPOINT = "tracepoint"
"""A raw tracepoint; the other ways to attach are in `linux/bpf.py`."""
TRACE_EVENT = "trace event"
"""A tracepoint through perf, as `raw_syscalls/sys_enter`; see `attach.preemptible_tracepoints`."""


@dataclass(frozen=True)
class Hook:
    """One attachment. `how` is `tracepoint` or `trace event`, or a kind of probe on the function `target`."""

    how: str
    target: str
    program: str
    signals: tuple[str, ...] = ()
    btf_id: int = 0
    module: str = ""
    """The module that the function is part of; empty if that is the kernel."""
    provoked: bool = True
    one_of: str = ""
    """Of the hooks with the same program and this name, only one must fire."""
    by_everybody: bool = False
    """Whether every process pays for it: see `hook_points.Function`."""

    @property
    def key(self) -> str:
        """The key of the loaded program; an fentry program is loaded for one function."""
        return self.program if self.how in (TRACEPOINT, TRACE_EVENT) else f"{self.program}:{self.target}"
