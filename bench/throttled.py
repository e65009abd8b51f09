# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the window's begin while QEMU throttles the guest: many auto-converge migrations against QEMU's trace.

In: a number of runs. Out: a Markdown table on stdout, and the worst run. Exit code 1 if a window begins more than 1 ms
from QEMU's change of the run state, which directly precedes its kicks (system/cpus.c, `do_vm_stop`). QMP's STOP comes
later, after all vCPUs have stopped and the devices' handlers have run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from ebpf_mig.recording.events import Mark
from tests.integration.migrations import CONVERGING, THROTTLE_AT_ONCE, Traced, first, migrate

BOUND_NS = 1_000_000


def stop_after_request(run: Traced) -> int:
    """QMP's STOP minus the begin of our window, in ns."""
    stop = next(e for e in run.recording.events if isinstance(e, Mark) and e.name == "qmp.STOP")
    return stop.at_ns - run.origin_ns


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--vmm-binary")
    options = parser.parse_args()
    print("| run | run state before the request ms | STOP after it ms | window ms | throttled ms | right before ms |")
    print("|--:|--:|--:|--:|--:|--:|")
    found, stops = [], []
    for number in range(1, options.runs + 1):
        with tempfile.TemporaryDirectory() as directory:
            run = migrate(Path(directory), CONVERGING, binary=options.vmm_binary, extra=THROTTLE_AT_ONCE)
            changed = first(run.source_trace, "runstate_set", "finish-migrate")
        found.append(run.origin_ns - changed.at_ns)
        stops.append(stop_after_request(run))
        throttled = run.breakdown.throttled
        dark = (throttled.dark_ns, throttled.before_request_ns) if throttled else (0, 0)
        figures = (found[-1], stops[-1], run.breakdown.window_ns or 0, *dark)
        print(f"| {number} | " + " | ".join(f"{ns / 1e6:.3f}" for ns in figures) + " |", flush=True)
    worst = max(found, key=abs)
    for what, late in (("the run state", found), ("STOP", stops)):
        far = max(late, key=abs)
        near = sum(abs(ns) <= BOUND_NS for ns in late)
        print(f"\n{what}: {near} of {len(late)} within 1 ms, the farthest {far / 1e6:.3f} ms")
    return 0 if abs(worst) <= BOUND_NS else 1


if __name__ == "__main__":
    sys.exit(main())
