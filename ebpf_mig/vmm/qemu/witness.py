# SPDX-License-Identifier: Apache-2.0
"""What QEMU says of its migrations: the meaning of the marks that are made of its QMP events and `query-migrate`.

In: nothing. Out: `WITNESS`. Events: qapi/run-state.json and qapi/migration.json (QEMU 7.2 to 11.1).
"""

from __future__ import annotations

from ebpf_mig.analysis.witnesses import MarkNames
from ebpf_mig.vmm.witness import VmmWitness


class QemuWitness(VmmWitness):
    """Marks `qmp.EVENT`, `qmp.MIGRATION.STATUS` and `qmp.FIGURE`."""

    marks = MarkNames(
        stopped=frozenset({"qmp.STOP"}),
        postcopy=frozenset({"qmp.MIGRATION.postcopy-active"}),
        downtime={"qmp.downtime_ms": "from before the kick to the source's end"},
        pairs=(("qmp.STOP..RESUME", "qmp.STOP", "qmp.RESUME"),),
    )


WITNESS = QemuWitness()
