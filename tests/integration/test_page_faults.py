# SPDX-License-Identifier: Apache-2.0
"""Pages that a real QEMU's guest waits for after its start: postcopy, and a background-snapshot.

Witnesses: bpftrace counts and times the sleeps of the vCPUs' threads by their stack. QEMU's own figures are less:
its handler does not see a fault whose page comes before it has read the request. The kernel counts such faults as major
ones if it copies from the guest itself, as here, where KVM emulates.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from ebpf_mig.breakdown import PageSource, PageWaits
from ebpf_mig.collector import analyse
from ebpf_mig.lab.scenario import MIB
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import TRACING, requires
from tests.integration.exporters import running
from tests.integration.migrations import QUICK, parse_trace
from tests.integration.qemu_snapshots import write
from tests.integration.test_results import Qmp

pytestmark = requires(*TRACING, "bpftrace", "private mount namespaces")

MS = 1_000_000
MOUNTED = ["unshare", "--mount", "sh", "-c", 'mount -t tracefs nodev /sys/kernel/tracing; exec bpftrace -e "$1"', "sh"]
SLEEPS = """
BEGIN { printf("ready\\n"); }
tracepoint:sched:sched_switch /args->prev_state && (PREV)/ {
  @since[args->prev_pid] = nsecs; @stack[args->prev_pid] = kstack(40); }
tracepoint:sched:sched_switch /@since[args->next_pid]/ {
  $slept = nsecs - @since[args->next_pid];
  @count[args->next_pid, @stack[args->next_pid]] = count();
  @sum[args->next_pid, @stack[args->next_pid]] = sum($slept);
  @longest[args->next_pid, @stack[args->next_pid]] = max($slept);
  delete(@since[args->next_pid]); }
END { clear(@since); clear(@stack); }
"""
READS = "tracepoint:syscalls:sys_exit_read /pid == PID && args->ret > 0/ { @read[pid, tid] = sum(args->ret); }\n"
"""A userfaultfd gives 32 bytes for each fault."""


class Watcher:
    """What bpftrace saw."""

    def __init__(self, process: Popen[str]) -> None:
        self._process, self.said = process, ""

    def sleeps(self, what: str, tid: int) -> int:
        """@count, @sum (ns) or @longest (ns) of the sleeps of a thread in handle_userfault(), inside KVM_RUN."""
        found = re.findall(rf"@{what}\[{tid}, \n(.*?)\n\]: (\d+)", self.said, flags=re.DOTALL)
        mine = [int(number) for stack, number in found if "handle_userfault" in stack and "vcpu_ioctl_run" in stack]
        return max(mine, default=0) if what == "longest" else sum(mine)

    def messages(self, pid: int, tid: int) -> int:
        """How many faults a thread read, if it reads nothing else."""
        found = re.search(rf"@read\[{pid}, {tid}\]: (\d+)", self.said)
        return int(found[1]) // 32 if found else 0

    def end(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self.said = self._process.communicate(timeout=150)[0]


@contextmanager
def watched(tids: Sequence[int], more: str = "") -> Iterator[Watcher]:
    script = more + SLEEPS.replace("PREV", " || ".join(f"args->prev_pid == {tid}" for tid in tids))
    with running(*MOUNTED, script, stdout=PIPE) as process:
        assert process.stdout is not None
        while "ready" not in (line := process.stdout.readline()):
            assert line, "bpftrace does not start"
        yield Watcher(process)


def threads_of(q: Qmp) -> dict[int, int]:
    """Its vCPUs' threads, by index."""
    return {cpu["cpu-index"]: cpu["thread-id"] for cpu in q("query-cpus-fast")}


def compare(waits: Sequence[PageWaits], watcher: Watcher, tid: int) -> PageWaits:
    """Whether all sleeps for the handler are there."""
    count, slept, longest = (watcher.sleeps(what, tid) for what in ("count", "sum", "longest"))
    none = PageWaits(source=PageSource.USERFAULTFD, count=0, waited_ns=0, longest_ns=0, last_ns=0)
    found = next((one for one in waits if one.source == PageSource.USERFAULTFD), none)
    assert abs(found.count - count) <= 1 + count // 100, (found, count)
    assert abs(found.waited_ns - slept) <= 0.02 * slept + count * 20_000, (found, slept)
    assert abs(found.longest_ns - longest) <= MS, (found, longest)
    assert found.longest_ns <= found.waited_ns <= found.last_ns
    return found


@pytest.mark.parametrize("vcpus", [1, pytest.param(2, marks=pytest.mark.long)])
def test_postcopy(vcpus: int, tmp_path: Path) -> None:
    guest = replace(QUICK, memory_bytes=256 * MIB, working_set_bytes=64 * MIB, pages_per_s=None, vcpus=vcpus)
    extra = ["-trace", "postcopy_ram_fault_thread_request", "-D", f"{tmp_path}/{{role}}.trace"]
    with QemuPair(guest, extra=extra) as pair:
        source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
        threads = threads_of(destination)
        for end in (source, destination):
            end.capability("postcopy-ram", "postcopy-blocktime", "return-path")
            end("migrate-set-parameters", **{"max-bandwidth": 64 * MIB})
        pids = [word for vm in (pair.source, pair.destination) for word in ("--pid", str(vm.pid))]
        command = [sys.executable, "-m", "ebpf_mig", "record", *pids, "-o", str(tmp_path / "x.rec")]
        with watched(list(threads.values())) as watcher, running(*command, stderr=PIPE) as process:
            assert process.stderr is not None and "tracing" in process.stderr.readline()
            destination("migrate-incoming", uri=pair.uri)
            source("migrate", uri=pair.uri)
            time.sleep(0.5)
            source("migrate-start-postcopy")
            assert source.reaches("completed", "failed") == "completed"
            said = process.communicate(timeout=60)[1]
            watcher.end()
        assert process.returncode == 0, said
        blocked = destination("query-migrate")["postcopy-vcpu-blocktime"]
    b = analyse(read_recording(tmp_path / "x.rec")).breakdown
    assert (b.migration.mode, b.migration.result) == ("postcopy", "completed")
    assert b.page_faults is not None and len(b.page_faults) == vcpus
    asked = [line.text for line in parse_trace(tmp_path / "destination.trace", 0)]
    assert any(row.waits for row in b.page_faults), "the guest waited for no page"
    for row in b.page_faults:
        tid = threads[row.vcpu]
        found = compare(row.waits, watcher, tid)
        requests = sum(f"pid={tid}" in text.split() for text in asked)
        assert requests <= found.count and blocked[row.vcpu] * MS <= found.waited_ns + requests * MS
        assert row.major is not None and (row.major == 0 or found.count <= row.major + 1)


def test_a_background_snapshot(tmp_path: Path) -> None:
    """QEMU reads each fault that it sees from its userfaultfd."""
    guest = replace(QUICK, working_set_bytes=32 * MIB, pages_per_s=None)
    with QemuPair(guest) as pair:
        source = Qmp(pair.source.qmp)
        source.capability("background-snapshot")
        (tid,) = threads_of(source).values()
        command = [sys.executable, "-m", "ebpf_mig", "record", "--pid", str(pair.source.pid), "-o", "x.rec"]
        with (
            watched([tid], READS.replace("PID", str(pair.source.pid))) as watcher,
            running(*command, stderr=PIPE, cwd=tmp_path) as process,
        ):
            assert process.stderr is not None and "tracing" in process.stderr.readline()
            write(source, f"exec:cat > {tmp_path}/state")
            said = process.communicate(timeout=30)[1]
            watcher.end()
        assert process.returncode == 0, said
    analysis = analyse(read_recording(tmp_path / "x.rec"))
    assert (analysis.breakdown.migration.mode, analysis.breakdown.migration.result) == ("snapshot", "saved")
    (row,) = analysis.breakdown.page_faults or []
    found = compare(row.waits, watcher, tid)
    assert found.count
    assert analysis.traced.switchover is not None and analysis.traced.switchover.stopper is not None
    assert 0 < watcher.messages(pair.source.pid, analysis.traced.switchover.stopper) <= found.count
