# SPDX-License-Identifier: Apache-2.0
"""The attach tiers beside each other on one and the same migration, beside its truth, and beside bpftrace.

All tiers watch at once, each with programs of its own, so that no difference can come from the migration.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ebpf_mig import kvm
from ebpf_mig.events import SKIPPED, AnyEvent, Ending, Ioctl, Kick, Transfer
from ebpf_mig.probes.functions import _FLUSHES, AUTO
from ebpf_mig.probes.tracer import Tracer
from tests.conftest import FEATURES, requires
from tests.truth.harness import PHASES, Run, migrate_by
from tests.truth.parts import Plan

pytestmark = [requires("root", "/dev/kvm", "bcc", "kernel BTF", "x86-64")]
everywhere = pytest.mark.everywhere("tiers")

MS = 1_000_000
ESSENTIAL = ("dirty-log", "vcpu", "state", "kick", "socket", "brownout")


def tiers() -> list[str]:
    """Those that this kernel has; the test is skipped where there is one only."""
    found = ["tracepoint"]
    needs = {"kprobe": "kprobes", "fentry": "fentry on every function"}
    found += [tier for tier, feature in needs.items() if FEATURES[feature]()]
    if len(found) == 1:
        pytest.skip("missing feature: kprobes or fentry")
    return found


def told(run: Run) -> dict[str, str]:
    return run.breakdown.completeness.attach


def bytes_sent(run: Run) -> dict[int, int]:
    """By process: what it sent on the sockets that both ends of show."""
    total: dict[int, int] = {}
    for e in run.events:
        if isinstance(e, Transfer) and e.direction == 0:
            total[e.pid] = total.get(e.pid, 0) + e.bytes
    return total


def ioctls(events: list[AnyEvent], cmds: frozenset[int]) -> list[Ioctl]:
    return sorted((e for e in events if isinstance(e, Ioctl) and e.cmd in cmds), key=lambda e: e.begin_ns)


@pytest.mark.parametrize("unix", [pytest.param(False, marks=everywhere, id="tcp"), pytest.param(True, id="unix")])
def test_all_tiers_tell_the_same_migration(unix: bool) -> None:
    """The same calls, bytes, kicks; and the same times, unless the machine took the CPU between two of the probes.

    A call that only some of them saw is a failure unless those that missed it say that the kernel skipped them.
    """
    plan = Plan(delays={p: 20 * MS for p in PHASES if p != "fetch.kernel"}, state_first=unix, vcpus=2)
    names = tiers()
    for _ in range(4):
        runs = migrate_by(names, plan, unix=unix)
        off = {SKIPPED: sum(run.breakdown.completeness.lost.get(SKIPPED, 0) for run in runs)}
        if off[SKIPPED]:
            continue
        for name, run in zip(names, runs, strict=True):
            assert {told(run)[signal] for signal in ESSENTIAL} == {name}
            assert run.breakdown.completeness.verdict == "complete", run.breakdown.completeness.reasons
        for one, other in itertools.combinations(runs, 2):
            assert_same_calls(one, other)
        off = differences(runs)
        if not off:
            break
    assert not off


def assert_same_calls(one: Run, other: Run) -> None:
    assert bytes_sent(one) == bytes_sent(other)
    left, right = (ioctls(r.events, kvm.DIRTY_LOG | kvm.MEMSLOT) for r in (one, other))
    assert [(e.tid, e.fd, e.cmd, e.slot, e.ret) for e in left] == [(e.tid, e.fd, e.cmd, e.slot, e.ret) for e in right]
    kicks = [[(k.tid, k.target_tid, k.signal) for k in r.events if isinstance(k, Kick)] for r in (one, other)]
    assert kicks[0] == kicks[1]
    assert {v.vcpu for v in one.breakdown.vcpus} == {v.vcpu for v in other.breakdown.vcpus} == {0, 1}
    assert len([e for e in one.events if isinstance(e, Ioctl)]) == len(
        [e for e in other.events if isinstance(e, Ioctl)]
    )


def differences(runs: list[Run]) -> dict[str, int]:
    """ns by which phases and the blackout differ between runs, or phases from the truth where it is known, if too much.

    Each tier's programs run inside the calls that the others time: so much they may differ, besides the tolerance.
    """
    cost = sum(run.breakdown.completeness.observer_window_ns or 0 for run in runs)
    off: dict[str, int] = {}
    for one, other in itertools.combinations(runs, 2):
        a, b = one.breakdown, other.breakdown
        assert a.blackout_ns is not None and b.blackout_ns is not None
        off["blackout"] = max(off.get("blackout", 0), abs(a.blackout_ns - b.blackout_ns) - MS // 2)
        for phase in PHASES:
            apart = abs(a.phase_ns(phase) - b.phase_ns(phase)) - one.tolerance(phase) - cost
            off[phase] = max(off.get(phase, 0), apart)
    for run in runs:
        for phase in PHASES:
            if phase not in run.doubtful():
                off[f"{phase} beside the truth"] = abs(run.error(phase)) - run.tolerance(phase) - cost
    return {name: ns for name, ns in off.items() if ns > 0}


@everywhere
def test_the_split_of_function_tiers_is_bpftraces(record_property: Callable[[str, object], None]) -> None:
    """Flushes and walks of one migration: by our programs, and by bpftrace's own probes on the same functions."""
    if not FEATURES["bpftrace"]():
        pytest.skip("missing feature: bpftrace")
    names = [name for name in tiers() if name != "tracepoint"]
    for _ in range(3):
        runs, witness = migrate_beside_bpftrace(names)
        programs_ns = sum(map(a_program_ns, runs))
        apart = [split_apart(*of, witness, programs_ns) for of in zip(names, runs, strict=True)]
        off = [figures for is_apart, figures in apart if is_apart]
        record_property("split", "; ".join(figures for _, figures in apart))
        if not off:
            break
    assert not off


def migrate_beside_bpftrace(names: list[str]) -> tuple[list[Run], dict[str, int]]:
    """One migration, as each tier tells it, and bpftrace's sums in ns: walk, flushed, moved; n flushes."""
    symbols = {line.split()[2] for line in Path("/proc/kallsyms").read_text().splitlines()}
    watcher = subprocess.Popen(
        ["bpftrace", "-e", split_by_bpftrace([name for name in _FLUSHES if name in symbols])],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watcher.stdout is not None
    while "ready" not in watcher.stdout.readline():
        assert watcher.poll() is None, "bpftrace does not start"
    runs = migrate_by(names, Plan(log="legacy", slots=1, first_slot_bytes=16 << 20, passes=10, dirty_pages=1000))
    watcher.send_signal(signal.SIGINT)
    said = watcher.communicate(timeout=60)[0]
    witness = {name: int(value) for name, value in re.findall(r"@(walk|flushed|moved|n): (\d+)", said)}
    assert witness["n"] >= 10, "each pass but the first finds dirty pages, which are protected again and flushed"
    return runs, witness


def split_apart(name: str, run: Run, witness: dict[str, int], programs_ns: float) -> tuple[bool, str]:
    """Whether a tier's sums are too far from bpftrace's, as when the machine took the CPU between two probes; both.

    Programs at one place run one after the other. So the instant between walk and flush is later for who comes last, by
    what the others take there; together the two are the same for all.
    """
    moved = witness["moved"] + witness["n"] * programs_ns
    found = ioctls(run.events, frozenset({kvm.GET_DIRTY_LOG}))
    assert told(run)["split"] == name
    assert all(min(e.walk_ns, e.flush_ns, e.copy_ns) >= 0 for e in found)
    with_flush = [e for e in found if e.flush_ns]
    assert len(with_flush) == witness["n"]
    assert all(e.walk_ns + e.flush_ns + e.copy_ns <= e.end_ns - e.begin_ns for e in found)
    # bpftrace does not take waits out.
    doubt = 0.03 * MS * witness["n"] + sum(max(e.off_cpu_ns, 0) + max(e.spin_ns, 0) for e in with_flush)
    walked, flushed = (sum(ns) for ns in zip(*((e.walk_ns, e.flush_ns) for e in with_flush), strict=True))
    figures = f"{name}: walk {walked}, flush {flushed}; bpftrace: {witness}; moved {moved:.0f}; doubt {doubt:.0f}"
    agrees = (
        walked + flushed == pytest.approx(witness["walk"] + witness["flushed"], rel=0.1, abs=doubt)
        and walked == pytest.approx(witness["walk"], rel=0.1, abs=doubt + moved)
        and flushed == pytest.approx(witness["flushed"], rel=0.1, abs=doubt + moved)
    )
    return not agrees, figures


def split_by_bpftrace(flushes: list[str]) -> str:
    """A script that adds up walks and flushes, and what its own probe takes between the two."""
    ours = f"/pid != {os.getpid()}/"  # we provoke our own probes meanwhile
    return (
        'BEGIN { printf("ready\\n"); }\n'
        f"kretprobe:kvm_arch_sync_dirty_log {ours} {{ @synced[tid] = nsecs; }}\n"
        f"{','.join(f'kprobe:{name}' for name in flushes)} {{ $now = nsecs; if (@synced[tid]) {{\n"
        "  @depth[tid] = @depth[tid] + 1;\n"
        "  if (@depth[tid] == 1) { @walk = @walk + ($now - @synced[tid]); @flush[tid] = $now;\n"
        "    @moved = @moved + (nsecs - $now); } } }\n"
        f"{','.join(f'kretprobe:{name}' for name in flushes)} {{ $now = nsecs; if (@flush[tid]) {{\n"
        "  @depth[tid] = @depth[tid] - 1;\n"
        "  if (@depth[tid] == 0) { @flushed = @flushed + ($now - @flush[tid]); @n = @n + 1;\n"
        "    delete(@synced[tid]); delete(@flush[tid]); delete(@depth[tid]); } } }\n"
        "kretprobe:kvm_get_dirty_log_protect /@synced[tid]/ { delete(@synced[tid]); }\n"
        "END { clear(@synced); clear(@flush); clear(@depth); }\n"
    )


def a_program_ns(run: Run) -> float:
    """What a program of ours within a fetch takes: as long as that of them which runs nowhere else."""
    ending = run.events[-1]
    assert isinstance(ending, Ending)
    synced = "on_synced:kvm_arch_sync_dirty_log"
    return ending.observer_ns[synced] / ending.observer_runs[synced]


@everywhere
def test_what_auto_takes_was_seen_to_fire(record_property: Callable[[str, object], None]) -> None:
    """fentry where it fires, else kprobes: each signal's tier is in the report, and nothing is verified by hope."""
    names = tiers()
    (run,) = migrate_by((AUTO,), Plan())
    attach = told(run)
    record_property("attach", json.dumps(attach))
    assert run.breakdown.completeness.verdict == "complete"
    best = {tier for tier in ("fentry", "kprobe") if tier in names}
    for signal_name in ("dirty-log", "vcpu", "state", "kick", "brownout"):
        assert set(attach[signal_name].split("+")) <= {"fentry", "kprobe"}, attach
    if "fentry" in best:
        assert {attach[s] for s in ESSENTIAL} == {"fentry"}


CALLER = """
import os, sys, time
def batch():
    begin = time.perf_counter_ns()
    for _ in range(3000): os.getppid()
    return time.perf_counter_ns() - begin
batch()
print("ready", flush=True)
for _ in sys.stdin:
    print(min(batch() for _ in range(9)), flush=True)
"""
"""A process that nobody traces; tells the ns of 3000 system calls when asked."""


@everywhere
def test_functions_cost_other_processes_nothing(record_property: Callable[[str, object], None]) -> None:
    names = tiers()
    other = subprocess.Popen([sys.executable, "-c", CALLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None and other.stdout is not None
    other.stdout.readline()
    took: dict[str, int] = {}
    tracers = {name: Tracer([1], tier=name) for name in names}
    for name in ["nobody", *names] * 3:
        if name in tracers:
            tracers[name].arm()
        other.stdin.write("\n")
        other.stdin.flush()
        took[name] = min(took.get(name, 1 << 62), int(other.stdout.readline()))
        if name in tracers:
            tracers[name].disarm()
    for tracer in tracers.values():
        tracer.close()
    other.kill()
    other.wait()
    record_property("cost to others", json.dumps(took))
    for name in names:
        assert name == "tracepoint" or took[name] < 1.2 * took["nobody"], took
