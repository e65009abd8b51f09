# SPDX-License-Identifier: Apache-2.0
"""The attach tiers compared on the same migration: with each other, with the known truth, and with bpftrace.

All tiers watch at once, each with its own programs, so that no difference can come from the migration.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ebpf_mig.linux import kvm, procfs
from ebpf_mig.linux.bpf import ITERATOR
from ebpf_mig.probes import loader, source
from ebpf_mig.probes.hook_points import FLUSHES
from ebpf_mig.probes.run_statistics import BpfStatistics, run_statistics
from ebpf_mig.probes.tiers import AUTO
from ebpf_mig.probes.tracer import Tracer
from ebpf_mig.recording.events import AnyEvent, Ending, Ioctl, Kick, Transfer
from tests.conftest import FEATURES, requires
from tests.truth.harness import PHASES, Run, migrate_by
from tests.truth.parts import Plan

pytestmark = [requires("root", "/dev/kvm", "bcc", "kernel BTF")]
everywhere = pytest.mark.everywhere("tiers")

MS = 1_000_000
ESSENTIAL = ("dirty-log", "vcpu", "state", "kick", "socket", "brownout")


def tiers() -> list[str]:
    """The tiers that this kernel has. Skips the test if there is only one."""
    found = ["tracepoint"]
    needs = {"kprobe": "kprobes", "fentry": "fentry on every function"}
    found += [tier for tier, feature in needs.items() if FEATURES[feature]()]
    if len(found) == 1:
        pytest.skip("missing feature: kprobes or fentry")
    return found


def attached_by(run: Run) -> dict[str, str]:
    return run.breakdown.completeness.attach


def bytes_sent(run: Run) -> dict[int, int]:
    """Bytes sent by each process, on sockets of which both ends were seen."""
    total: dict[int, int] = {}
    for e in run.events:
        if isinstance(e, Transfer) and e.direction == 0:
            total[e.pid] = total.get(e.pid, 0) + e.bytes
    return total


def ioctls(events: list[AnyEvent], cmds: frozenset[int]) -> list[Ioctl]:
    return sorted((e for e in events if isinstance(e, Ioctl) and e.cmd in cmds), key=lambda e: e.begin_ns)


@pytest.mark.times
@pytest.mark.parametrize("unix", [pytest.param(False, marks=everywhere, id="tcp"), pytest.param(True, id="unix")])
def test_all_tiers_tell_the_same_migration(unix: bool) -> None:
    """All tiers report the same calls, bytes and kicks. Times agree too, unless a thread lost the CPU between two
    probes.
    """
    plan = Plan(delays={p: 20 * MS for p in PHASES if p != "fetch.kernel"}, state_first=unix, vcpus=2)
    names = tiers()
    for _ in range(4):
        runs = migrate_by(names, plan, unix=unix)
        for name, run in zip(names, runs, strict=True):
            assert {attached_by(run)[signal] for signal in ESSENTIAL} == {name}
            assert attached_by(run)["vcpu-inside"] == ITERATOR
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
    """ns above the tolerance by which phases and the blackout differ between runs, or phases from the known truth.

    Each tier's programs run inside the calls that the others time. Their run time is allowed besides the tolerance.
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
@pytest.mark.times
def test_the_split_of_function_tiers_is_bpftraces(
    record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flushes and walks of one migration: by our programs, and by bpftrace's probes on the same functions."""
    monkeypatch.setattr(
        "ebpf_mig.probes.tracer.CALIBRATION_NS", 10**15
    )  # the kernel counts to the end, for each program
    if not FEATURES["bpftrace"]():
        pytest.skip("missing feature: bpftrace")
    names = [name for name in tiers() if name != "tracepoint"]
    symbols = {line.split()[2] for line in Path("/proc/kallsyms").read_text().splitlines()}
    watcher = subprocess.Popen(
        ["bpftrace", "-e", split_by_bpftrace([name for name in FLUSHES if name in symbols])],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watcher.stdout is not None
    while "ready" not in watcher.stdout.readline():
        assert watcher.poll() is None, "bpftrace does not start"
    runs = migrate_by(names, Plan(log="legacy", slots=1, first_slot_bytes=16 << 20, passes=10, dirty_pages=1000))
    watcher.send_signal(signal.SIGINT)
    said = watcher.communicate(timeout=60)[0]
    ns = {(name, int(n)): int(ns) for name, n, ns in re.findall(r"@(walk|flush|moved)\[(\d+)\]: (\d+)", said)}
    witness = [(ns["walk", n], ns["flush", n], ns["moved", n]) for n in range(len(ns) // 3)]
    assert len(witness) >= 10, "each pass but the first finds dirty pages, which are protected again and flushed"
    programs_ns = sum(map(a_program_ns, runs))
    for name, run in zip(names, runs, strict=True):
        assert attached_by(run)["split"] == name
        record_property("split", assert_split(run, witness, programs_ns))


def assert_split(run: Run, witness: list[tuple[int, int, int]], programs_ns: float) -> str:
    """Returns the figures. `witness`: ns of the walk, the flush and bpftrace's own probe between the two, by fetch.

    Programs on one function run one after the other. The last one sees the instant between walk and flush later, by the
    run time of the others and by any interruption there. So walk and flush are each compared by the median fetch. Their
    sum is compared in full.
    """
    found = ioctls(run.events, frozenset({kvm.GET_DIRTY_LOG}))
    assert all(min(e.walk_ns, e.flush_ns, e.copy_ns) >= 0 for e in found)
    assert all(e.walk_ns + e.flush_ns + e.copy_ns <= e.end_ns - e.begin_ns for e in found)
    ours = [e for e in found if e.flush_ns]
    assert len(ours) == len(witness)
    doubts = [0.03 * MS + max(e.off_cpu_ns, 0) + max(e.spin_ns, 0) for e in ours]  # bpftrace does not subtract waits
    split = [(e.walk_ns, e.flush_ns) for e in ours]
    figures = f"{attached_by(run)['split']}: {split}; bpftrace: {witness}; programs {programs_ns:.0f}, doubts {doubts}"
    both = sum(walk + flush for walk, flush, _ in witness)
    assert sum(map(sum, split)) == pytest.approx(both, rel=0.1, abs=sum(doubts)), figures
    for part in (0, 1):
        beyond = [
            abs(mine[part] - theirs[part]) - max(0.1 * theirs[part], doubt + theirs[2] + programs_ns)
            for mine, theirs, doubt in zip(split, witness, doubts, strict=True)
        ]
        assert statistics.median(beyond) <= 0, figures
    return figures


def split_by_bpftrace(flushes: list[str]) -> str:
    """A bpftrace script that times the walk and the flush of each fetch, and its own probe between the two."""
    ours = f"/pid != {os.getpid()}/"  # our self-test fires the same probes meanwhile
    return (
        'BEGIN { @n = 0; printf("ready\\n"); }\n'
        f"kretprobe:kvm_arch_sync_dirty_log {ours} {{ @synced[tid] = nsecs; }}\n"
        f"{','.join(f'kprobe:{name}' for name in flushes)} {{ $now = nsecs; if (@synced[tid]) {{\n"
        "  @depth[tid] = @depth[tid] + 1;\n"
        "  if (@depth[tid] == 1) { @walk[@n] = $now - @synced[tid]; @begun[tid] = $now;\n"
        "    @moved[@n] = nsecs - $now; } } }\n"
        f"{','.join(f'kretprobe:{name}' for name in flushes)} {{ $now = nsecs; if (@begun[tid]) {{\n"
        "  @depth[tid] = @depth[tid] - 1;\n"
        "  if (@depth[tid] == 0) { @flush[@n] = $now - @begun[tid]; @n = @n + 1;\n"
        "    delete(@synced[tid]); delete(@begun[tid]); delete(@depth[tid]); } } }\n"
        "kretprobe:kvm_get_dirty_log_protect /@synced[tid]/ { delete(@synced[tid]); }\n"
        "END { clear(@synced); clear(@begun); clear(@depth); }\n"
    )


def a_program_ns(run: Run) -> float:
    """Run time of one of our programs within a fetch, measured on the program that runs only there."""
    ending = run.events[-1]
    assert isinstance(ending, Ending)
    synced = "on_synced:kvm_arch_sync_dirty_log"
    return ending.observer_ns[synced] / ending.observer_runs[synced]


@everywhere
def test_what_auto_takes_was_seen_to_fire(record_property: Callable[[str, object], None]) -> None:
    """`auto` takes fentry if it was seen to fire, else kprobes. Each signal's tier is in the report."""
    names = tiers()
    (run,) = migrate_by((AUTO,), Plan())
    attach = attached_by(run)
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
"""An untraced process that reports the ns of 3000 system calls on request."""


@everywhere
@pytest.mark.times
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


SENDER = """
import socket
left, right = socket.socketpair()
print("ready", flush=True)
while True:
    left.sendmsg([b"x"])
    right.recvmsg(1)
"""


@everywhere
def test_calls_that_begin_while_probes_are_attached_are_not_taken_for_lost() -> None:
    """A process sends all the time while probes are attached and detached: each call is seen whole or not at all."""
    sender = subprocess.Popen([sys.executable, "-c", SENDER], stdout=subprocess.PIPE, text=True)
    assert sender.stdout is not None
    sender.stdout.readline()
    with Tracer([sender.pid]) as tracer:
        tracer.arm()
        events = tracer.poll(100) + tracer.finish()
        assert sum(e.calls for e in events if isinstance(e, Transfer)) > 100
        assert tracer.losses()[0] == {}
    sender.kill()
    sender.wait()


AGAIN = b"""
int on_printk(void *ctx)
{
	bpf_trace_printk("passes the tracepoint that we are on");
	return 0;
}
int on_sys_enter(void *ctx)
{
	if (bpf_get_current_pid_tgid() >> 32 == %d)
		bpf_trace_printk("begins");
	return 0;
}
"""


def test_what_the_kernel_left_out_of_a_program_is_read() -> None:
    """A program that fires its own hook is not run again inside itself: the kernel counts these runs as missed."""
    bcc = loader.require_bcc()
    os.environ["BCC_KERNEL_SOURCE"] = str(source.HEADERS)
    bpf = bcc.BPF(text=AGAIN % os.getpid(), cflags=["-w"])
    hooks = {b"bpf_trace_printk": b"on_printk", b"sys_enter": b"on_sys_enter"}
    fds = [bpf.load_func(name, bcc.BPF.RAW_TRACEPOINT).fd for name in hooks.values()]
    statistics_on = BpfStatistics()
    for tracepoint, name in hooks.items():
        bpf.attach_raw_tracepoint(tp=tracepoint, fn_name=name)
    for _ in range(5):
        os.getppid()
    for tracepoint in reversed(hooks):
        bpf.detach_raw_tracepoint(tp=tracepoint)
    (_, runs, missed), (_, _, none) = map(run_statistics, fds)
    shown = [dict(row.split(":\t") for row in procfs.text("self", "fdinfo", fd).splitlines()) for fd in fds]
    names = ("run_time_ns", "run_cnt", "recursion_misses")
    assert [run_statistics(fd) for fd in fds] == [tuple(int(rows[name]) for name in names) for rows in shown]
    statistics_on.close()
    bpf.cleanup()
    assert (missed, none) == (runs, 0) and runs >= 5
