# SPDX-License-Identifier: Apache-2.0
"""The interface of a loaded BPF object, whichever process loaded it.

In: nothing. Out: `BpfProgram`, implemented by `loader.Program` (bcc) and `inherited.InheritedProgram` (libbpf).
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
        """The map of that name, with the interface of bcc's tables: `table[key]`, `table[key] = leaf`,
        `del table[key]`, `items()`, `clear()`.

        Keys and leaves are ctypes objects; a leaf's members have the names of the C struct's members.
        """

    def open_ring(self, name: str) -> None:
        """Starts to collect the records of a ring buffer."""

    def close_ring(self) -> None:
        """Frees the memory of the ring buffer, if that is possible."""

    def poll(self, timeout_ms: int) -> list[bytes]:
        """The records that arrived. Waits at most `timeout_ms` for a record that wakes the reader; most do not."""

    def per_cpu_sums(self, name: str) -> list[int]:
        """A per-CPU array's entries, each summed over the CPUs."""

    def kernel_stack(self, name: str, stack_id: int) -> tuple[str, ...]:
        """Function names of one stack, innermost first; empty if the kernel did not keep it."""

    def symbol(self, address: int) -> str:
        """Name of the kernel function at an address."""

    def run_statistics(self) -> dict[str, tuple[int, int, int]]:
        """(run time in ns, runs, recursion misses) of each loaded function. The first two need `BpfStatistics`."""

    def close(self) -> None:
        """Detaches everything; idempotent."""
