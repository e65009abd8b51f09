# SPDX-License-Identifier: Apache-2.0
"""Firecracker's own times of its API calls, beside ours.

In: a `TracedMigration` with its marks (`firecracker.NAME_us`, `firecracker.API.CALL.begin` and `.end`), the phases.
Out: rows of the breakdown. They are witnesses: they move no boundary.
"""

from __future__ import annotations

from ebpf_mig.vmm.firecracker.log import NAMES
from ebpf_mig.vmm.witness import VmmWitness

CALLS = ("pause", "create", "load")


class FirecrackerWitness(VmmWitness):
    """Marks `firecracker.NAME_us` are of its log, `firecracker.API.CALL.begin` and `.end` of our calls."""

    words = frozenset(
        {f"firecracker.{name}_us" for name in NAMES}
        | {f"firecracker.API.{call}.{end}" for call in CALLS for end in ("begin", "end")}
        | {f"firecracker.MIGRATION.{result}" for result in ("completed", "failed", "cancelled")}
    )


WITNESS = FirecrackerWitness()
