# SPDX-License-Identifier: Apache-2.0
"""Firecracker, of which only the process is known.

It has no live migration: a snapshot is written by one process and loaded by another. In: nothing. Out: `ADAPTER`.
"""

from __future__ import annotations

from ebpf_mig.vmm.adapter import Adapter


class FirecrackerAdapter(Adapter):
    """Recognises the process."""

    name = "firecracker"
    title = "Firecracker"
    comms = ("firecracker",)


ADAPTER = FirecrackerAdapter()
