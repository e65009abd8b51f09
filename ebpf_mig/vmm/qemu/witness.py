# SPDX-License-Identifier: Apache-2.0
"""The meaning of QEMU's marks, which come from its QMP events and `query-migrate`.

In: nothing. Out: `WITNESS`. Events: qapi/run-state.json and qapi/migration.json (QEMU 7.2 to 11.1).
"""

from __future__ import annotations

from ebpf_mig.analysis.witnesses import MarkNames
from ebpf_mig.vmm.witness import VmmWitness

_STATES = frozenset({
    "none", "setup", "cancelling", "cancelled", "active", "postcopy-active", "postcopy-paused", "postcopy-device",
    "postcopy-recover", "postcopy-recover-setup", "completed", "failed", "failing", "colo", "pre-switchover", "device",
    "wait-unplug",
})  # fmt: skip
"""MigrationStatus of qapi/migration.json (v11.1)."""
_EVENTS = frozenset({
    "STOP", "RESUME", "MIGRATION", "MIGRATION_PASS", "SHUTDOWN", "POWERDOWN", "RESET", "SUSPEND", "SUSPEND_DISK",
    "WAKEUP", "GUEST_PANICKED", "JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "UNPLUG_PRIMARY",
    "FAILOVER_NEGOTIATED", "RTC_CHANGE", "NIC_RX_FILTER_CHANGED", "COLO_EXIT",
})  # fmt: skip
_FIGURES = frozenset({
    "downtime_ms", "total_time_ms", "setup_time_ms", "downtime_bytes", "dirty_sync_count", "precopy_bytes",
    "postcopy_bytes", "multifd_bytes", "normal", "error",
})  # fmt: skip


class QemuWitness(VmmWitness):
    """Marks `qmp.EVENT`, `qmp.MIGRATION.STATUS` and `qmp.FIGURE`."""

    marks = MarkNames(
        stopped=frozenset({"qmp.STOP"}),
        postcopy=frozenset({"qmp.MIGRATION.postcopy-active"}),
        downtime={"qmp.downtime_ms": "from before the kick to the source's end"},
        pairs=(("qmp.STOP..RESUME", "qmp.STOP", "qmp.RESUME"),),
    )
    words = frozenset({f"qmp.{word}" for word in _EVENTS | _FIGURES} | {f"qmp.MIGRATION.{state}" for state in _STATES})


WITNESS = QemuWitness()
