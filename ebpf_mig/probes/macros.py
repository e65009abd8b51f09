# SPDX-License-Identifier: Apache-2.0
"""The macros that the BPF programs are compiled with: pids, tiers, and the offsets of the kernel's structs.

In: the pids (none for a node), the available tracepoints, the chosen tiers. Out: the macros of bpf/trace.bpf.c. Offsets
come from the running kernel's BTF, so no kernel headers are needed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import btf
from ebpf_mig.linux.bpf import FENTRY, FEXIT, KPROBE, KRETPROBE
from ebpf_mig.probes import uring
from ebpf_mig.probes.tiers import Choice, has_task_regs
from ebpf_mig.recording.thresholds import SHARED

RING_BYTES = 8 << 20
_FENTRY, _KPROBE = 1, 2
_PROGRAMS_FOR = {FENTRY: _FENTRY, FEXIT: _FENTRY, KPROBE: _KPROBE, KRETPROBE: _KPROBE}
"""The socket programs to compile. Programs that are never attached would only cost compile time."""
STACK_NEVER, STACK_AS_IT_LEAVES, STACK_WHEN_BACK = range(3)
"""When the kernel stack of a wait is taken: values of `WAIT_STACKS` in bpf/sched.bpf.c."""
_POSSIBLE_CPUS = Path("/sys/devices/system/cpu/possible")
_NONE = 0xFFFF
"""Stands for the offset of a member that the kernel does not have."""
_USER_REGS_AT = {"x86_64": 16384 - 168, "aarch64": 16384 - 336}
"""Where a task's registers are on its kernel stack, for kernels before 5.15: THREAD_SIZE without KASAN, `struct
pt_regs` (arch/x86/include/asm/page_64_types.h, arch/arm64/include/asm/memory.h and ptrace.h, Linux 5.10).
"""
VSOCK_ADDRESS = struct.Struct("=HHII4x")
"""struct sockaddr_vm: family, reserved, port, CID (include/uapi/linux/vm_sockets.h)."""
_NOWHERE = 0x7FFFFFF0
"""An offset that no lock has. Waits for a lock with this offset count as waits for other locks."""
OFFSETS = {
    "OFF_task_pid": ("task_struct", "pid"),
    "OFF_task_tgid": ("task_struct", "tgid"),
    "OFF_task_stack": ("task_struct", "stack"),
    "OFF_task_prio": ("task_struct", "prio"),
    "OFF_task_files": ("task_struct", "files"),
    "OFF_files_fdt": ("files_struct", "fdt"),
    "OFF_fdtable_fd": ("fdtable", "fd"),
    "OFF_file_inode": ("file", "f_inode"),
    "OFF_file_private": ("file", "private_data"),
    "OFF_inode_ino": ("inode", "i_ino"),
    "OFF_inode_mode": ("inode", "i_mode"),
    "OFF_inode_rdev": ("inode", "i_rdev"),
    "OFF_inode_sb": ("inode", "i_sb"),
    "OFF_sb_dev": ("super_block", "s_dev"),
    "OFF_sb_magic": ("super_block", "s_magic"),
    "OFF_kiocb_file": ("kiocb", "ki_filp"),
    "OFF_socket_sk": ("socket", "sk"),
    "OFF_socket_file": ("socket", "file"),
    "OFF_alloc_socket": ("socket_alloc", "socket"),
    "OFF_alloc_inode": ("socket_alloc", "vfs_inode"),
    "OFF_sock_socket": ("sock", "sk_socket"),
    "OFF_msghdr_control": ("msghdr", "msg_control"),
    "OFF_msghdr_controllen": ("msghdr", "msg_controllen"),
    "OFF_unix_peer": ("unix_sock", "peer"),
    "OFF_skc_family": ("sock_common", "skc_family"),
    "OFF_skc_daddr": ("sock_common", "skc_daddr"),
    "OFF_skc_rcv_saddr": ("sock_common", "skc_rcv_saddr"),
    "OFF_skc_dport": ("sock_common", "skc_dport"),
    "OFF_skc_num": ("sock_common", "skc_num"),
    "OFF_skc_v6_daddr": ("sock_common", "skc_v6_daddr"),
    "OFF_skc_v6_rcv_saddr": ("sock_common", "skc_v6_rcv_saddr"),
    "OFF_skb_data": ("sk_buff", "data"),
    "OFF_skb_len": ("sk_buff", "len"),
    "OFF_skb_cb": ("sk_buff", "cb"),
    "OFF_tcp_una": ("tcp_sock", "snd_una"),
    "OFF_tcp_nxt": ("tcp_sock", "snd_nxt"),
    "OFF_tcp_write": ("tcp_sock", "write_seq"),
    "OFF_tcp_wnd": ("tcp_sock", "snd_wnd"),
    "OFF_tcp_rcv_nxt": ("tcp_sock", "rcv_nxt"),
}
_SCHED_INFO, _RUN_DELAY = ("task_struct", "sched_info"), ("sched_info", "run_delay")
"""Both exist where the kernel has CONFIG_SCHED_INFO."""
_NOTIFIERS = ("task_struct", "preempt_notifiers")
"""Exists where the kernel has KVM."""
_STATE = ("task_struct", "__state")
_STATE_BEFORE_5_14 = ("task_struct", "state")


def defines(
    pids: Sequence[int],
    tracepoints: set[str],
    choice: Choice = Choice(),  # noqa: B008 - it is frozen
    *,
    user_stacks: bool = False,
) -> dict[str, str | int]:
    """The value of each macro, by name. PreflightError if the kernel's BTF lacks a struct or a member."""
    if user_stacks and os.uname().machine != "x86_64":
        raise PreflightError("user-space stacks are read on x86-64 only", "leave out --user-stacks")
    test = "||".join(f"(t)=={pid}" for pid in pids)
    macros: dict[str, str | int] = {name: f"{value}ULL" for name, value in SHARED.items()}
    macros |= {"FENTRY": _FENTRY, "KPROBE": _KPROBE, "OFF_NONE": _NONE}
    if pids:
        macros["EBPF_MIG_TARGETS(t)"] = f"({test})"
    macros["EBPF_MIG_RING_PAGES"] = RING_BYTES // os.sysconf("SC_PAGESIZE")
    macros["CPUS"] = _possible_cpus()
    macros["OFF_CPU_KNOWN"] = int("sched_switch" in tracepoints)
    macros["WAIT_STACKS"] = STACK_WHEN_BACK if "sched_exit_tp" in tracepoints else STACK_AS_IT_LEAVES
    macros["LOCKS_KNOWN"] = int("contention_begin" in tracepoints)
    macros["KVM_FUNCTIONS"] = int("kvm" in choice.groups)
    macros["SOCKET_FUNCTIONS"] = sum({_PROGRAMS_FOR[h.how] for h in choice.hooks if "socket" in h.signals})
    macros["SPLIT_KNOWN"] = int("split" in choice.groups)
    macros["TASK_REGS_HELPER"] = int(choice.task_regs or (user_stacks and has_task_regs()))
    macros["TRACE_EVENTS"] = int(choice.trace_events)
    macros["USER_STACKS"] = int(user_stacks)
    macros["USER_REGS_AT"] = _USER_REGS_AT.get(os.uname().machine, 0)
    macros |= _kvm_offsets() | _vsock_offsets() | _aio_offsets() | uring.defines(_NONE)
    offsets = btf.offsets(
        btf.VMLINUX, [*OFFSETS.values(), _STATE, _STATE_BEFORE_5_14, _SCHED_INFO, _RUN_DELAY, _NOTIFIERS]
    )
    info, delay = offsets[_SCHED_INFO], offsets[_RUN_DELAY]
    macros["RUN_DELAY_KNOWN"] = int(info is not None and delay is not None)
    macros["OFF_task_run_delay"] = (info or 0) + (delay or 0)
    macros["OFF_task_state"] = offsets[_STATE] or offsets[_STATE_BEFORE_5_14] or 0
    macros["OFF_task_notifiers"] = offsets[_NOTIFIERS] or _NONE
    for name, member in OFFSETS.items():
        offset = offsets[member]
        if offset is None:
            raise PreflightError(f"the kernel's BTF has no {member[0]}.{member[1]}", "ebpf-mig doctor")
        macros[name] = offset
    return macros


def _possible_cpus() -> int:
    """The highest number that a CPU of this machine can have, plus 1. The kernel lists them as `0-3,8`."""
    last = _POSSIBLE_CPUS.read_bytes().strip().replace(b",", b"-").rpartition(b"-")[2]
    return int(last) + 1


def _kvm_offsets() -> dict[str, int]:
    """Offsets in `struct kvm` and `struct kvm_vcpu`, from the BTF of vmlinux or kvm.ko.

    If neither has them, as in Linux 5.10 with kvm.ko: `_NOWHERE` for locks, `_NONE` for others.
    """
    members = {"OFF_kvm_mmu_lock": ("kvm", "mmu_lock"), "OFF_kvm_slots_lock": ("kvm", "slots_lock")}
    manual = ("kvm", "manual_dirty_log_protect")
    notifier, vcpu_id = ("kvm_vcpu", "preempt_notifier"), ("kvm_vcpu", "vcpu_id")
    wanted = [*members.values(), manual, notifier, vcpu_id]
    offsets = btf.offsets(btf.VMLINUX, wanted)
    if None in offsets.values() and Path(btf.KVM_MODULE).exists():
        offsets = btf.offsets(btf.KVM_MODULE, wanted, base=btf.VMLINUX)
    locks = {name: _NOWHERE if offsets[member] is None else offsets[member] or 0 for name, member in members.items()}
    known = offsets[notifier] is not None and offsets[vcpu_id] is not None
    return locks | {
        "OFF_kvm_manual": offsets[manual] or _NONE,
        "OFF_notifier_vcpu_id": (offsets[vcpu_id] or 0) - (offsets[notifier] or 0) if known else _NONE,
    }


def _aio_offsets() -> dict[str, int]:
    """Offsets in `struct aio_kiocb`, which begins with a `struct fsync_iocb` (fs/aio.c); `_NONE` without AIO."""
    result, to_sync, asked = ("aio_kiocb", "ki_res"), ("aio_kiocb", "fsync"), ("io_event", "obj")
    work, file = ("fsync_iocb", "work"), ("fsync_iocb", "file")
    found = btf.offsets(btf.VMLINUX, [result, to_sync, asked, work, file])
    known = {member: offset for member, offset in found.items() if offset is not None}
    if len(known) < len(found):
        return dict.fromkeys(("OFF_aio_object", "OFF_fsync_work", "OFF_fsync_file"), _NONE)
    return {
        "OFF_aio_object": known[result] + known[asked],
        "OFF_fsync_work": known[to_sync] + known[work],
        "OFF_fsync_file": known[to_sync] + known[file],
    }


def _vsock_offsets() -> dict[str, int]:
    """Offsets of the two addresses in `struct vsock_sock`, from the BTF of vmlinux or vsock.ko.

    If neither has them, as in Linux 5.10 or while the module is not loaded: as in Linux 5.10 to 7.2. The struct begins
    with a `struct sock`, as `struct unix_sock` does, and a pointer. What is read there has to be a vsock's address.
    """
    local, remote, behind_sock = ("vsock_sock", "local_addr"), ("vsock_sock", "remote_addr"), ("unix_sock", "addr")
    offsets = btf.offsets(btf.VMLINUX, [local, remote, behind_sock])
    if None in (offsets[local], offsets[remote]) and Path(btf.VSOCK_MODULE).exists():
        offsets |= btf.offsets(btf.VSOCK_MODULE, [local, remote], base=btf.VMLINUX)
    usual = (offsets[behind_sock] or 0) + struct.calcsize("P")
    return {
        "OFF_vsock_local": usual if offsets[local] is None else offsets[local] or 0,
        "OFF_vsock_remote": usual + VSOCK_ADDRESS.size if offsets[remote] is None else offsets[remote] or 0,
    }
