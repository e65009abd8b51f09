# SPDX-License-Identifier: Apache-2.0
"""Built-in scenarios by name, modelled on the dimensions of QEMU's own guestperf
(tests/migration/guestperf/comparison.py).

In: a name. Out: a `Scenario`. Names and numbers are stable, because results of different days are compared.
"""

from __future__ import annotations

from ebpf_mig.errors import UsageError
from ebpf_mig.lab.scenario import MIB, Scenario

CATALOGUE: dict[str, tuple[str, Scenario]] = {
    "idle": ("a guest that hardly writes", Scenario(working_set_bytes=4096, pages_per_s=10)),
    "slow-dirty": ("dirties far less than the link carries", Scenario()),
    "fast-dirty": (
        "dirties more than the link carries",
        Scenario(working_set_bytes=32 * MIB, pages_per_s=None, bandwidth_bytes=128 * MIB, downtime_ms=500),
    ),
    "auto-converge": (
        "the same, the VMM slowing the guest down",
        Scenario(
            working_set_bytes=48 * MIB, pages_per_s=None, bandwidth_bytes=128 * MIB, downtime_ms=300, auto_converge=True
        ),
    ),
    "multifd-2": ("memory over 2 channels", Scenario(multifd_channels=2)),
    "multifd-4": ("memory over 4 channels", Scenario(multifd_channels=4)),
    "multifd-8": ("memory over 8 channels", Scenario(multifd_channels=8)),
    "many-vcpus": ("8 vCPUs", Scenario(working_set_bytes=4 * MIB, pages_per_s=1_000, vcpus=8)),
    "memory-1g": ("1 GiB of memory", Scenario(memory_bytes=1024 * MIB)),
    "memory-2g": ("2 GiB of memory", Scenario(memory_bytes=2048 * MIB)),
    "memory-4g": ("4 GiB of memory", Scenario(memory_bytes=4096 * MIB)),
    "dirty-ring": ("dirty pages logged in rings", Scenario(dirty_ring=4096)),
    "postcopy": ("switches to postcopy", Scenario(postcopy=True)),
    "unix": ("over a UNIX socket", Scenario(transport="unix")),
}
"""By name: a description, and the scenario. Settings not given are those of `slow-dirty`."""


def named(name: str) -> Scenario:
    """The scenario called `name`; UsageError with all the names if there is none."""
    if name not in CATALOGUE:
        raise UsageError(f"no scenario is called {name!r}", f"scenarios: {', '.join(CATALOGUE)}")
    return CATALOGUE[name][1]
