# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the blackout: runs many demo migrations and compares each with QEMU's own time stamps.

In: a number of runs. Out: a Markdown table for docs/accuracy.md on stdout; exit code 1 if a run was incomplete or a
partition inexact.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.commands import run
from ebpf_mig.lab.scenario import Scenario
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.vmm.qemu.migration import QemuMigration


def run_once(directory: Path, scenario: Scenario, binary: str | None) -> Breakdown:
    """One traced demo migration."""
    path = str(directory / "run.rec")
    writer = functools.partial(run.open_recording, path, "accuracy", force=True)
    with QemuPair(scenario, binary) as pair:
        time.sleep(0.3)
        with closing(QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options())) as migration:
            run.trace_migration(migration, 60, writer)
    recording = read_recording(path)
    return analyse(recording).breakdown


def is_exact(b: Breakdown) -> bool:
    """Whether the spans cover the window without gap or overlap, and sum to it."""
    spans = sorted(span for phase in b.phases for span in phase.spans)
    joined = all(a[1] == c[0] for a, c in itertools.pairwise(spans))
    return joined and sum(p.duration_ns for p in b.phases) == b.window_ns == spans[-1][1] - spans[0][0]


def row(number: int, b: Breakdown) -> str:
    """One run as a table row."""
    window = b.window_ns or 1
    stamps = next((w for w in b.witnesses if "STOP" in w.name), None)
    said = next((w.value_ns // 10**6 for w in b.witnesses if "downtime" in w.name), None)
    unattributed = 100 * b.phase_ns("unattributed") / window
    beside = f"{stamps.value_ns / 1e6:.3f}" if stamps else "-"
    return (
        f"| {number} | {(b.blackout_ns or 0) / 1e6:.3f} | {window / 1e6:.3f} | {unattributed:.2f} | "
        f"{b.phase_ns('handover') / 1e6:.3f} | {beside} | {said} | {b.completeness.verdict} | "
        f"{'yes' if is_exact(b) else 'NO'} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--vmm-binary")
    options = parser.parse_args()
    print("| run | blackout ms | window ms | unattributed % | handover ms | QMP STOP..RESUME ms | QMP downtime ms |"
          " verdict | partition exact |")  # fmt: skip
    print("|--:|--:|--:|--:|--:|--:|--:|---|---|")
    results = []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(1, options.runs + 1):
            results.append(run_once(Path(directory), Scenario(), options.vmm_binary))
            print(row(number, results[-1]), flush=True)
    shares = [100 * b.phase_ns("unattributed") / (b.window_ns or 1) for b in results]
    good = sum(b.completeness.verdict == "complete" for b in results)
    exact = sum(map(is_exact, results))
    print(f"\n{good} of {len(results)} complete, {exact} exact; unattributed: ", end="")
    print(f"median {statistics.median(shares):.2f} %, largest {max(shares):.2f} %")
    return 0 if good == exact == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
