# SPDX-License-Identifier: Apache-2.0
"""Attach tiers: which kernel functions can be hooked here, and by which kind of probe.

In: the requested tier. Out: a `Choice`: hooks on functions. Each kind of probe was *seen* to fire with an empty program
before anything is compiled. fentry and fexit are best, kprobe and kretprobe next. All other signals come from
tracepoints on system calls.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ebpf_mig.linux import bpf, btf
from ebpf_mig.linux.bpf import FENTRY, FEXIT, KPROBE, KRETPROBE
from ebpf_mig.linux.perf import KprobeEvent
from ebpf_mig.probes import selftest
from ebpf_mig.probes.hook import TRACEPOINT, Hook
from ebpf_mig.probes.hook_points import FUNCTIONS, RETURN_OF, VCPU_RETURNS, Function
from ebpf_mig.probes.run_statistics import run_statistics

AUTO = "auto"
NAMES = (AUTO, FENTRY, KPROBE, TRACEPOINT)
"""The tiers that a user can request."""

_MODULES = (btf.KVM_MODULE, btf.VSOCK_MODULE)
"""Where the types of functions are, beside the kernel's own."""
_NOTHING = bytes.fromhex("b700000000000000 9500000000000000")
"""return 0"""
_TASK_REGS = bytes.fromhex("850000009e000000 bf01000000000000 85000000af000000 b700000000000000 9500000000000000")
"""bpf_task_pt_regs(bpf_get_current_task_btf()), helpers 175 and 158."""


@dataclass(frozen=True)
class Choice:
    """The hooks on functions, and why there are not more."""

    hooks: tuple[Hook, ...] = ()
    groups: frozenset[str] = frozenset()
    refusals: dict[str, str] = field(default_factory=dict)
    """Hooks by group."""
    task_regs: bool = True
    """Whether the kernel has the helper that returns the registers of the current task."""
    trace_events: bool = False
    """Whether system calls and returns of KVM_RUN are hooked as trace events, not as raw tracepoints."""


class _Trial:
    """An empty probe, attached to see whether it fires."""

    def __init__(self, hook: Hook, module_fd: int, *, again: bool) -> None:
        """`again`: also try whether it can be attached a second time."""
        self.hook = hook
        self._event: KprobeEvent | None = None
        self._link = -1
        self._program = bpf.load(_NOTHING, hook.how, hook.btf_id, module_fd)
        try:
            if hook.how in (FENTRY, FEXIT):
                if again:  # Linux before 5.18 may refuse
                    os.close(bpf.attach_tracing(self._program))
                self._link = bpf.attach_tracing(self._program)
            else:
                self._event = KprobeEvent(hook.target, hook.how)
                self._event.attach(self._program)
        except OSError:
            self.close()
            raise

    def fired(self) -> bool:
        return run_statistics(self._program)[1] > 0

    def close(self) -> None:
        if self._event is not None:
            self._event.close()
        for fd in (self._link, self._program):
            if fd >= 0:
                os.close(fd)
        self._link = self._program = -1


class Chooser:
    """Tries functions. Use it once; the run statistics of BPF programs must be on."""

    def __init__(self, wanted: str, functions: tuple[Function, ...] = FUNCTIONS, *, again: bool = False) -> None:
        """`again`: accept only probes that can be attached a second time, as the exporter does."""
        self._wanted = wanted
        self._again = again
        self._functions = functions
        self._types = self._known_types()
        self._module_fds = {name: bpf.module_btf(name) for name in {t.module for t in self._types.values()} - {""}}

    def close(self) -> None:
        """Closes the modules' BTF; programs that were loaded with it keep it."""
        for fd in self._module_fds.values():
            if fd >= 0:
                os.close(fd)
        self._module_fds = {}

    def module_fd(self, hook: Hook) -> int:
        """The BTF of the module that the hook's function is part of; 0 if that is the kernel."""
        return self._module_fds[hook.module] if hook.module else 0

    def _known_types(self) -> dict[str, btf.FunctionType]:
        names = {name for function in self._functions for name in function.names}
        types = btf.functions(btf.VMLINUX, names)
        for module in _MODULES:
            if Path(module).exists():
                types = btf.functions(module, names - types.keys(), base=btf.VMLINUX) | types
        return types

    def fired(self) -> tuple[dict[Function, tuple[str, str]], dict[str, str]]:
        """(kind of probe and name for each function that can be hooked, reason for each one that cannot)."""
        chosen: dict[Function, tuple[str, str]] = {}
        why: dict[str, str] = {}
        for how in (FENTRY, KPROBE):
            if self._wanted in (AUTO, how):
                tried = [f for f in self._functions if f not in chosen and self._may(f, how)]
                chosen |= {function: (how, name) for function, name in self._seen(tried, how, why)}
        return chosen, why

    def choose(self) -> Choice:
        """Hooks with the best kind of probe that fires, for each group whose functions can all be hooked."""
        chosen, why = self.fired()
        open_ones = [function for function in self._functions if function not in chosen]
        groups, refusals = set(), {}
        for group in ("kvm", "socket", "split"):
            lacking = [f.names[0] for f in open_ones if f.group == group and f.required]
            had = {f.one_of for f in chosen}
            lacking += [f.names[0] for f in open_ones if f.group == group and f.one_of and f.one_of not in had]
            if lacking:
                refusals[group] = "; ".join(why.get(name, f"{name}: no {self._wanted} probe") for name in lacking)
            else:
                groups.add(group)
        if "kvm" not in groups:  # system calls are traced then, and they show sends and receives at no extra cost
            refusals |= dict.fromkeys(groups, refusals["kvm"])
            groups = set()
        hooks = [hook for f, (how, name) in chosen.items() if f.group in groups for hook in self.hooks(f, name, how)]
        if groups and any(hook.how == KPROBE and hook.target == "kvm_vcpu_ioctl" for hook in hooks):
            hooks = self._vcpu_returns() + hooks
        return Choice(tuple(hooks), frozenset(groups), refusals, has_task_regs())

    def _may(self, function: Function, how: str) -> bool:
        """kretprobe instances are limited and receives sleep long, so sockets use them only on request."""
        if function.group != "socket":
            return True
        return how == FENTRY or (self._wanted == KPROBE and how in (function.entry or function.exit))

    def _seen(self, functions: Iterable[Function], how: str, why: dict[str, str]) -> Iterator[tuple[Function, str]]:
        trials: list[tuple[Function, _Trial]] = []
        for function in functions:
            for name in function.names:
                try:
                    hook = self._hook(function, name, how)
                    trials.append((function, _Trial(hook, self.module_fd(hook), again=self._again and not trials)))
                except OSError as error:
                    why[function.names[0]] = f"{how} on {name}: {error.strerror or error}"
                    continue
                break
        if trials:
            selftest.fire_all()
        for function, trial in trials:
            if trial.fired() or (how == KPROBE and not function.provoked):
                yield function, trial.hook.target
            else:
                why[function.names[0]] = f"{how} on {trial.hook.target} attaches and never fires"
            trial.close()

    def _hook(self, function: Function, name: str, how: str) -> Hook:
        """A hook at the function's entry. OSError if fentry is impossible because BTF is missing."""
        number, module = 0, ""
        if how == FENTRY:
            known = self._types.get(name)
            if known is None or (known.module and self._module_fds[known.module] < 0):
                raise OSError(0, "no type information (BTF) for it")
            if function.arguments and known.arguments != function.arguments:
                raise OSError(0, f"{known.arguments} arguments, not {function.arguments}")
            number, module = known.btf_id, known.module
        return Hook(
            how, name, "", function.signals, number, module, function.provoked, function.one_of, function.by_everybody
        )

    def hooks(self, function: Function, name: str, how: str) -> Iterator[Hook]:
        """The hooks of a function with one kind of probe. The exit comes first, so that no call is seen at its entry
        only.
        """
        at_entry = self._hook(function, name, how)
        for programs, kind in ((function.exit, RETURN_OF[how]), (function.entry, how)):
            if how in programs:
                yield replace(at_entry, how=kind, program=programs[how])

    def _vcpu_returns(self) -> list[Hook]:
        hooks: list[Hook] = []
        for function in VCPU_RETURNS:
            with contextlib.suppress(OSError):
                KprobeEvent(function.names[0], KRETPROBE).close()
                hooks += list(self.hooks(function, function.names[0], KPROBE))
        return hooks


def has_task_regs() -> bool:
    """Whether the kernel gives BPF programs the registers of a task at its entry (Linux 5.15)."""
    try:
        os.close(bpf.load(_TASK_REGS, KPROBE))
    except OSError:
        return False
    return True
