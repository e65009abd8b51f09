# SPDX-License-Identifier: Apache-2.0
"""Whether the memory that control groups allow suffices for tracing.

In: /proc. Out: a PreflightError with a remedy before anything is loaded. A group that uses up its memory gets SIGKILL
for one of its processes, or for all of them, so nobody could say later what happened.
"""

from __future__ import annotations

import os

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import cgroup, procfs

TRACING_BYTES = 128 << 20
"""`record` with LLVM 14 was killed in a group of 96 MiB and ran in one of 128."""


def require_memory() -> None:
    """PreflightError if the control groups of this process allow too little memory for tracing."""
    limit = cgroup.memory_limit(procfs.control_groups(os.getpid()))
    if limit is not None and limit < TRACING_BYTES:
        raise PreflightError(
            f"the control group of this process may use {limit >> 20} MiB of memory only, "
            f"and tracing takes {TRACING_BYTES >> 20} MiB",
            "raise its limit: memory.max, MemoryMax= or limits.memory",
        )
