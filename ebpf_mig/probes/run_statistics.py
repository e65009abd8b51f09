# SPDX-License-Identifier: Apache-2.0
"""How often the kernel ran our BPF programs, and how long that took.

In: descriptors of loaded programs. Out: figures of the kernel's own, counted while a `BpfStatistics` is open.
"""

from __future__ import annotations

import contextlib
import os

from ebpf_mig.linux import bpf, procfs


def run_statistics(fd: int) -> tuple[int, int, int]:
    """(run time in ns, runs, recursion misses) of the program behind a descriptor, from the kernel's fdinfo.

    A recursion miss: the kernel runs no fentry or raw tracepoint program twice at once on a CPU, and no kprobe's amid
    another's or amid a bpf(2) call on a map; a preemptible kernel can get there. Counted since Linux 5.12
    (bpf_prog_show_fdinfo), of kprobes since 6.7 (trace_call_bpf).
    """
    rows = (line.partition(":") for line in procfs.text("self", "fdinfo", fd).splitlines())
    fields = {name: value for name, _, value in rows}
    time_ns, runs, missed = (int(fields.get(name, "0")) for name in ("run_time_ns", "run_cnt", "recursion_misses"))
    return time_ns, runs, missed


class BpfStatistics:
    """Has the kernel count run time of BPF programs while open (bpf(2) BPF_ENABLE_STATS, since Linux 5.8).

    Tied to a file descriptor, so nothing is left switched on when we die. `enabled` is False where refused.
    """

    def __init__(self) -> None:
        self._fd = -1
        self.open()

    @property
    def enabled(self) -> bool:
        """Whether the kernel counts for us."""
        return self._fd >= 0

    def open(self) -> None:
        """Starts the counting; idempotent."""
        if self.enabled:
            return
        with contextlib.suppress(OSError):
            self._fd = bpf.count_run_time()

    def close(self) -> None:
        """Stops the counting; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
