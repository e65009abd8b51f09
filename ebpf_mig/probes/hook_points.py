# SPDX-License-Identifier: Apache-2.0
"""Where programs can be attached, and for which signal: tracepoints for every tier, functions for the better ones.

In: nothing. Out: tables of `Extra` and `Function`. `tiers.py` finds out which functions can be hooked on this kernel,
and by which kind of probe. All other signals come from system calls. Functions are those of Linux 5.10 to 7.2; the
programs are in `bpf/from_functions.bpf.c` and `bpf/trigger.bpf.c`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from ebpf_mig.linux.bpf import FENTRY, FEXIT, KPROBE, KRETPROBE

RETURN_OF = {FENTRY: FEXIT, KPROBE: KRETPROBE}
"""Kind of probe at a function's entry -> kind of probe at its exit."""
_SYSCALL = {"x86_64": "__x64_sys_", "aarch64": "__arm64_sys_"}.get(os.uname().machine, "sys_")


@dataclass(frozen=True)
class Extra:
    """An additional signal for every tier, where the kernel has the tracepoints."""

    signal: str
    hooks: tuple[tuple[str, str], ...]
    """(raw tracepoint, BPF function)."""
    optional: tuple[tuple[str, str], ...] = ()
    """The same for tracepoints that make the signal cheaper where the kernel has them."""
    one_of: tuple[tuple[str, str], ...] = ()
    """The same for the names of one more tracepoint in different kernels."""

    @property
    def all_hooks(self) -> tuple[tuple[str, str], ...]:
        """In the order of attaching: what sees the end of a wait comes before what sees its begin."""
        return self.optional + self.hooks + self.one_of


HIDDEN_SENDS = Extra("hidden-sends", (("sock_send_length", "on_sock_send_length"),))
"""Not needed where socket functions are hooked, since all sends pass through them."""
ASYNC_FAULTS = Extra(
    "async-faults",
    (("kvm_async_pf_not_present", "on_async_page_missing"), ("kvm_async_pf_ready", "on_async_page_ready")),
)
"""KVM has asynchronous page faults on these machines only (CONFIG_KVM_ASYNC_PF)."""
IO_URING = Extra(
    "io-uring",
    (("io_uring_complete", "on_io_uring_complete"),),
    one_of=(("io_uring_submit_req", "on_io_uring_submit"), ("io_uring_submit_sqe", "on_io_uring_submit")),
)
"""Linux 6.4 renamed the second one. `uring.py` says where their arguments are."""
AIO_SYNC = Extra(
    "aio-sync", (("workqueue_execute_end", "on_aio_sync_done"), ("workqueue_queue_work", "on_aio_sync_queued"))
)
"""The kernel syncs what io_submit(2) asks for in a work of a work queue (fs/aio.c)."""
EXTRAS = (
    Extra("off-cpu", (("sched_switch", "on_sched_switch"),), (("sched_exit_tp", "on_sched_exit"),)),
    Extra("lock", (("contention_begin", "on_contention_begin"), ("contention_end", "on_contention_end"))),
    Extra("wire", (("tcp_probe", "on_tcp_probe"),)),
    Extra("retransmits", (("tcp_retransmit_skb", "on_tcp_retransmit_skb"),)),
    *(ASYNC_FAULTS for machine in ("x86_64", "s390x") if machine == os.uname().machine),
    Extra("exec", (("sched_process_exec", "on_process_exec"),)),
    Extra("exec-begin", (("sched_prepare_exec", "on_prepare_exec"),)),
    HIDDEN_SENDS,
    IO_URING,
    AIO_SYNC,
)


@dataclass(frozen=True, eq=False)
class Function:
    """A kernel function to hook, with the programs for its entry and its exit."""

    names: tuple[str, ...]
    """Names of the function in different kernels; the first that exists is used."""
    group: str
    """`kvm`, `socket` or `split`. The functions of a group are hooked together or not at all."""
    signals: tuple[str, ...]
    entry: dict[str, str] = field(default_factory=dict)
    exit: dict[str, str] = field(default_factory=dict)
    arguments: int = 0
    """The number of arguments it must have, since fexit finds the return value behind them. 0: any number."""
    required: bool = True
    one_of: str = ""
    """A set of functions of which at least one is required."""
    by_everybody: bool = False
    """Whether every process calls it all the time. Hooked only while a traced process may need it."""
    provoked: bool = True
    """Whether `selftest` makes it fire on every machine. If not, a silent kprobe is accepted, but no silent fentry."""


def _both(program: str) -> dict[str, str]:
    return {FENTRY: program, KPROBE: program}


_IOCTL_RETURN = {FENTRY: "on_kvm_ioctl_fexit", KPROBE: "on_kvm_ioctl_kretprobe"}


def _ioctls(name: str, signals: tuple[str, ...], *, required: bool = True) -> Function:
    return Function((name,), "kvm", signals, _both("on_kvm_ioctl"), _IOCTL_RETURN, 3, required, provoked=required)


def _extra_transfers(names: tuple[str, ...], way: str, signal: str, arguments: int) -> Function:
    """Hooked beside the socket functions where possible."""
    at_entry = {how: f"on_{way}_{how}" for how in (FENTRY, KPROBE)}
    at_exit = {how: f"on_{way}_{RETURN_OF[how]}" for how in (FENTRY, KPROBE)}
    return Function(names, "socket", (signal,), at_entry, at_exit, arguments, required=False, provoked=False)


def _on_files(name: str, *kinds: str, way: str = "file", by_everybody: bool = False) -> Function:
    """A system call on files."""
    at_entry = {how: f"on_{way}_{how}" for how in kinds}
    at_exit = {how: f"on_{way}_{RETURN_OF[how]}" for how in kinds}
    return Function(
        (f"{_SYSCALL}{name}",), "socket", ("file",), at_entry, at_exit, 1, required=False, by_everybody=by_everybody,
        provoked=False,
    )  # fmt: skip


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
"""Each calls the next, and the outermost counts. Compilers inline some of them, so a function that exists need not
fire. On arm64 only the fourth remains (Linux 6.12).
"""

FILES_OF_QEMU = (
    "writev", "pwritev", "pwritev2", "pwrite64", "readv", "preadv", "preadv2", "pread64", "fsync", "fdatasync",
)  # fmt: skip
"""The system calls by which QEMU moves a guest to and from files. The others, which it does not need, are not hooked by
kprobes: a call that sleeps would occupy a return probe, and each hook takes two descriptors.
"""

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
    Function((f"{_SYSCALL}shutdown",), "socket", ("shutdown",), _both("on_shutdown"), required=False, provoked=False),
    _extra_transfers(("pipe_write", "anon_pipe_write"), "write", "pipe", 2),
    _extra_transfers(("pipe_read", "anon_pipe_read"), "read", "pipe", 2),
    _extra_transfers(("vsock_connectible_sendmsg", "vsock_stream_sendmsg"), "send", "vsock", 3),
    _extra_transfers(("vsock_connectible_recvmsg", "vsock_stream_recvmsg"), "receive", "vsock", 4),
    *(_on_files(name, FENTRY, KPROBE) for name in FILES_OF_QEMU),
    *(_on_files(name, FENTRY) for name in ("sync_file_range", "msync", "mincore", "mmap")),
    _on_files("io_submit", FENTRY, KPROBE, way="io_submit"),
    *(_on_files(name, FENTRY, by_everybody=True) for name in ("write", "read")),
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
"""Where kprobes see a vCPU's ioctls return. A return probe on kvm_vcpu_ioctl would be occupied while the guest runs,
and the kernel has few of them.
"""

MEMSLOTS = tuple(
    Function((name,), "node", ("logging",), {FENTRY: "on_memslot_fentry", KPROBE: "on_memslot_kprobe"}, arguments=2)
    for name in ("kvm_set_memory_region", "__kvm_set_memory_region")
)
"""Where KVM starts to log a VM's memory: the trigger of `watch` and `exporter`. The first function calls the second,
which may be inlined into it (as in Linux 6.12).
"""
