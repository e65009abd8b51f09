# SPDX-License-Identifier: Apache-2.0
"""Run counts and run time of our BPF programs.

In: descriptors of loaded programs. Out: the kernel's own figures, which it counts while a `BpfStatistics` is open.
"""

from __future__ import annotations

import contextlib
import os

from ebpf_mig.linux import bpf


def run_statistics(fd: int) -> tuple[int, int, int]:
    """(run time in ns, runs, recursion misses) of the program behind a descriptor.

    Recursion misses are skipped runs. The kernel does not run an fentry or raw tracepoint program twice at once on a
    CPU. It does not run a kprobe program during another one or during a bpf(2) call on a map. Both can happen on a
    preemptible kernel. Counted since Linux 5.12 (bpf_prog_get_info_by_fd), for kprobes since 6.7 (trace_call_bpf).
    """
    return bpf.run_time(fd)


class BpfStatistics:
    """Makes the kernel count the run time of BPF programs while it is open (bpf(2) BPF_ENABLE_STATS, since Linux 5.8).

    The setting is tied to a file descriptor, so it ends with this process. `enabled` is False if the kernel refused it.
    """

    def __init__(self) -> None:
        self._fd = -1
        self.open()

    @property
    def enabled(self) -> bool:
        """Whether the kernel counts."""
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
