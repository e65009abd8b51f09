# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the window's begin while QEMU throttles the guest: many auto-converge migrations against QEMU's trace.

In: a number of runs. Out: a Markdown table on stdout, and the worst run. Exit code 1 if a window begins more than 1 ms
from QEMU's change of the run state, which directly precedes its kicks (system/cpus.c, `do_vm_stop`). QMP's STOP comes
later, after all vCPUs have stopped and the devices' handlers have run. How much of that time the threads that stop the
guest could run and had no CPU is the scheduler's figure; it is in a column of its own. With --real-time QEMU's threads
get a CPU before all others (SCHED_RR), so that STOP's timestamp is a prompt witness.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from ebpf_mig.analysis.spans import merged
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import Mark, OffCpu, RunDelay
from ebpf_mig.vmm.qemu.lab import find_binary
from tests.integration.migrations import CONVERGING, THROTTLE_AT_ONCE, Traced, first, migrate

BOUND_NS = 1_000_000

_REAL_TIME = """#!/bin/sh
exec chrt --rr 1 {binary} "$@"
"""


def stop_after_request(run: Traced) -> int:
    """QMP's STOP minus the begin of our window, in ns."""
    stop = next(e for e in run.recording.events if isinstance(e, Mark) and e.name == "qmp.STOP")
    return stop.at_ns - run.origin_ns


def without_cpu(run: Traced) -> int:
    """The part of that time in which QEMU's main thread, its migration thread or a vCPU's could run and did not, ns."""
    begin, end = run.origin_ns, run.origin_ns + stop_after_request(run)
    traced = analyse(run.recording).traced
    if traced.source is None or traced.switchover is None:
        return 0
    tids = {traced.source.pid, traced.switchover.stopper, *(v.tid for v in traced.source.vcpus.values())}
    events = [e for e in run.recording.events if isinstance(e, OffCpu | RunDelay) and e.tid in tids]
    waits = [
        (e.at_ns - e.delay_ns, e.at_ns) if isinstance(e, RunDelay) else (e.begin_ns, e.end_ns)
        for e in events
        if isinstance(e, RunDelay) or e.preempted
    ]
    cut = ((max(begin, since), min(end, until)) for since, until in waits)
    return sum(until - since for since, until in merged(span for span in cut if span[0] < span[1]))


def real_time(directory: Path, binary: str) -> str:
    """A program that runs that QEMU with real-time priority (sched(7), SCHED_RR)."""
    path = directory / "qemu-real-time"
    path.write_text(_REAL_TIME.format(binary=shlex.quote(binary)))
    path.chmod(0o755)
    return str(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--vmm-binary")
    parser.add_argument("--real-time", action="store_true", help="QEMU's threads get a CPU before all others")
    options = parser.parse_args()
    print("| run | run state before the request ms | STOP after it ms | without a CPU ms | window ms ", end="")
    print("| throttled ms | right before ms |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    found, stops, busy = [], [], []
    for number in range(1, options.runs + 1):
        with tempfile.TemporaryDirectory() as directory:
            binary = find_binary(options.vmm_binary)
            if options.real_time:
                binary = real_time(Path(directory), binary)
            run = migrate(Path(directory), CONVERGING, binary=binary, extra=THROTTLE_AT_ONCE)
            changed = first(run.source_trace, "runstate_set", "finish-migrate")
        found.append(run.origin_ns - changed.at_ns)
        stops.append(stop_after_request(run))
        lost = without_cpu(run)
        busy.append(stops[-1] - lost)
        throttled = run.breakdown.throttled
        dark = (throttled.dark_ns, throttled.before_request_ns) if throttled else (0, 0)
        figures = (found[-1], stops[-1], lost, run.breakdown.window_ns or 0, *dark)
        print(f"| {number} | " + " | ".join(f"{ns / 1e6:.3f}" for ns in figures) + " |", flush=True)
    worst = max(found, key=abs)
    for what, late in (("the run state", found), ("STOP", stops), ("STOP, less the time without a CPU", busy)):
        far = max(late, key=abs)
        near = sum(abs(ns) <= BOUND_NS for ns in late)
        print(f"\n{what}: {near} of {len(late)} within 1 ms, the farthest {far / 1e6:.3f} ms")
    return 0 if abs(worst) <= BOUND_NS else 1


if __name__ == "__main__":
    sys.exit(main())
