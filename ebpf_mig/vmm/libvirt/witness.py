# SPDX-License-Identifier: Apache-2.0
"""What libvirt says of its migrations: the meaning of the marks made of its events and of the job's statistics.

In: nothing. Out: `WITNESS`. `downtime` (virDomainGetJobStats, VIR_DOMAIN_JOB_DOWNTIME) counts from QEMU's STOP event at
the source's libvirtd to the start of the vCPUs by the destination's; `downtime_net` leaves out what lies between the
two daemons. Both are differences of wall clocks, of two hosts in the first case.
"""

from __future__ import annotations

from ebpf_mig.analysis.witnesses import MarkNames
from ebpf_mig.vmm.witness import VmmWitness


class LibvirtWitness(VmmWitness):
    """Marks `libvirt.EVENT` and `libvirt.FIGURE`; QEMU's events that libvirt passes on are QEMU's."""

    marks = MarkNames(
        downtime={
            "libvirt.downtime_ms": "from the STOP event at the source's libvirtd until the destination's has resumed"
        },
        pairs=(("libvirt.SUSPENDED..RESUMED", "libvirt.SUSPENDED", "libvirt.RESUMED"),),
    )


WITNESS = LibvirtWitness()
