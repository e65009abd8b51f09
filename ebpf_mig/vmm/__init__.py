# SPDX-License-Identifier: Apache-2.0
"""The VMMs and managers that this tool knows: one folder and one line each.

In: the name of a VMM, or of a process. Out: its `Adapter`. A folder's `adapter` module is light: it imports what
talks to the VMM only when that is needed, so that a report can be made without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ebpf_mig.errors import UsageError
from ebpf_mig.vmm.adapter import Adapter

if TYPE_CHECKING:  # the analysis is not loaded by who only asks for names
    from ebpf_mig.analysis.witnesses import MarkNames

ADAPTERS = {
    "qemu": "ebpf_mig.vmm.qemu.adapter",
    "cloud-hypervisor": "ebpf_mig.vmm.cloud_hypervisor.adapter",
    "firecracker": "ebpf_mig.vmm.firecracker.adapter",
    "libvirt": "ebpf_mig.vmm.libvirt.adapter",
}
"""Name and module. The first is the default. A module has its adapter as `ADAPTER`."""


def adapters() -> Iterator[Adapter]:
    """All of them, in the order of the registry."""
    return map(adapter, ADAPTERS)


def adapter(name: str) -> Adapter:
    """The adapter of that name; UsageError if there is none."""
    if name not in ADAPTERS:
        raise UsageError(f"no VMM is called {name!r}", f"VMMs: {', '.join(ADAPTERS)}")
    found: Adapter = importlib.import_module(ADAPTERS[name]).ADAPTER
    return found


def mark_names() -> MarkNames:
    """What the marks of all VMMs are called."""
    from ebpf_mig.analysis.witnesses import merged

    return merged(one.witness.marks for one in adapters())


def words() -> frozenset[str]:
    """Names of VMMs, and of the marks that they make."""
    return frozenset(ADAPTERS).union(*(one.witness.words for one in adapters()))


def with_lab() -> list[str]:
    """Names of those that can start VMs of their own: for `demo` and `bench`."""
    return [one.name for one in adapters() if one.has_lab]


def migrating() -> list[str]:
    """Names of those whose processes are known by their names and that migrate live."""
    return [one.name for one in adapters() if one.comms and one.options]


def vmm_named(comm: str) -> str:
    """The VMM that a process's name (15 characters at most) stands for, a hint; empty if none."""
    return next((one.name for one in adapters() if one.comms and comm.startswith(one.comms)), "")
