# SPDX-License-Identifier: Apache-2.0
"""A loaded program with its hooks, ready to be attached, and its description for another process.

In: a loaded program and its hooks. Out: a `Plan`, a `PlanDescription`. File descriptors are sent separately from the
description.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from ebpf_mig.probes.hook import Hook
from ebpf_mig.probes.inherited import InheritedProgram, ProgramDescription
from ebpf_mig.probes.program import BpfProgram

SAMPLER = "on_sample"
"""The perf event program of `bpf/stack_sampler.bpf.c`."""


WALKER = "on_task"
"""The iterator program of `bpf/inside_kvm.bpf.c`."""


@dataclass(frozen=True)
class Plan:
    """A loaded program, ready to be attached."""

    hooks: tuple[Hook, ...]
    """In the order of attaching; detached in reverse order. Extras come first, so that the first records of the others
    are complete. Exits come before entries, so that no call seems to lack its exit.
    """
    program: BpfProgram
    tiers: dict[str, str]
    """Attach tier by signal."""
    sampler_fd: int = -1
    """The program that samples stacks inside dirty-log ioctls; -1 if it is not wanted or the kernel refused it."""
    walker_fd: int = -1
    """The program that finds the threads inside KVM; -1 if the kernel refused it."""


class PlanDescription(msgspec.Struct, frozen=True):
    """Describes a `Plan` for another process; the descriptors are sent separately."""

    hooks: list[Hook]
    tiers: dict[str, str]
    """Attach tier by signal, as it was after arming."""
    program: ProgramDescription


def receive_plan(description: PlanDescription, fds: Sequence[int]) -> Plan:
    """Rebuilds the plan in the process that received `fds`."""
    program = InheritedProgram(description.program, fds)
    return Plan(
        tuple(description.hooks), program, description.tiers, program.descriptor(SAMPLER), program.descriptor(WALKER)
    )
