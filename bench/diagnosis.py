# SPDX-License-Identifier: Apache-2.0
"""Judges the diagnosis on faults with a known answer: `python -m bench.diagnosis --fault link --runs 10`.

In: names of faults (`bench.faults`), the number of runs, and a directory that keeps the recordings. Out: on stdout, one
line for each run, then a Markdown table. Exit code 1 if an answer was wrong and certain, or less than nine tenths of
the runs of a fault were right.

A fault must make the downtime at least twice as long as it is without it, and 10 ms longer, so that it is more than
half of it. What else could have made it longer is other load on the machine. So the VMs and what disturbs them have a
high priority, and so has their autogroup (sched(7)); and a witness must agree. The kernel's account of the waits for a
CPU (`bench.waited`) shows that a thread of the right side waited for half of the downtime, or, where the fault is no
such load, that none did. The truth machine's own clock shows that its fetch took half of it. A run in which the fault
was not the cause, by chance, has no known answer: it is repeated, and counted in a column of its own. The diagnosis has
no part in this.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import waited
from bench.faults import FAULTS, NAGLE, Fault
from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import read_recording

NEEDED = 0.9
WITHOUT = 3
"""Runs without the fault."""
AUTOGROUP = Path("/proc/self/autogroup")
LONGER, LONGER_NS = 2, 10_000_000
HALF = 0.5
"""A cause with this share of the downtime is the largest one."""
SEVERAL = ("other load, a quota, or a hypervisor", "the source's send buffer is full")
"""Words that leave several causes open."""
RIGHT, NONE, UNCERTAIN, CERTAIN, UNMADE = "right", "no single cause", "wrong, uncertain", "wrong, certain", "not made"
HEAD = ("fault", "made how", "without ms", "with ms", RIGHT, NONE, UNCERTAIN, CERTAIN, UNMADE, "wrong words")


@dataclass
class Score:
    """What became of the runs of one fault."""

    fault: Fault
    without_ns: int
    verdicts: Counter[str] = field(default_factory=Counter)
    with_ns: list[int] = field(default_factory=list)
    words: Counter[str] = field(default_factory=Counter)

    @property
    def good(self) -> bool:
        """Nine tenths are right, and nothing wrong was certain."""
        judged = self.verdicts.total() - self.verdicts[UNMADE]
        return bool(judged) and self.verdicts[RIGHT] >= NEEDED * judged and not self.verdicts[CERTAIN]


def verdict(fault: Fault, breakdown: Breakdown) -> tuple[str, str]:
    """The verdict on a diagnosis, and its words."""
    diagnosis = breakdown.diagnosis
    first = diagnosis.because[0] if diagnosis and diagnosis.because else None
    if diagnosis is None or first is None:
        return NONE, "nothing"
    words = f"{first.what} ({100 * first.share:.0f} %)"
    if not diagnosis.single:
        return NONE, words
    if first.rule in fault.answers and first.side in (fault.side or first.side, "both"):
        return RIGHT, words
    certain = first.known and not any(one in first.what for one in SEVERAL)
    return CERTAIN if certain else UNCERTAIN, words


@dataclass(frozen=True)
class Ran:
    """One run, read again."""

    breakdown: Breakdown
    blackout_ns: int
    begin_ns: int
    """When the blackout began, on the recording's clock, which is that of the witness."""

    @classmethod
    def of(cls, path: Path) -> Ran:
        analysis = analyse(read_recording(path))
        begin, _ = analysis.breakdown.blackout or (0, 0)
        return cls(analysis.breakdown, analysis.breakdown.blackout_ns or 0, analysis.origin_ns + begin)


def unmade(fault: Fault, without_ns: int, run: Ran, path: Path) -> str:
    """Why the fault is not what made the downtime of this run long; empty if it is."""
    if run.blackout_ns < max(LONGER * without_ns, without_ns + LONGER_NS):
        return "it is no longer than without it"
    half = HALF * run.blackout_ns
    if fault.timed:
        took = json.loads(path.with_suffix(".truth").read_text())[fault.timed][0]
        return "" if took >= half else f"{fault.timed} took {took / 1e6:.1f} ms"
    if not path.with_suffix(".waited").exists():
        return ""
    waits = waited.within(path.with_suffix(".waited"), run.begin_ns, run.begin_ns + run.blackout_ns)
    said = ", ".join(f"the {role} waited {ns / 1e6:.1f} ms for a CPU" for role, ns in waits.items())
    if fault.waits:
        there = waits.get(fault.waits, 0)
        return "" if there >= half and there == max(waits.values()) else said or "no reading of waits"
    return said if max(waits.values(), default=0) >= half and not fault.throttles else ""


@contextlib.contextmanager
def preferred(fault: Fault) -> Iterator[None]:
    """Gives us, and what we start, priority over other load. A fault that is such load competes with the VMs alone."""
    os.setpriority(os.PRIO_PROCESS, 0, 0 if fault.waits else -20)
    try:
        before = AUTOGROUP.read_text().split()[-1]
        AUTOGROUP.write_text("-15")
    except OSError:  # a kernel without autogroups
        yield
        return
    try:
        yield
    finally:  # the shell that started us has the same group
        AUTOGROUP.write_text(before)


def judge(fault: Fault, runs: int, directory: Path, *, again: bool) -> Score:
    """Makes the fault until it was there in so many runs; or reads the recordings of these runs `again`."""
    without = []
    for number in range(WITHOUT):
        path = directory / f"{fault.name}-without-{number}.rec"
        if not again:
            fault.make(path, False)
        without.append(Ran.of(path).blackout_ns)
    score = Score(fault, round(statistics.median(without)))
    for number in range(2 * runs):
        if score.verdicts.total() - score.verdicts[UNMADE] >= runs:
            break
        path = directory / f"{fault.name}-{number}.rec"
        if not again:
            fault.make(path, True)
        elif not path.exists():
            break
        run = Ran.of(path)
        why = unmade(fault, score.without_ns, run, path)
        found, words = (UNMADE, why) if why else verdict(fault, run.breakdown)
        score.verdicts[found] += 1
        score.with_ns.append(run.blackout_ns)
        if found not in (RIGHT, UNMADE):
            score.words[words] += 1
        print(f"{fault.name} {number}: {run.blackout_ns / 1e6:.1f} ms, {found}: {words}", flush=True)
    return score


def row(score: Score) -> str:
    """One row of the table."""
    counts = [str(score.verdicts[name]) for name in (RIGHT, NONE, UNCERTAIN, CERTAIN, UNMADE)]
    took = [f"{score.without_ns / 1e6:.1f}", f"{statistics.median(score.with_ns) / 1e6:.1f}"]
    words = "; ".join(f"{count} x {what}" for what, count in score.words.most_common())
    return "| " + " | ".join([score.fault.name, score.fault.how, *took, *counts, words]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--fault", action="append", choices=names, help="may be given several times; default: all")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--keep", type=Path, help="a directory for the recordings")
    parser.add_argument("--again", action="store_true", help="judge the recordings in the directory, and make none")
    options = parser.parse_args()
    if options.again and not options.keep:
        parser.error("--again needs --keep")
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    if not options.again and NAGLE not in os.environ:
        if "nagle" in (options.fault or []):
            parser.error(f"nagle needs two Cloud Hypervisors: set {NAGLE}=OLD:NEW")
        print(f"nagle: left out, since {NAGLE}=OLD:NEW is not set", flush=True)
        names.remove("nagle")
    with tempfile.TemporaryDirectory() as directory:
        kept = options.keep or Path(directory)
        wanted = [fault for fault in FAULTS if fault.name in (options.fault or names)]
        scores = []
        for fault in wanted:
            with contextlib.nullcontext() if options.again else preferred(fault):
                scores.append(judge(fault, options.runs, kept, again=options.again))
    print("\n| " + " | ".join(HEAD) + " |\n|---|---|--:|--:|--:|--:|--:|--:|--:|---|")
    print("\n".join(map(row, scores)))
    return 0 if all(score.good for score in scores) else 1


if __name__ == "__main__":
    sys.exit(main())
