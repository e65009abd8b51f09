# SPDX-License-Identifier: Apache-2.0
"""Converts kernel stacks to function names.

In: decoded events with stack ids or addresses. Out: the same events with names. Each name is looked up once.
"""

from __future__ import annotations

import msgspec

from ebpf_mig.probes.program import BpfProgram
from ebpf_mig.recording.events import OffCpu, Samples, VcpuSleep

_SCHEDULER = {"schedule", "__schedule", "preempt_schedule_common"}
_MAX_FRAMES, _MAX_FAULT_FRAMES = 12, 32


class Stacks:
    """Looks up names and caches them."""

    def __init__(self, program: BpfProgram) -> None:
        self._program = program
        self._of_ids: dict[str, tuple[str, ...]] = {}
        self._names: dict[str, str] = {}

    def prepare(self) -> None:
        """Reads all of /proc/kallsyms. Do not call it during a migration."""
        self._program.symbol(0)

    def named_wait(self, wait: OffCpu) -> OffCpu:
        """A wait whose stack is an id in the kernel's stack map. The scheduler's own functions are left out."""
        if not wait.stack:
            return wait
        return msgspec.structs.replace(wait, stack=self._frames(wait.stack[0])[:_MAX_FRAMES])

    def named_sleep(self, sleep: VcpuSleep) -> VcpuSleep:
        """The same for the sleeps of a vCPU. Below a page fault there can be a file system and a block device."""
        if not sleep.stack:
            return sleep
        return msgspec.structs.replace(sleep, stack=self._frames(sleep.stack[0])[:_MAX_FAULT_FRAMES])

    def _frames(self, stack_id: str) -> tuple[str, ...]:
        if stack_id not in self._of_ids:
            frames = self._program.kernel_stack("stacks", int(stack_id))
            begin = 1 + max((i for i, frame in enumerate(frames) if frame in _SCHEDULER), default=-1)
            self._of_ids[stack_id] = frames[begin:]
        return self._of_ids[stack_id]

    def named_sample(self, sample: Samples) -> Samples:
        """A sample whose stack is a list of addresses."""
        for address in sample.stack:
            if address not in self._names:
                self._names[address] = self._program.symbol(int(address))
        return msgspec.structs.replace(sample, stack=tuple(self._names[address] for address in sample.stack))

    def clear(self) -> None:
        """Clears the kernel's map, which then reuses its ids. The names of addresses stay cached."""
        self._program.table("stacks").clear()
        self._of_ids.clear()
