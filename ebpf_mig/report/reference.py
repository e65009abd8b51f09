# SPDX-License-Identifier: Apache-2.0
"""Reference figures, published or measured on known machines, to compare ours with.

In: nothing. Out: constants with their sources.
"""

from __future__ import annotations

from ebpf_mig import vmm
from ebpf_mig.vmm.witness import Reference

REARM = (
    *(reference for one in vmm.adapters() for reference in one.witness.references),
    Reference(
        "3.6 ms/GiB",
        "enabling the log of a 128 GiB guest, Xeon 6152: all pages protected once",
        "Linux commit 3c9bd4006bfc",
    ),
    Reference(
        "3.4 to 4.2 ms/GiB, 13 to 16 ns/page",
        "KVM_CLEAR_DIRTY_LOG of all pages, shadow MMU, none mapped",
        "measured on Linux 6.18 in a virtual machine",
    ),
    Reference(
        "15 ns/page",
        "KVM_RESET_DIRTY_RINGS of 4096 entries",
        "measured on Linux 6.18 in a virtual machine",
    ),
)
