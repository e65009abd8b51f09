# SPDX-License-Identifier: Apache-2.0
"""What was loaded and is ready to be attached; and the same in words, for another process.

In: a loaded program and its hooks. Out: a `Plan`, a `PlanDescription`. Descriptors travel beside the description.
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


@dataclass(frozen=True)
class Plan:
    """What was loaded, ready to be attached."""

    hooks: tuple[Hook, ...]
    """Extras first, so that what the others' records carry is known from the first record on; exits before entries,
    so that no call is taken for one whose exit was missed. The last is detached first."""
    program: BpfProgram
    tiers: dict[str, str]
    """By signal."""
    sampler_fd: int = -1
    """The loaded program behind samples inside dirty-log ioctls; -1 where it is not wanted or was refused."""


class PlanDescription(msgspec.Struct, frozen=True):
    """A `Plan` for another process: the descriptors go beside it."""

    hooks: list[Hook]
    tiers: dict[str, str]
    """As they were after arming, doubts included."""
    program: ProgramDescription


def receive_plan(description: PlanDescription, fds: Sequence[int]) -> Plan:
    """The plan again, in the process that got `fds`."""
    program = InheritedProgram(description.program, fds)
    return Plan(tuple(description.hooks), program, description.tiers, program.descriptor(SAMPLER))
