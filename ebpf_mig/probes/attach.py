# SPDX-License-Identifier: Apache-2.0
"""The choice of attach points: for each signal the best tier that was *seen* to work.

In: a set of -D constants. Out: a loaded `Program`, attached, and a table signal -> tier for the report. A tier counts
as working when a call that we provoke ran its program, not when attaching returned success: fentry on some kernels
attaches and never fires.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from ebpf_mig.errors import PreflightError
from ebpf_mig.probes.handed import Description, Handed
from ebpf_mig.probes.loader import BpfStatistics, Program, require_bcc


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
    signals=("dirty-log", "vcpu", "state", "kick", "socket", "brownout"),
    provoke=os.getppid,
)

SAMPLER = "on_sample"
"""The perf event program of sampling.h."""

TIERS = (TRACEPOINT,)
"""Best first."""


@dataclass(frozen=True)
class Extra:
    """A signal that every tier can have besides its own, where the kernel has the tracepoints."""

    signal: str
    hooks: tuple[tuple[str, str], ...]


EXTRAS = (
    Extra("off-cpu", (("sched_switch", "on_sched_switch"),)),
    Extra("lock", (("contention_begin", "on_contention_begin"), ("contention_end", "on_contention_end"))),
    Extra("wire", (("tcp_probe", "on_tcp_probe"),)),
    Extra("hidden-sends", (("sock_send_length", "on_sock_send_length"),)),
)


@dataclass(frozen=True)
class Plan:
    """What was loaded, ready to be attached."""

    tier: Tier
    extras: tuple[Extra, ...]
    program: Program | Handed
    sampler_fd: int = -1
    """The loaded program behind samples inside dirty-log ioctls; -1 where it is not wanted or was refused."""
    sampler_refusal: str = ""

    def hooks(self) -> list[tuple[str, str]]:
        """Extras first, so that what the tier's records carry is known from its first record on."""
        return [hook for extra in self.extras for hook in extra.hooks] + list(self.tier.hooks)


def load_best(defines: dict[str, str | int], tracepoints: set[str]) -> Plan:
    """Compiles and loads, without attaching, the best tier whose programs the kernel accepts.

    `tracepoints` names those that this kernel has, of all that extras want.
    """
    extras = tuple(extra for extra in EXTRAS if all(name in tracepoints for name, _ in extra.hooks))
    require_bcc()
    refusals = []
    for tier in TIERS:
        try:
            program = Program(tier.family, defines)
            plan = Plan(tier, extras, program)
            for _, function in plan.hooks():
                program.load(function)
        except PreflightError as error:
            refusals.append(f"{tier.name}: {error}")
            continue
        return _with_sampler(plan, bool(defines.get("SPLIT_KNOWN")))
    raise PreflightError("no attach tier loads: " + "; ".join(refusals), "ebpf-mig doctor")


class Handover(msgspec.Struct, frozen=True):
    """A `Plan` for another process: the descriptors go beside it."""

    tier: str
    extras: list[str]
    loaded: Description
    sampler_refusal: str = ""


def hand_over(plan: Plan, fds: list[int]) -> Handover:
    """The plan in words; its descriptors are added to `fds`. For one that was loaded in this process."""
    assert isinstance(plan.program, Program)  # noqa: S101
    return Handover(
        plan.tier.name, [extra.signal for extra in plan.extras], plan.program.describe(fds), plan.sampler_refusal
    )


def taken_over(handover: Handover, fds: Sequence[int]) -> Plan:
    """The reverse, in the process that got `fds`."""
    tier = next(tier for tier in TIERS if tier.name == handover.tier)
    extras = tuple(extra for extra in EXTRAS if extra.signal in handover.extras)
    program = Handed(handover.loaded, fds)
    return Plan(tier, extras, program, program.descriptor(SAMPLER), handover.sampler_refusal)


def _with_sampler(plan: Plan, measured: bool) -> Plan:
    """Where function probes measure inside the ioctl, nobody needs samples."""
    if measured or not isinstance(plan.program, Program):
        return plan
    try:
        return replace(plan, sampler_fd=plan.program.load(SAMPLER, sampling=True))
    except PreflightError as error:
        return replace(plan, sampler_refusal=str(error))


def arm(plan: Plan, statistics: BpfStatistics) -> dict[str, str]:
    """Attaches everything and returns the table signal -> tier; PreflightError if a hook of the tier stays silent."""
    for tracepoint, function in plan.hooks():
        plan.program.attach_raw_tracepoint(tracepoint, function)
    table = {extra.signal: "absent: no such tracepoint" for extra in EXTRAS}
    table |= {extra.signal: "tracepoint" for extra in plan.extras}
    table["split"] = "samples" if plan.sampler_fd >= 0 else f"absent: {plan.sampler_refusal or plan.tier.name}"
    if not statistics.enabled:
        return table | dict.fromkeys(plan.tier.signals, f"{plan.tier.name} (not verified)")
    plan.tier.provoke()
    ran = plan.program.run_statistics()
    silent = [function for _, function in plan.tier.hooks if ran[function][1] == 0]
    if silent:
        raise PreflightError(f"{', '.join(silent)} attached but never ran", "ebpf-mig doctor")
    return table | dict.fromkeys(plan.tier.signals, plan.tier.name)


def disarm(plan: Plan) -> None:
    """Detaches everything; the maps stay readable."""
    for tracepoint, _ in plan.hooks():
        plan.program.detach_raw_tracepoint(tracepoint)
