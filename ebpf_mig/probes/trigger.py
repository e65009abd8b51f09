# SPDX-License-Identifier: Apache-2.0
"""The standing watch over a node's VMs: cheap signs that a migration may begin, at no cost to any system call.

In: the pids that own a KVM VM, added as they are found. Out: `Sign`s. Thread births come from the tracepoint
`task:task_newtask`, connections from `sock:inet_sock_set_state` (both of Linux 4.16 or older); where a function of KVM
can be hooked, logging itself is a sign.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence

import msgspec

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import btf
from ebpf_mig.linux.capabilities import require_tracing
from ebpf_mig.probes.contract import Contract
from ebpf_mig.probes.hook import TRACEPOINT, Hook
from ebpf_mig.probes.hook_points import MEMSLOTS
from ebpf_mig.probes.inherited import ProgramDescription
from ebpf_mig.probes.loader import Program, require_bcc
from ebpf_mig.probes.program import BpfProgram
from ebpf_mig.probes.run_statistics import BpfStatistics
from ebpf_mig.probes.tiers import AUTO, Chooser
from ebpf_mig.recording.layout import Layout

KINDS = {1: "stranger", 2: "thread", 3: "connect", 4: "accept", 5: "logging"}
"""`stranger` is a thread born in a process that is not known to own a VM, `logging` a VM of any process whose memory is
logged from now on; the others are of known owners."""

_HOOKS = (Hook(TRACEPOINT, "task_newtask", "on_newtask"), Hook(TRACEPOINT, "inet_sock_set_state", "on_state"))
SIGNS, LOGGING = "signs", "logging"
"""What the trigger relies on: thread births and TCP connections of a VM's process, which can be missed; or also on the
function in which KVM begins to log a VM's memory, which no migration passes by."""

_RECORD = Layout("node_record", "u64 at_ns, pid, sign")
_READ = _RECORD.reader("at_ns", "pid", "sign")
CONTRACT = Contract((_RECORD,), numbers={f"SIGN_{name.upper()}": number for number, name in KINDS.items()})
"""Of `bpf/trigger.bpf.c`."""


class Sign(msgspec.Struct, frozen=True):
    """Something that happened in a process."""

    at_ns: int
    pid: int
    kind: str


class NodeProbe:
    """Compiled, loaded and attached from the start; use as a context manager. PreflightError without privilege."""

    def __init__(self, loaded: tuple[BpfProgram, Sequence[Hook]] | None = None) -> None:
        """`loaded`: what another process loaded, and where to attach it; else it is loaded here, with LLVM."""
        self._program: BpfProgram
        self.hooks: Sequence[Hook]
        self._program, self.hooks = loaded or _load()
        for hook in self.hooks:
            self._program.attach(hook)
        self._program.open_ring("signs")
        self.attached = {hook.target: True for hook in self.hooks}
        self.trigger = LOGGING if any(LOGGING in hook.signals for hook in self.hooks) else SIGNS

    def __enter__(self) -> NodeProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, pid: int) -> None:
        """`pid` owns a VM from now on. Does not hear ports it listens on already."""
        table = self._program.table("vms")
        table[ctypes.c_uint32(pid)] = ctypes.c_uint64(0)

    def remove(self, pid: int) -> None:
        """`pid` is gone; the kernel closed its ports, which the program saw."""
        with contextlib.suppress(KeyError):
            del self._program.table("vms")[ctypes.c_uint32(pid)]

    def listens(self, pid: int, port: int) -> None:
        """A port on which `pid` was found listening, because it began before we looked."""
        self._program.table("ports")[ctypes.c_int(port)] = ctypes.c_uint32(pid)

    def poll(self, timeout_ms: int) -> list[Sign]:
        """Signs that arrived, waiting at most `timeout_ms` for the first."""
        signs = []
        for record in self._program.poll(timeout_ms):
            at, pid, kind = _READ(record)
            signs.append(Sign(at, pid, KINDS[kind]))
        return signs

    def lost(self) -> int:
        """Signs for which the ring buffer had no room."""
        return sum(self._program.per_cpu_sums("lost"))

    def describe(self, fds: list[int]) -> ProgramDescription:
        """For another process: the loaded object, its descriptors added to `fds`."""
        assert isinstance(self._program, Program)  # noqa: S101
        return self._program.describe(fds)

    def close(self) -> None:
        """Detaches; idempotent."""
        self._program.close()


def _load() -> tuple[Program, Sequence[Hook]]:
    require_tracing()
    require_bcc()
    member = ("sock_common", "skc_num")
    offset = btf.offsets(btf.VMLINUX, [member])[member]
    if offset is None:
        raise PreflightError("the kernel's BTF has no sock_common.skc_num", "ebpf-mig doctor")
    program = Program("trigger.bpf.c", {"OFF_skc_num": offset}, CONTRACT)
    for hook in _HOOKS:
        program.load_hook(hook)
    return program, [*_HOOKS, *_memslot_hooks(program)]


def _memslot_hooks(program: Program) -> list[Hook]:
    """The function in which logging begins, loaded, if it was seen to fire; which takes run statistics."""
    with contextlib.closing(BpfStatistics()) as statistics:
        if not statistics.enabled:
            return []
        with contextlib.closing(Chooser(AUTO, MEMSLOTS)) as chooser:
            fired, _ = chooser.fired()
            hooks = [hook for f in MEMSLOTS if f in fired for hook in chooser.hooks(f, fired[f][1], fired[f][0])][:1]
            for hook in hooks:
                program.load_hook(hook, chooser.module_fd)
    return hooks
