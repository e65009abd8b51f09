# SPDX-License-Identifier: Apache-2.0
"""The choice of functions and the resulting table of tiers, as far as it can be tested without kprobes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ebpf_mig.analysis.completeness import ESSENTIAL
from ebpf_mig.errors import PreflightError
from ebpf_mig.probes import attach, hook_points
from ebpf_mig.probes.hook import TRACE_EVENT, Hook
from ebpf_mig.probes.hook_points import EXTRAS, FUNCTIONS
from ebpf_mig.probes.loader import Program
from ebpf_mig.probes.macros import STACK_AS_IT_LEAVES, STACK_WHEN_BACK, defines
from ebpf_mig.probes.plan import Plan
from ebpf_mig.probes.records import CONTRACT
from ebpf_mig.probes.source import source_text
from ebpf_mig.probes.tiers import Choice
from tests.conftest import requires

TRACEPOINTS = {name for extra in EXTRAS for name, _ in extra.all_hooks}
ALL = frozenset({"kvm", "socket", "split"})


class Counting:
    """Run statistics, on or off."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled


def test_system_calls_carry_what_functions_do_not() -> None:
    table = attach._tiers(Choice(), TRACEPOINTS)
    assert {table[signal] for signal in ESSENTIAL} == {"tracepoint"}
    hooked = [hook.target for hook in attach._hooks(Choice(), TRACEPOINTS)]
    assert {"sys_enter", "sys_exit", "sock_send_length"} <= set(hooked) and "kvm_userspace_exit" not in hooked


def test_stacks_are_taken_when_a_thread_is_back_where_the_kernel_shows_that() -> None:
    """The hook that ends a wait is attached first. Without it, stacks are taken as before."""
    hooked = [hook.target for hook in attach._hooks(Choice(), TRACEPOINTS)]
    assert hooked.index("sched_exit_tp") < hooked.index("sched_switch")
    older = TRACEPOINTS - {"sched_exit_tp"}
    assert "sched_exit_tp" not in {hook.target for hook in attach._hooks(Choice(), older)}
    assert attach._tiers(Choice(), older) == attach._tiers(Choice(), TRACEPOINTS)
    with_it, without = defines([1], TRACEPOINTS), defines([1], older)
    assert (with_it["WAIT_STACKS"], without["WAIT_STACKS"]) == (STACK_WHEN_BACK, STACK_AS_IT_LEAVES)


@pytest.mark.parametrize("name", ["io_uring_submit_req", "io_uring_submit_sqe"])
def test_a_ring_is_seen_in_every_tier_by_the_names_that_the_kernel_has(name: str) -> None:
    """The completion is attached first. Without either name for the submission, or without it, the signal is absent."""
    here = TRACEPOINTS - {"io_uring_submit_req", "io_uring_submit_sqe"} | {name}
    for choice in (Choice(), Choice((), ALL)):
        hooked = [hook.target for hook in attach._hooks(choice, here)]
        assert [target for target in hooked if "io_uring" in target] == ["io_uring_complete", name]
        assert attach._tiers(choice, here)["io-uring"] == "tracepoint"
        for lacking in (here - {name}, here - {"io_uring_complete"}):
            assert attach._tiers(choice, lacking)["io-uring"] == "absent: no such tracepoint"
            assert not [hook for hook in attach._hooks(choice, lacking) if "io_uring" in hook.target]


def test_functions_alone_leave_system_calls_alone() -> None:
    choice = Choice((Hook("fentry", "kvm_vm_ioctl", "on_kvm_ioctl", ("dirty-log", "state")),), ALL)
    hooked = [hook.target for hook in attach._hooks(choice, TRACEPOINTS)]
    assert not {"sys_enter", "sys_exit", "sock_send_length"} & set(hooked)
    assert hooked.index("kvm_userspace_exit") < hooked.index("kvm_vm_ioctl")


def test_kvm_by_functions_and_sockets_by_system_calls() -> None:
    choice = Choice((Hook("kprobe", "kvm_vm_ioctl", "on_kvm_ioctl", ("dirty-log",)),), frozenset({"kvm"}))
    hooked = {hook.target for hook in attach._hooks(choice, TRACEPOINTS)}
    assert {"sys_enter", "kvm_vm_ioctl", "kvm_userspace_exit", "sock_send_length"} <= hooked
    table = attach._tiers(choice, TRACEPOINTS)
    assert (table["dirty-log"], table["socket"]) == ("kprobe", "tracepoint")


@requires("root", "bcc", "kernel BTF")
@pytest.mark.parametrize("groups", [frozenset[str](), frozenset({"kvm"})])
def test_trace_events_have_programs_of_their_own_that_the_kernel_accepts(groups: frozenset[str]) -> None:
    """Only the tracepoints of which no event may be missed; the names in reports stay."""
    choice = Choice((), groups, trace_events=True)
    raw, hooks = (attach._hooks(replace(choice, trace_events=how), TRACEPOINTS) for how in (False, True))
    assert [hook.key for hook in hooks] == [hook.key for hook in raw]
    events = [hook for hook in hooks if hook.how == TRACE_EVENT]
    calls = {"raw_syscalls/sys_enter", "raw_syscalls/sys_exit"}
    assert {hook.target for hook in events} == calls | ({"kvm/kvm_userspace_exit"} if groups else set())
    program = Program("trace.bpf.c", defines([1], TRACEPOINTS, choice), CONTRACT)
    for hook in events:
        program.load_hook(hook)
    program.close()


@requires("root", "bcc", "kernel BTF")
@pytest.mark.parametrize(("how", "other"), [("fentry", "kprobe"), ("kprobe", "fentry")])
def test_what_is_hooked_is_compiled_and_not_what_the_other_probes_would_need(how: str, other: str) -> None:
    hooks = tuple(
        Hook(how, function.names[0], programs[how], function.signals)
        for function in FUNCTIONS
        for programs in (function.entry, function.exit)
        if how in programs
    )
    program = Program("trace.bpf.c", defines([1], TRACEPOINTS, Choice(hooks, ALL)), CONTRACT)
    assert all(program._bpf.dump_func(hook.program.encode()) for hook in hooks)
    for way in ("send", "receive"):
        with pytest.raises(Exception, match="Unknown program"):
            program._bpf.dump_func(f"on_{way}_{other}".encode())
    program.close()


def test_a_signal_of_two_kinds_of_probe_names_both() -> None:
    hooks = (
        Hook("kprobe", "kvm_vm_ioctl", "on_kvm_ioctl", ("dirty-log", "state")),
        Hook("kretprobe", "kvm_vm_ioctl", "on_kvm_ioctl_kretprobe", ("dirty-log", "state")),
        Hook("fentry", "kvm_vcpu_ioctl", "on_kvm_ioctl", ("vcpu", "state", "brownout")),
    )
    table = attach._tiers(Choice(hooks, ALL), set())
    assert (table["dirty-log"], table["vcpu"], table["state"]) == ("kprobe", "fentry", "fentry+kprobe")
    assert table["lock"] == "absent: no such tracepoint"


def test_vsock_is_absent_only_where_the_kernel_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach.selftest, "VSOCK_MODULE", tmp_path / "none")
    assert "vsock" not in attach._tiers(Choice((), ALL), set())
    monkeypatch.setattr(attach.selftest, "VSOCK_MODULE", tmp_path)
    assert attach._tiers(Choice((), ALL), set())["vsock"] == "absent: not hooked"
    assert attach._tiers(Choice(), set())["vsock"] == "tracepoint"
    hooked = (Hook("fentry", "vsock_connectible_sendmsg", "on_send_fentry", ("vsock",), module="vsock"),)
    assert attach._tiers(Choice(hooked, ALL), set())["vsock"] == "fentry"


class Loaded:
    """A program with a given number of runs per hook, by target."""

    def __init__(self, runs: dict[str, int]) -> None:
        self._runs = runs

    def attach(self, hook: Hook) -> None:
        """Attached already."""

    def run_statistics(self) -> dict[str, tuple[int, int, int]]:
        return {
            f"{program}:{name}": (0, n, 0) for name, n in self._runs.items() for program in ("on_flush", "on_ioctl")
        }


@pytest.mark.parametrize(
    ("runs", "silent"),
    [
        ({"kvm_vm_ioctl": 1, "flush_all": 1, "flush_range": 0}, ""),
        ({"kvm_vm_ioctl": 1, "flush_all": 0, "flush_range": 0}, "on_flush:flush_all, on_flush:flush_range"),
        ({"kvm_vm_ioctl": 0, "flush_all": 1, "flush_range": 1}, "on_ioctl:kvm_vm_ioctl"),
    ],
)
def test_a_function_that_another_vm_came_through_when_it_was_tried_may_be_silent(
    runs: dict[str, int], silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One function of a `one_of` group must fire. A hook without a group that never fires is an error."""
    monkeypatch.setattr(attach.selftest, "fire_all", lambda: None)
    hooks = (
        Hook("kprobe", "kvm_vm_ioctl", "on_ioctl"),
        *(Hook("kprobe", name, "on_flush", one_of="flush") for name in ("flush_all", "flush_range")),
    )
    plan = Plan(hooks, Loaded(runs), {"split": "kprobe"})  # type: ignore[arg-type]
    if silent:
        with pytest.raises(PreflightError, match=f"^{silent} attached but never ran"):
            attach.arm(plan, Counting(True), seen=False, by_everybody=True)  # type: ignore[arg-type]
    else:
        assert attach.arm(plan, Counting(True), seen=False, by_everybody=True) == {"split": "kprobe"}  # type: ignore[arg-type]


def test_without_run_statistics_no_function_is_trusted() -> None:
    choice, chooser = attach._choose("auto", Counting(False))  # type: ignore[arg-type]
    assert not choice.groups and chooser is None
    with pytest.raises(PreflightError, match=r"tier fentry: .*seen to fire"):
        attach._choose("fentry", Counting(False))  # type: ignore[arg-type]


def test_every_signal_has_a_function_and_every_program_exists() -> None:
    known = {signal for function in FUNCTIONS for signal in function.signals}
    assert ESSENTIAL | {"brownout", "split", "hidden-sends", "pipe", "file", "shutdown", "vsock"} == known
    text = source_text("from_functions.bpf.c")
    for function in (*FUNCTIONS, *hook_points.VCPU_RETURNS):
        for program in (*function.entry.values(), *function.exit.values()):
            way, _, kind = program.removeprefix("on_").rpartition("_")
            made_by_macro = (
                way in ("send", "receive", "write", "read", "file", "io_submit")
                and f"on_{way}_##" in text
                and kind in text
            )
            assert f"int {program}(" in text or f"TRACED_PROGRAM({program}," in text or made_by_macro, program


def test_what_every_process_calls_is_never_hooked_by_kprobes() -> None:
    """A read that sleeps would occupy one of the few return probes."""
    costly = [function for function in FUNCTIONS if function.by_everybody]
    assert {function.names[0].rpartition("_")[2] for function in costly} == {"read", "write"}
    assert all(set(function.entry) == {"fentry"} and set(function.exit) == {"fentry"} for function in costly)


def test_kvm_run_has_no_return_probe_among_kprobes() -> None:
    vcpu = next(function for function in FUNCTIONS if function.names == ("kvm_vcpu_ioctl",))
    assert "kprobe" not in vcpu.exit and "fentry" in vcpu.exit
