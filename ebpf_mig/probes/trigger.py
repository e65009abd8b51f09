# SPDX-License-Identifier: Apache-2.0
"""Watches a node's VMs for signs that a migration may begin, without overhead for system calls.

In: the pids that own a KVM VM, added as they are found. Out: `Sign`s. New threads are seen by the tracepoint
`task:task_newtask`, connections by `sock:inet_sock_set_state`, execve(2) by `sched:sched_process_exec` (all exist since
Linux 4.16 or earlier). Where a function of KVM can be hooked, the start of dirty logging is a sign, too.
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

KINDS = {1: "process", 2: "thread", 3: "connect", 4: "accept", 5: "logging", 6: "exec"}
"""`process`: a new thread in a process that is not known to own a VM. `logging`: dirty logging of a VM starts, in any
process. `exec`: a known owner replaced itself by another program. The other signs come from known owners, too.
"""

_HOOKS = (
    Hook(TRACEPOINT, "task_newtask", "on_newtask"),
    Hook(TRACEPOINT, "inet_sock_set_state", "on_state"),
    Hook(TRACEPOINT, "sched_process_exec", "on_exec"),
)
SIGNS, LOGGING = "signs", "logging"
"""What the trigger relies on: new threads and TCP connections of a VM's process, which can be missed; or also the
function in which KVM starts to log a VM's memory, which every migration calls.
"""

_RECORD = Layout("node_record", "u64 at_ns, pid, sign")
_READ = _RECORD.reader("at_ns", "pid", "sign")
CONTRACT = Contract((_RECORD,), numbers={f"SIGN_{name.upper()}": number for number, name in KINDS.items()})
"""The contract of `bpf/trigger.bpf.c`."""


class Sign(msgspec.Struct, frozen=True):
    """A sign, and the process in which it was seen."""

    at_ns: int
    pid: int
    kind: str


class NodeProbe:
    """Compiles, loads and attaches on creation. Use it as a context manager. PreflightError if privileges are
    missing.
    """

    def __init__(self, loaded: tuple[BpfProgram, Sequence[Hook]] | None = None) -> None:
        """`loaded`: the programs that another process loaded, and their hooks. Otherwise they are loaded here, with
        LLVM.
        """
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
        """Adds `pid` as the owner of a VM. Ports on which it already listens are not seen."""
        table = self._program.table("vms")
        table[ctypes.c_uint32(pid)] = ctypes.c_uint64(0)

    def remove(self, pid: int) -> None:
        """Removes `pid`, which is gone. The program has already seen that the kernel closed its ports."""
        with contextlib.suppress(KeyError):
            del self._program.table("vms")[ctypes.c_uint32(pid)]

    def listens(self, pid: int, port: int) -> None:
        """Adds a port on which `pid` was already listening before it was added."""
        self._program.table("ports")[ctypes.c_int(port)] = ctypes.c_uint32(pid)

    def poll(self, timeout_ms: int) -> list[Sign]:
        """The signs that arrived. Waits at most `timeout_ms` for the first."""
        signs = []
        for record in self._program.poll(timeout_ms):
            at, pid, kind = _READ(record)
            signs.append(Sign(at, pid, KINDS[kind]))
        return signs

    def lost(self) -> int:
        """Number of signs that did not fit into the ring buffer."""
        return sum(self._program.per_cpu_sums("lost"))

    def describe(self, fds: list[int]) -> ProgramDescription:
        """Describes the loaded object for another process. Adds its descriptors to `fds`."""
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
    """Loads the hook on the function in which logging starts, if it was seen to fire. Needs run statistics."""
    with contextlib.closing(BpfStatistics()) as statistics:
        if not statistics.enabled:
            return []
        with contextlib.closing(Chooser(AUTO, MEMSLOTS)) as chooser:
            fired, _ = chooser.fired()
            hooks = [hook for f in MEMSLOTS if f in fired for hook in chooser.hooks(f, fired[f][1], fired[f][0])][:1]
            for hook in hooks:
                program.load_hook(hook, chooser.module_fd(hook))
    return hooks
