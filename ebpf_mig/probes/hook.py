# SPDX-License-Identifier: Apache-2.0
"""One place in the kernel that a program of ours hangs on, and how often that program ran.

In: what `functions` and `attach` choose. Out: the same words in the process that loads and in the one that attaches.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebpf_mig.linux import procfs

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
    one_of: str = ""
    """Of hooks with the same program and this name, one that fires is enough."""

    @property
    def key(self) -> str:
        """Names the loaded program: an fentry program is loaded for one function."""
        return self.program if self.how == TRACEPOINT else f"{self.program}:{self.target}"


def run_statistics(fd: int) -> tuple[int, int, int]:
    """(run time in ns, runs, recursion misses) of the program behind a descriptor, as the kernel tells in fdinfo.

    A recursion miss: the kernel runs no fentry or raw tracepoint program twice at once on a CPU, and no kprobe's amid
    another's or amid a bpf(2) call on a map; a preemptible kernel can get there. Told since Linux 5.12
    (bpf_prog_show_fdinfo), of kprobes since 6.7 (trace_call_bpf).
    """
    rows = (line.partition(":") for line in procfs.text("self", "fdinfo", fd).splitlines())
    fields = {name: value for name, _, value in rows}
    time_ns, runs, missed = (int(fields.get(name, "0")) for name in ("run_time_ns", "run_cnt", "recursion_misses"))
    return time_ns, runs, missed
