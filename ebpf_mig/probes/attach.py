# SPDX-License-Identifier: Apache-2.0
"""Chooses the attach points: for each signal, the best tier that was *seen* to work.

In: the processes to trace, the requested tier. Out: a loaded `Plan`; once attached, a table of signal -> tier for the
report. A tier works only if a call that we provoke runs its program. A successful attach is not enough: on some kernels
fentry attaches and never fires. Functions are tried before anything is compiled (`tiers`), and every program is checked
again after it was attached.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import btf
from ebpf_mig.linux.bpf import ITERATOR, iterate
from ebpf_mig.linux.capabilities import require_tracing
from ebpf_mig.linux.perf import has_trace_event
from ebpf_mig.probes import selftest, uring
from ebpf_mig.probes.hook import TRACE_EVENT, TRACEPOINT, Hook
from ebpf_mig.probes.hook_points import EXTRAS, HIDDEN_SENDS, Extra
from ebpf_mig.probes.loader import SAMPLING, Program, require_bcc
from ebpf_mig.probes.macros import defines
from ebpf_mig.probes.plan import SAMPLER, WALKER, Plan, PlanDescription
from ebpf_mig.probes.records import CONTRACT
from ebpf_mig.probes.run_statistics import BpfStatistics
from ebpf_mig.probes.tiers import AUTO, NAMES, Choice, Chooser

FAMILY = "trace.bpf.c"
KVM_SIGNALS = ("dirty-log", "vcpu", "state", "kick", "brownout")
INSIDE = "vcpu-inside"
"""Which threads are inside KVM_RUN when tracing begins and ends."""
_USERSPACE_EXIT = Hook(TRACEPOINT, "kvm_userspace_exit", "on_kvm_userspace_exit", ("vcpu",))
_CALLS = (Hook(TRACEPOINT, "sys_enter", "on_sys_enter"), Hook(TRACEPOINT, "sys_exit", "on_sys_exit"))
_SUBSYSTEMS = {"kvm_userspace_exit": "kvm", "sys_enter": "raw_syscalls", "sys_exit": "raw_syscalls"}
"""Directories in tracefs of the tracepoints of which no event may be missed."""
_PREEMPTIBLE_SINCE = 7


def load(
    pids: Sequence[int],
    tier: str,
    statistics: BpfStatistics,
    beside: Callable[[], object] = bool,
    *,
    user_stacks: bool = False,
) -> Plan:
    """Compiles and loads the best programs that the kernel accepts for the requested tier (`NAMES`); attaches nothing.

    Without pids the plan is for a node: processes are added later, and it is armed more than once. PreflightError if
    privileges are missing, or if a tier that was requested by name does not work. `beside` is called right before the
    compiler runs, to start other work. `user_stacks`: the programs also record the user half of stacks.
    """
    require_tracing()
    try:
        known = btf.tracepoints(btf.VMLINUX, [name for extra in EXTRAS for name, _ in extra.all_hooks])
        tracepoints = uring.usable(known)
        require_bcc()
        choice, chooser = _choose(tier, statistics, again=not pids)
        choice = replace(choice, trace_events=bool(pids) and preemptible_tracepoints())
        with contextlib.closing(chooser) if chooser else contextlib.nullcontext():
            hooks = tuple(_hooks(choice, tracepoints))
            beside()
            program = Program(FAMILY, defines(pids, tracepoints, choice, user_stacks=user_stacks), CONTRACT)
            for hook in hooks:
                program.load_hook(hook, chooser.module_fd(hook) if chooser else 0)
        tiers, sampler_fd = _tiers(choice, tracepoints), -1
        tiers[INSIDE], walker_fd = _load_walker(program)
    finally:
        btf.forget()
    if "split" not in choice.groups:  # where no function inside the ioctl can be hooked, samples show what it did
        tiers["split"], sampler_fd = _load_sampler(program)
    return Plan(hooks, program, tiers, sampler_fd, walker_fd)


def _load_sampler(program: Program) -> tuple[str, int]:
    """(tier of the signal `split`, program descriptor or -1)."""
    try:
        return "samples", program.load(SAMPLER, SAMPLING)
    except PreflightError as error:
        return f"absent: {error}", -1


def _load_walker(program: Program) -> tuple[str, int]:
    """(tier of the signal `vcpu-inside`, program descriptor or -1)."""
    try:
        walker_fd = program.load_iterator(WALKER, "task")
        iterate(walker_fd)
    except (PreflightError, OSError) as error:
        return f"absent: {error}", -1
    return ITERATOR, walker_fd


def _choose(tier: str, statistics: BpfStatistics, *, again: bool = False) -> tuple[Choice, Chooser | None]:
    if tier not in NAMES:
        raise PreflightError(f"there is no tier {tier!r}", f"one of {', '.join(NAMES)}")
    if tier == TRACEPOINT:
        return Choice(refusals=dict.fromkeys(("kvm", "socket", "split"), "not asked for")), None
    if not statistics.enabled:
        why = "the kernel does not count the runs of BPF programs, so no probe can be seen to fire"
        if tier != AUTO:
            raise PreflightError(f"tier {tier}: {why}", "run with CAP_SYS_ADMIN, or without --tier")
        return Choice(refusals=dict.fromkeys(("kvm", "socket", "split"), why)), None
    chooser = Chooser(tier, again=again)
    choice = chooser.choose()
    if tier != AUTO and not {"kvm", "socket"} <= choice.groups:
        why = "; ".join(sorted(set(choice.refusals.values())))
        raise PreflightError(
            f"tier {tier} does not work here: {why}", "leave --tier out to use the best tier that works"
        )
    return choice, chooser


def _hooks(choice: Choice, tracepoints: set[str]) -> list[Hook]:
    extras = [extra for extra in EXTRAS if _has(extra, tracepoints)]
    if "socket" in choice.groups:
        extras = [extra for extra in extras if extra is not HIDDEN_SENDS]
    hooks = [
        Hook(TRACEPOINT, name, program, (extra.signal,), provoked=False)
        for extra in extras
        for name, program in extra.all_hooks
        if name in tracepoints
    ]
    if "kvm" in choice.groups:
        hooks.append(_undisturbed(_USERSPACE_EXIT, choice))
    if not {"kvm", "socket"} <= choice.groups:
        hooks += [_undisturbed(hook, choice) for hook in _CALLS]
    return hooks + list(choice.hooks)


def preemptible_tracepoints() -> bool:
    """Whether a raw tracepoint's program can be preempted, and tracefs shows another way to attach it.

    Linux 7 runs it under SRCU instead of with preemption off (__BPF_DECLARE_TRACE, include/trace/bpf_probe.h). Until it
    continues, the kernel skips it for all threads on that CPU. A program on a trace event still runs with preemption
    off (perf_trace_##call, include/trace/perf.h). That is slower, and perf_event_open needs a privilege that the
    exporter has only while it loads.
    """
    return int(os.uname().release.partition(".")[0]) >= _PREEMPTIBLE_SINCE and all(
        has_trace_event(f"{subsystem}/{name}") for name, subsystem in _SUBSYSTEMS.items()
    )


def _undisturbed(hook: Hook, choice: Choice) -> Hook:
    if not choice.trace_events:
        return hook
    return replace(hook, how=TRACE_EVENT, target=f"{_SUBSYSTEMS[hook.target]}/{hook.target}")


def _has(extra: Extra, tracepoints: set[str]) -> bool:
    several = not extra.one_of or any(name in tracepoints for name, _ in extra.one_of)
    return several and all(name in tracepoints for name, _ in extra.hooks)


def _tiers(choice: Choice, tracepoints: set[str]) -> dict[str, str]:
    """The table of signal -> tier. A return probe has the tier of the probe at the entry."""
    table = {extra.signal: TRACEPOINT if _has(extra, tracepoints) else "absent: no such tracepoint" for extra in EXTRAS}
    table |= dict.fromkeys((*KVM_SIGNALS, "socket"), TRACEPOINT)
    others = ("pipe", "file", "shutdown", *(("vsock",) if selftest.VSOCK_MODULE.exists() else ()))
    table |= dict.fromkeys(others, "absent: not hooked" if "socket" in choice.groups else TRACEPOINT)
    entries = {"fexit": "fentry", "kretprobe": "kprobe"}
    kinds: dict[str, set[str]] = {}
    for hook in choice.hooks:
        for signal in hook.signals:
            kinds.setdefault(signal, set()).add(entries.get(hook.how, hook.how))
    return table | {signal: "+".join(sorted(of_signal)) for signal, of_signal in kinds.items()}


def arm(plan: Plan, statistics: BpfStatistics, *, seen: bool, by_everybody: bool) -> dict[str, str]:
    """Attaches everything and returns the table signal -> tier; PreflightError if a hook that must fire is silent.

    `seen`: the hooks were seen to fire before, so nothing is provoked. `by_everybody`: also those that every process
    pays for.
    """
    for hook in plan.hooks:
        if by_everybody or not hook.by_everybody:
            plan.program.attach(hook)
    if seen:
        return dict(plan.tiers)
    if not statistics.enabled:
        doubtful = {s: f"{t} (not verified)" for s, t in plan.tiers.items() if s in (*KVM_SIGNALS, "socket")}
        return plan.tiers | doubtful
    selftest.fire_all()
    ran = plan.program.run_statistics()
    # A function that fired only because of another VM during the trial is silent now; another of its name fires.
    alive = {(hook.one_of, hook.program) for hook in plan.hooks if hook.one_of and ran[hook.key][1]}
    silent = [
        hook.key
        for hook in plan.hooks
        if hook.provoked and not ran[hook.key][1] and (hook.one_of, hook.program) not in alive
    ]
    if silent:
        raise PreflightError(
            f"{', '.join(silent)} attached but never ran", "run ebpf-mig doctor, or use --tier tracepoint"
        )
    return dict(plan.tiers)


def arm_costly(plan: Plan) -> None:
    """Attaches the hooks for which every process pays."""
    for hook in plan.hooks:
        if hook.by_everybody:
            plan.program.attach(hook)


def disarm(plan: Plan, *, by_everybody: bool) -> None:
    """Detaches everything; the maps stay readable. `by_everybody`: as it was attached."""
    for hook in reversed(plan.hooks):
        if by_everybody or not hook.by_everybody:
            plan.program.detach(hook)


def describe(plan: Plan, attached: dict[str, str], fds: list[int]) -> PlanDescription:
    """Describes an armed plan of this process for another process. Adds its descriptors to `fds`."""
    assert isinstance(plan.program, Program)  # noqa: S101
    return PlanDescription(list(plan.hooks), attached, plan.program.describe(fds))
