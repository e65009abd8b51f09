# SPDX-License-Identifier: Apache-2.0
"""The words that a recording of ours can hold, and that name nobody: what redaction lets pass.

In: a text and what its field says it is. Out: whether it is such a word. A recording can come from anybody, so each
text is looked at, whatever its field says it is. What is not known here gets a stand-in: that costs a reader of the
report one word.
"""

from __future__ import annotations

import re

from ebpf_mig.recording.meaning import Meaning

_MACHINES = frozenset({"x86_64", "aarch64", "arm64", "i686", "riscv64", "ppc64le", "s390x", "loongarch64"})
_VMMS = frozenset({"qemu", "cloud-hypervisor", "firecracker", "crosvm", "libvirt"})
_ROLES = frozenset({"source", "destination", "unknown", "both", "least", "most"})
_REASONS = frozenset({
    "migrated", "failed", "cancelled", "duration", "interrupted", "target-died", "command-ended", "unknown", "done",
    "completed", "logging-ended",
})  # fmt: skip
_SIGNALS = frozenset({
    "dirty-log", "vcpu", "state", "kick", "socket", "wire", "lock", "off-cpu", "retransmits", "hidden-sends",
    "brownout", "split", "samples",
})  # fmt: skip
_STATES = frozenset({
    "none", "setup", "cancelling", "cancelled", "active", "postcopy-active", "postcopy-paused", "postcopy-device",
    "postcopy-recover", "postcopy-recover-setup", "completed", "failed", "failing", "colo", "pre-switchover", "device",
    "wait-unplug",
})  # fmt: skip
"""MigrationStatus of qapi/migration.json (v11.1)."""
_QMP_EVENTS = frozenset({
    "STOP", "RESUME", "MIGRATION", "MIGRATION_PASS", "SHUTDOWN", "POWERDOWN", "RESET", "SUSPEND", "SUSPEND_DISK",
    "WAKEUP", "GUEST_PANICKED", "JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "UNPLUG_PRIMARY",
    "FAILOVER_NEGOTIATED", "RTC_CHANGE", "NIC_RX_FILTER_CHANGED", "COLO_EXIT",
})  # fmt: skip
_FIGURES = frozenset({
    "downtime_ms", "total_time_ms", "setup_time_ms", "downtime_bytes", "dirty_sync_count", "precopy_bytes",
    "postcopy_bytes", "multifd_bytes", "normal", "error",
})  # fmt: skip
_CH_FIGURES = frozenset({
    "complete_ms", "downtime_ms", "final_iter_ms", "overhead_ms", "send_state_ms", "state_ms", "recv_snapshot_ms",
    "restore_ms", "resume_ms", "state_to_resume_ms",
})  # fmt: skip
_CH_EVENTS = frozenset({
    "starting", "booting", "booted", "deleted", "shutdown", "reboot", "pausing", "paused", "resuming", "resumed",
    "snapshotting", "snapshotted", "restoring", "restored", "migration-started", "migration-memory-iteration",
    "migration-finished", "migration-failed", "migration-receive-ready", "migration-receive-started",
    "migration-receive-finished", "migration-receive-failed", "migration-cancelled", "panic",
})  # fmt: skip
"""event!() of vmm/src and vm-migration (v52 to v54)."""
_TCP_INFO = frozenset({
    "busy_time", "rwnd_limited", "sndbuf_limited", "total_retrans", "bytes_retrans", "bytes_acked", "bytes_sent",
    "notsent_bytes", "rtt", "min_rtt", "snd_cwnd", "snd_mss", "snd_wnd", "delivery_rate", "queued", "jiffy_us",
})  # fmt: skip
_MARKS = frozenset(
    {"session.trigger"}
    | {f"qmp.{word}" for word in _QMP_EVENTS | _FIGURES}
    | {f"qmp.MIGRATION.{state}" for state in _STATES}
    | {f"ch.{word}" for word in _CH_FIGURES}
    | {f"ch.event.{word}" for word in _CH_EVENTS}
)
_WORDS = _MACHINES | _VMMS | _ROLES | _REASONS | _SIGNALS | _TCP_INFO | _MARKS

_FUNCTION = r"[a-z_][a-z0-9_]{0,126}(?:\.(?:isra|constprop|part|cold|llvm|\d+))*"
"""As C programmers write one. Names with capitals are few, and listed."""
_CAPITALS = r"(?:entry_SYSCALL_64_after_hwframe|entry_SYSCALL_64|do_SYSCALL_64|do_IRQ|common_IRQ|ret_from_fork_asm)"
_SYMBOL = re.compile(rf"{_FUNCTION}|{_CAPITALS}|\[unknown\]", re.ASCII)
_PROBE = re.compile(rf"on_[a-z0-9_]{{1,60}}(?::(?:{_FUNCTION}))?|recursion-misses|thread-table", re.ASCII)
_VERSION = re.compile(r"(?:(?:ebpf-mig|v) ?)?\d{1,6}(?:\.\d{1,6}){0,4}(?:rc\d{1,3}|-rc\d{1,3})?", re.ASCII)
_PACKAGED = re.compile(
    r"(\d{1,3}(?:\.\d{1,4}){1,3})(?:[-+.](?:\d{1,6}|rc\d+|deb\d+|bpo\d+|el\d+(?:_\d+)?|fc\d+|cloud|generic|rt|amd64|arm64"
    r"|x86_64|aarch64|default|lts|aws|azure|gcp|kvm|pve|v\d+))*",
    re.ASCII,
)
"""What distributions add to a kernel's version; others add names of their own."""
_WAY = r"(?:fentry|kprobe|tracepoint|samples)(?:\+(?:fentry|kprobe|tracepoint|samples))?"
_TIER = re.compile(
    rf"{_WAY}(?: and {_WAY})?|absent(?:: on the (?:source|destination))?(?:: (?:no such tracepoint|not known))?"
)


def safe(meaning: Meaning, text: str, probes: frozenset[str]) -> bool:
    """Whether a text is a word of that meaning, and names nobody. `probes`: the kinds of records."""
    match meaning:
        case Meaning.WORD:
            return text in _WORDS
        case Meaning.SYMBOL:
            return _SYMBOL.fullmatch(text) is not None
        case Meaning.PROBE:
            return text in probes or _PROBE.fullmatch(text) is not None
        case Meaning.VERSION:
            return _VERSION.fullmatch(text) is not None or _PACKAGED.fullmatch(text) is not None
        case Meaning.TIER:
            return _TIER.fullmatch(text) is not None
        case _:
            return False
