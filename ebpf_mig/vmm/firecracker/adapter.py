# SPDX-License-Identifier: Apache-2.0
"""The Firecracker adapter. It only recognises the process.

Firecracker has no live migration: one process writes a snapshot and another loads it. In: nothing. Out: `ADAPTER`.
"""

from __future__ import annotations

from ebpf_mig.vmm.adapter import Adapter


class FirecrackerAdapter(Adapter):
    """Recognises the process."""

    name = "firecracker"
    title = "Firecracker"
    comms = ("firecracker",)


ADAPTER = FirecrackerAdapter()
