# SPDX-License-Identifier: Apache-2.0
"""What the rest of the probes needs of a loaded BPF object, whoever loaded it.

In: nothing. Out: `BpfProgram`, which `loader.Program` (bcc) and `inherited.InheritedProgram` (libbpf) both are.
"""

from __future__ import annotations

from typing import Any, Protocol

from ebpf_mig.probes.hook import Hook


class BpfProgram(Protocol):
    """A loaded object: programs to attach, tables to read and write, one ring buffer to poll."""

    def attach(self, hook: Hook) -> None:
        """Attaches a loaded hook; PreflightError if the kernel refuses."""

    def detach(self, hook: Hook) -> None:
        """Detaches what `attach` attached."""

    def table(self, name: str) -> Any:
        """The map of that name, as bcc's tables are: `table[key] = leaf`, `del table[key]`, `items()`, `clear()`.

        Keys and leaves are ctypes objects; a leaf's members have the names of the C struct's.
        """

    def open_ring(self, name: str) -> None:
        """Begins to collect the records of a ring buffer."""

    def close_ring(self) -> None:
        """Lets go of its memory, where that is possible."""

    def poll(self, timeout_ms: int) -> list[bytes]:
        """Records that arrived. Waits at most `timeout_ms` for one that wakes the reader, as most do not."""

    def per_cpu_sums(self, name: str) -> list[int]:
        """A per-CPU array's entries, each summed over the CPUs."""

    def kernel_stack(self, name: str, stack_id: int) -> tuple[str, ...]:
        """Function names of one stack, innermost first; empty if the kernel did not keep it."""

    def symbol(self, address: int) -> str:
        """Name of the kernel function at an address."""

    def run_statistics(self) -> dict[str, tuple[int, int, int]]:
        """(run time in ns, runs, recursion misses) of each loaded function; the former need a `BpfStatistics`."""

    def close(self) -> None:
        """Detaches everything; idempotent."""
