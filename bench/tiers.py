# SPDX-License-Identifier: Apache-2.0
"""Slowdown of a call by attach tier: `python -m bench.tiers` prints a Markdown table of ratios for docs/tiers.md.

In: a number of rounds. Out: by tier, how many times as long each kind of call of `bench.calls` takes while `record`
watches, and the same for a call of an untraced process. The figures are ratios, so that an emulated machine can measure
them. The calls are those of `bench.overhead`. Needs root and /dev/kvm. Tiers that this kernel lacks are skipped and
named.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from bench.observers import OURS, Observer
from bench.overhead import COLUMNS, measure_calls
from ebpf_mig.probes.run_statistics import BpfStatistics
from ebpf_mig.probes.tiers import AUTO, NAMES, Chooser

KINDS = tuple(name for name in NAMES if name != AUTO)


def observer(tier: str) -> Observer:
    """`record`, limited to one tier."""
    return replace(OURS, name=tier, command=lambda pids, output: [*OURS.command(pids, output), "--tier", tier])


def available(tier: str) -> bool:
    """Whether this kernel has the tier, by the product's own check."""
    return tier == "tracepoint" or {"kvm", "socket"} <= Chooser(tier).choose().groups


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    statistics = BpfStatistics()
    tiers = [tier for tier in KINDS if available(tier)]
    statistics.close()
    for tier in set(KINDS) - set(tiers):
        print(f"{tier} is left out: this kernel does not have it", file=sys.stderr)
    alone, results = measure_calls([observer(tier) for tier in tiers], options.rounds)
    print("| times as long | KVM_GET_DIRTY_LOG | KVM_RUN | send | other system call | untraced process's | lost |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for tier, result in results.items():
        ratios = " | ".join(f"{1 + result.ns(column) / alone[column]:.2f}" for column in COLUMNS)
        print(f"| {tier} | {ratios} | {sum(sum(run.lost.values()) for run in result.runs)} |")
    print("| (a call alone, us) | " + " | ".join(f"{alone[column] / 1000:.2f}" for column in COLUMNS) + " | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
