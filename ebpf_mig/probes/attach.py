# SPDX-License-Identifier: Apache-2.0
"""The choice of attach points: for each signal the best tier that was *seen* to work.

In: a set of -D constants. Out: a loaded `Program`, attached, and a table signal -> tier for the report. A tier counts
as working when a call that we provoke ran its program, not when attaching returned success: fentry on some kernels
attaches and never fires.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from ebpf_mig.errors import PreflightError
from ebpf_mig.probes.loader import BpfStatistics, Program


@dataclass(frozen=True)
class Tier:
    """One way of getting the signals: which file, which hooks, and how to make each of them fire once."""

    name: str
    family: str
    hooks: tuple[tuple[str, str], ...]
    """(raw tracepoint, function)."""
    signals: tuple[str, ...]
    provoke: Callable[[], object]


TRACEPOINT = Tier(
    name="tracepoint",
    family="syscalls.bpf.c",
    hooks=(("sys_enter", "on_sys_enter"), ("sys_exit", "on_sys_exit")),
    signals=("dirty-log", "vcpu", "state", "kick", "socket"),
    provoke=os.getppid,
)

TIERS = (TRACEPOINT,)
"""Best first."""


def load_best(defines: dict[str, str | int]) -> tuple[Tier, Program]:
    """Compiles and loads, without attaching, the best tier whose programs the kernel accepts."""
    refusals = []
    for tier in TIERS:
        try:
            program = Program(tier.family, defines)
            for _, function in tier.hooks:
                program.load(function)
        except PreflightError as error:
            refusals.append(f"{tier.name}: {error}")
            continue
        return tier, program
    raise PreflightError("no attach tier loads: " + "; ".join(refusals), "ebpf-mig doctor")


def arm(tier: Tier, program: Program, statistics: BpfStatistics) -> dict[str, str]:
    """Attaches the tier's hooks and returns the table signal -> tier; PreflightError if a hook stays silent."""
    for tracepoint, function in tier.hooks:
        program.attach_raw_tracepoint(tracepoint, function)
    if not statistics.enabled:
        return dict.fromkeys(tier.signals, f"{tier.name} (not verified)")
    tier.provoke()
    silent = [name for name, (_, runs) in program.run_statistics().items() if runs == 0]
    if silent:
        raise PreflightError(f"{', '.join(silent)} attached but never ran", "ebpf-mig doctor")
    return dict.fromkeys(tier.signals, tier.name)


def disarm(tier: Tier, program: Program) -> None:
    """Detaches the tier's hooks; the maps stay readable."""
    for tracepoint, _ in tier.hooks:
        program.detach_raw_tracepoint(tracepoint)
