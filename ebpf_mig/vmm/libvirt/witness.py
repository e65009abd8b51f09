# SPDX-License-Identifier: Apache-2.0
"""The meaning of libvirt's marks, which come from its events and the job's statistics.

In: nothing. Out: `WITNESS`. `downtime` (virDomainGetJobStats, VIR_DOMAIN_JOB_DOWNTIME) counts, by the daemons' wall
clocks, from the arrival of QEMU's STOP event at the source's libvirtd until QEMU has answered the destination
libvirtd's `cont` (qemuDomainJobDataUpdateDowntime, src/qemu/qemu_domainjob.c, 9.0). With postcopy QEMU starts the
guest only later.
"""

from __future__ import annotations

from ebpf_mig.analysis.witnesses import MarkNames
from ebpf_mig.vmm.witness import VmmWitness

EVENTS = ("STARTED", "SUSPENDED", "RESUMED", "STOPPED", "MIGRATION_ITERATION")
"""Events of its lifecycle, and of the migration's passes."""
_MS = ("downtime", "downtime_net", "time_elapsed", "setup_time")
_NUMBERS = ("data_processed", "memory_iteration", "memory_normal", "memory_postcopy_requests")
FIGURES = {name: f"libvirt.{name}_ms" for name in _MS} | {name: f"libvirt.{name}" for name in _NUMBERS}
"""Figures of virDomainGetJobStats that are kept, and the names of their marks."""


class LibvirtWitness(VmmWitness):
    """Marks `libvirt.EVENT` and `libvirt.FIGURE`; QEMU's events that libvirt passes on are QEMU's."""

    marks = MarkNames(
        downtime={"libvirt.downtime_ms": "from STOP at the source's libvirtd to cont at the destination's"},
        pairs=(("libvirt.SUSPENDED..RESUMED", "libvirt.SUSPENDED", "libvirt.RESUMED"),),
    )
    words = frozenset({*FIGURES.values(), *(f"libvirt.{event}" for event in EVENTS)})


WITNESS = LibvirtWitness()
