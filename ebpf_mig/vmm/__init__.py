# SPDX-License-Identifier: Apache-2.0
"""Registry of the supported VMMs and managers. Each has one folder and one line here.

In: the name of a VMM, or of a process. Out: its `Adapter`. A folder's `adapter` module imports the
code that talks to the VMM only on use, so that a report does not load it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ebpf_mig.errors import UsageError
from ebpf_mig.vmm.adapter import Adapter

if TYPE_CHECKING:  # callers that only need names do not load the analysis
    from ebpf_mig.analysis.witnesses import MarkNames

ADAPTERS = {
    "qemu": "ebpf_mig.vmm.qemu.adapter",
    "cloud-hypervisor": "ebpf_mig.vmm.cloud_hypervisor.adapter",
    "firecracker": "ebpf_mig.vmm.firecracker.adapter",
    "libvirt": "ebpf_mig.vmm.libvirt.adapter",
}
"""Name and module. The first is the default. A module has its adapter as `ADAPTER`."""


def adapters() -> Iterator[Adapter]:
    """All adapters, in the order of the registry."""
    return map(adapter, ADAPTERS)


def adapter(name: str) -> Adapter:
    """The adapter of that name; UsageError if there is none."""
    if name not in ADAPTERS:
        raise UsageError(f"no VMM is called {name!r}", f"VMMs: {', '.join(ADAPTERS)}")
    found: Adapter = importlib.import_module(ADAPTERS[name]).ADAPTER
    return found


def mark_names() -> MarkNames:
    """Mark names of all VMMs."""
    from ebpf_mig.analysis.witnesses import merged

    return merged(one.witness.marks for one in adapters())


def words() -> frozenset[str]:
    """Names of VMMs, and of their marks."""
    return frozenset(ADAPTERS).union(*(one.witness.words for one in adapters()))


def with_lab() -> list[str]:
    """Names of the VMMs that have a lab, for `demo` and `bench`."""
    return [one.name for one in adapters() if one.has_lab]


def migrating() -> list[str]:
    """Names of the VMMs that migrate live and whose processes are recognised by name."""
    return [one.name for one in adapters() if one.comms and one.options]


def vmm_named(comm: str) -> str:
    """The VMM that the name of a process or of its program stands for, a hint; empty if none.

    NixOS starts a program through a script and calls the program itself `.NAME-wrapped` (make-wrapper.sh, nixpkgs).
    """
    name = comm.removeprefix(".")
    return next((one.name for one in adapters() if one.comms and name.startswith(one.comms)), "")
