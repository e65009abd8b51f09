# SPDX-License-Identifier: Apache-2.0
"""Where programs can be attached, and for which signal: tracepoints of every tier, functions of the better ones.

In: nothing. Out: tables of `Extra` and `Function`. `tiers.py` finds out which functions can be hooked here, and by
which kind of probe; what is left comes from system calls. Functions by Linux 5.10 to 7.2; the programs are in
`bpf/from_functions.bpf.c` and `bpf/trigger.bpf.c`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from ebpf_mig.linux.bpf import FENTRY, FEXIT, KPROBE, KRETPROBE

RETURN_OF = {FENTRY: FEXIT, KPROBE: KRETPROBE}
"""The kind of probe at a function's exit that goes with the kind at its entry."""
_SYSCALL = {"x86_64": "__x64_sys_", "aarch64": "__arm64_sys_"}.get(os.uname().machine, "sys_")


@dataclass(frozen=True)
class Extra:
    """A signal that every tier can have besides its own, where the kernel has the tracepoints."""

    signal: str
    hooks: tuple[tuple[str, str], ...]
    """(raw tracepoint, function)."""


HIDDEN_SENDS = Extra("hidden-sends", (("sock_send_length", "on_sock_send_length"),))
"""Needless where functions of the sockets are hooked, which all sends pass."""
EXTRAS = (
    Extra("off-cpu", (("sched_switch", "on_sched_switch"),)),
    Extra("lock", (("contention_begin", "on_contention_begin"), ("contention_end", "on_contention_end"))),
    Extra("wire", (("tcp_probe", "on_tcp_probe"),)),
    Extra("retransmits", (("tcp_retransmit_skb", "on_tcp_retransmit_skb"),)),
    HIDDEN_SENDS,
)


@dataclass(frozen=True, eq=False)
class Function:
    """A function to hook: which program runs at its entry and at its exit, by kind of probe."""

    names: tuple[str, ...]
    """The same thing in different kernels; the first that is there."""
    group: str
    """`kvm`, `socket` or `split`: had together or not at all."""
    signals: tuple[str, ...]
    entry: dict[str, str] = field(default_factory=dict)
    exit: dict[str, str] = field(default_factory=dict)
    arguments: int = 0
    """How many it must have: fexit reads the returned value behind them. 0: any number."""
    required: bool = True
    one_of: str = ""
    """Functions of one name of which at least one is required."""
    provoked: bool = True
    """Whether `selftest` makes it fire on every machine; if not, a silent kprobe is trusted, a silent fentry never."""


def _both(program: str) -> dict[str, str]:
    return {FENTRY: program, KPROBE: program}


_IOCTL_RETURN = {FENTRY: "on_kvm_ioctl_fexit", KPROBE: "on_kvm_ioctl_kretprobe"}


def _ioctls(name: str, signals: tuple[str, ...], *, required: bool = True) -> Function:
    return Function((name,), "kvm", signals, _both("on_kvm_ioctl"), _IOCTL_RETURN, 3, required, provoked=required)


def _transfers(name: str, way: str, *, required: bool = False) -> Function:
    at_entry = {how: f"on_{way}_{how}" for how in (FENTRY, KPROBE)}
    at_exit = {how: f"on_{way}_{RETURN_OF[how]}" for how in (FENTRY, KPROBE)}
    signals = ("socket", "hidden-sends") if way == "send" else ("socket",)
    return Function(
        (name,), "socket", signals, at_entry, at_exit, 3 if way == "send" else 4, required, provoked=required
    )


FLUSHES = (
    "kvm_flush_remote_tlbs_memslot", "kvm_arch_flush_remote_tlbs_memslot", "kvm_flush_remote_tlbs_range",
    "kvm_arch_flush_remote_tlbs_range", "kvm_flush_remote_tlbs",
)  # fmt: skip
"""One calls the next, the outermost counts; compilers inline some into others, so that what is there need not fire.
On arm64 the fourth is the one that is left (Linux 6.12)."""

FUNCTIONS = (
    _ioctls("kvm_vm_ioctl", ("dirty-log", "state")),
    Function(("kvm_vcpu_ioctl",), "kvm", ("vcpu", "state", "brownout"), _both("on_kvm_ioctl"),
             {FENTRY: "on_kvm_ioctl_fexit"}, 3),
    _ioctls("kvm_device_ioctl", ("state",), required=False),
    _ioctls("kvm_dev_ioctl", ("state",), required=False),
    Function((f"{_SYSCALL}tgkill",), "kvm", ("kick",), _both("on_tgkill")),
    _transfers("inet_sendmsg", "send", required=True),
    _transfers("inet_recvmsg", "receive", required=True),
    _transfers("unix_stream_sendmsg", "send", required=True),
    _transfers("unix_stream_recvmsg", "receive", required=True),
    _transfers("inet6_sendmsg", "send"),
    _transfers("inet6_recvmsg", "receive"),
    Function(("kvm_arch_sync_dirty_log",), "split", ("split",), {}, _both("on_synced")),
    *(Function((name,), "split", ("split",), _both("on_flush"), _both("on_flushed"), required=False, one_of="flush")
      for name in FLUSHES),
    Function(("kvm_dirty_ring_reset",), "split", ("split",), _both("on_ring_reset"), _both("on_ring_was_reset"),
             required=False, provoked=False),
)  # fmt: skip

VCPU_RETURNS = tuple(
    Function((name,), "kvm", ("state",), {}, _both("on_kvm_ioctl_kretprobe"), required=False, provoked=False)
    for name in (
        "kvm_arch_vcpu_ioctl", "kvm_arch_vcpu_ioctl_get_regs", "kvm_arch_vcpu_ioctl_set_regs",
        "kvm_arch_vcpu_ioctl_get_sregs", "kvm_arch_vcpu_ioctl_set_sregs", "kvm_arch_vcpu_ioctl_get_mpstate",
        "kvm_arch_vcpu_ioctl_set_mpstate", "kvm_arch_vcpu_ioctl_get_fpu", "kvm_arch_vcpu_ioctl_set_fpu",
    )
)  # fmt: skip
"""Where a vCPU's ioctls return by kprobes: a return probe on kvm_vcpu_ioctl would be held as long as a guest runs, and
the kernel has few of them."""

MEMSLOTS = tuple(
    Function((name,), "node", ("logging",), {FENTRY: "on_memslot_fentry", KPROBE: "on_memslot_kprobe"}, arguments=2)
    for name in ("kvm_set_memory_region", "__kvm_set_memory_region")
)
"""Where a VM's memory begins to be logged, the standing trigger of `watch` and `exporter`: the one calls the other, and
may be inlined into its caller (as in Linux 6.12)."""
