# SPDX-License-Identifier: Apache-2.0
"""The choice of attach points: for each signal the best tier that was *seen* to work.

In: a set of -D constants. Out: a loaded `Program`, attached, and a table signal -> tier for the report. A tier counts
as working when a call that we provoke ran its program, not when attaching returned success: fentry on some kernels
attaches and never fires. Functions are tried before anything is compiled (`functions`), and all that was attached is
looked at again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from ebpf_mig.errors import PreflightError
from ebpf_mig.probes import selftest
from ebpf_mig.probes.hook import TRACEPOINT, Hook
from ebpf_mig.probes.inherited import Description, Handed
from ebpf_mig.probes.loader import BpfStatistics, Program, require_bcc
from ebpf_mig.probes.records import CONTRACT
from ebpf_mig.probes.tiers import AUTO, NAMES, Choice, Chooser

FAMILY = "trace.bpf.c"
KVM_SIGNALS = ("dirty-log", "vcpu", "state", "kick", "brownout")
SAMPLER = "on_sample"
"""The perf event program of bpf/stack_sampler.bpf.c."""


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
_USERSPACE_EXIT = Hook(TRACEPOINT, "kvm_userspace_exit", "on_kvm_userspace_exit", ("vcpu",))


@dataclass(frozen=True)
class Plan:
    """What was loaded, ready to be attached."""

    hooks: tuple[Hook, ...]
    """Extras first, so that what the others' records carry is known from the first record on; returns before entries,
    so that no call is taken for one whose return was missed. The last is detached first."""
    program: Program | Handed
    tiers: dict[str, str]
    """By signal."""
    sampler_fd: int = -1
    """The loaded program behind samples inside dirty-log ioctls; -1 where it is not wanted or was refused."""


def load_best(
    tier: str,
    defines: Callable[[Choice], dict[str, str | int]],
    tracepoints: set[str],
    statistics: BpfStatistics,
    *,
    again: bool = False,
) -> Plan:
    """Compiles and loads, without attaching, the best that the kernel accepts of the tier asked for (`NAMES`).

    `defines` gives the -D constants for a choice, `tracepoints` those that this kernel has of all that extras want.
    `again`: it will be armed more than once. PreflightError if a tier that was asked for by name cannot be had.
    """
    require_bcc()
    choice, chooser = _chosen(tier, statistics, again=again)
    with contextlib.closing(chooser) if chooser else contextlib.nullcontext():
        hooks = tuple(_hooks(choice, tracepoints))
        constants = defines(choice)
        program = Program(FAMILY, constants, CONTRACT)
        for hook in hooks:
            program.load_hook(hook, chooser.module_fd if chooser else -1)
    plan = Plan(hooks, program, _tiers(choice, tracepoints))
    return plan if "split" in choice.groups else _with_sampler(plan)


def _chosen(tier: str, statistics: BpfStatistics, *, again: bool = False) -> tuple[Choice, Chooser | None]:
    if tier not in NAMES:
        raise PreflightError(f"there is no tier {tier!r}", f"one of {', '.join(NAMES)}")
    if tier == TRACEPOINT:
        return Choice(refusals=dict.fromkeys(("kvm", "socket", "split"), "not asked for")), None
    if not statistics.enabled:
        why = "the kernel does not count runs of BPF programs for us, so that nothing can be seen to fire"
        if tier != AUTO:
            raise PreflightError(f"tier {tier}: {why}", "run with CAP_SYS_ADMIN, or without --tier")
        return Choice(refusals=dict.fromkeys(("kvm", "socket", "split"), why)), None
    chooser = Chooser(tier, again=again)
    choice = chooser.choose()
    if tier != AUTO and not {"kvm", "socket"} <= choice.groups:
        why = "; ".join(sorted(set(choice.refusals.values())))
        raise PreflightError(f"tier {tier} cannot be had: {why}", "leave --tier out, and the best that works is taken")
    return choice, chooser


def _hooks(choice: Choice, tracepoints: set[str]) -> list[Hook]:
    extras = [extra for extra in EXTRAS if _has(extra, tracepoints)]
    if "socket" in choice.groups:
        extras = [extra for extra in extras if extra is not HIDDEN_SENDS]
    hooks = [
        Hook(TRACEPOINT, name, program, (extra.signal,), provoked=False)
        for extra in extras
        for name, program in extra.hooks
    ]
    if "kvm" in choice.groups:
        hooks.append(_USERSPACE_EXIT)
    if not {"kvm", "socket"} <= choice.groups:
        hooks += [Hook(TRACEPOINT, "sys_enter", "on_sys_enter"), Hook(TRACEPOINT, "sys_exit", "on_sys_exit")]
    return hooks + list(choice.hooks)


def _has(extra: Extra, tracepoints: set[str]) -> bool:
    return all(name in tracepoints for name, _ in extra.hooks)


def _tiers(choice: Choice, tracepoints: set[str]) -> dict[str, str]:
    """The table signal -> tier. Return probes count as what is at the entry."""
    table = {extra.signal: TRACEPOINT if _has(extra, tracepoints) else "absent: no such tracepoint" for extra in EXTRAS}
    table |= dict.fromkeys((*KVM_SIGNALS, "socket"), TRACEPOINT)
    entries = {"fexit": "fentry", "kretprobe": "kprobe"}
    kinds: dict[str, set[str]] = {}
    for hook in choice.hooks:
        for signal in hook.signals:
            kinds.setdefault(signal, set()).add(entries.get(hook.how, hook.how))
    return table | {signal: "+".join(sorted(found)) for signal, found in kinds.items()}


class Handover(msgspec.Struct, frozen=True):
    """A `Plan` for another process: the descriptors go beside it."""

    hooks: list[Hook]
    tiers: dict[str, str]
    """As they were told after arming, doubts included."""
    loaded: Description


def hand_over(plan: Plan, attached: dict[str, str], fds: list[int]) -> Handover:
    """The plan in words; its descriptors are added to `fds`. For one that was loaded and armed in this process."""
    assert isinstance(plan.program, Program)  # noqa: S101
    return Handover(list(plan.hooks), attached, plan.program.describe(fds))


def taken_over(handover: Handover, fds: Sequence[int]) -> Plan:
    """The reverse, in the process that got `fds`."""
    program = Handed(handover.loaded, fds)
    return Plan(tuple(handover.hooks), program, handover.tiers, program.descriptor(SAMPLER))


def _with_sampler(plan: Plan) -> Plan:
    """Where no functions inside the ioctl can be hooked, samples tell what it did."""
    assert isinstance(plan.program, Program)  # noqa: S101
    try:
        fd = plan.program.load(SAMPLER, sampling=True)
    except PreflightError as error:
        return replace(plan, tiers=plan.tiers | {"split": f"absent: {error}"})
    return replace(plan, sampler_fd=fd, tiers=plan.tiers | {"split": "samples"})


def arm(plan: Plan, statistics: BpfStatistics, *, seen: bool) -> dict[str, str]:
    """Attaches everything and returns the table signal -> tier; PreflightError if a hook that must fire is silent.

    `seen`: they were seen to fire before, so nothing is provoked.
    """
    for hook in plan.hooks:
        plan.program.attach(hook)
    if seen:
        return dict(plan.tiers)
    if not statistics.enabled:
        doubtful = {s: f"{t} (not verified)" for s, t in plan.tiers.items() if s in (*KVM_SIGNALS, "socket")}
        return plan.tiers | doubtful
    selftest.everything()
    ran = plan.program.run_statistics()
    # A function that only somebody else's VM came through as it was tried is silent now; another of its kind is not.
    alive = {(hook.one_of, hook.program) for hook in plan.hooks if hook.one_of and ran[hook.key][1]}
    silent = [
        hook.key
        for hook in plan.hooks
        if hook.provoked and not ran[hook.key][1] and (hook.one_of, hook.program) not in alive
    ]
    if silent:
        raise PreflightError(f"{', '.join(silent)} attached but never ran", "ebpf-mig doctor; or --tier tracepoint")
    return dict(plan.tiers)


def disarm(plan: Plan) -> None:
    """Detaches everything; the maps stay readable."""
    for hook in reversed(plan.hooks):
        plan.program.detach(hook)
