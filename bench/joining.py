# SPDX-License-Identifier: Apache-2.0
"""Accuracy of joining two hosts' clocks: `python -m bench.joining` (docs/clock.md).

In: recordings in which one kernel saw both sides. Each is split into a source's and a destination's recording. The
destination's clock gets a random offset (up to an hour) and rate (up to 100 ppm), and the two are joined. Out: how
often the true offset lies within the bound, how wide the bound is, and how far the blackout is from the one-clock
figure. Exit code 1 if any join contradicts the truth. `--lab N` migrates between two network namespaces instead, with a
recorder in each. Both recordings use one clock, so the true offset is 0.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec.structs import replace

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.joining.merge import joined
from ebpf_mig.recording.events import AnyEvent, Ending, OwnCost, Transfer
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.recording.kinds import BY_TYPE

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
HOUR_NS = 3600 * 10**9
MOST_PPM = 100
_DURATIONS = ("in_call_ns", "max_call_ns", "off_cpu_ns")


@dataclass(frozen=True)
class Skew:
    """Another clock, as a function of the recording's clock. At `pivot` it is ahead by exactly `offset`."""

    offset: int
    ppm: float
    pivot: int

    def ahead(self, at: int) -> int:
        """By how much the other clock is ahead, ns."""
        return self.offset + round((at - self.pivot) * self.ppm / 1e6)

    def applied(self, event: AnyEvent) -> AnyEvent:
        """The event as a host with that clock would have recorded it."""
        names = ("at_ns",) if isinstance(event, Ending) else BY_TYPE[type(event)].instants
        changes = {name: at + self.ahead(at) for name in names if (at := getattr(event, name))}
        if isinstance(event, Transfer):
            for name in _DURATIONS:
                took = getattr(event, name)
                changes[name] = took + round(took * self.ppm / 1e6) if took > 0 else took
        return replace(event, **changes)


def side_of(recording: Recording, role: str) -> Recording:
    """The part of a recording that a recorder on one host would have seen."""
    target = next(t for t in recording.header.targets if t.role == role)
    events = [e for e in recording.events if isinstance(e, (Ending, OwnCost)) or e.pid == target.pid]
    header = replace(recording.header, host=role, boot_id=role, targets=[target])
    return Recording(header=header, events=events, truncated=False, reason="", unknown=0)


def by_one_clock(source: Recording, destination: Recording) -> Recording:
    """Two recordings of one kernel, merged as if one recorder had made them."""
    header = replace(source.header, targets=[*source.header.targets, *destination.header.targets])
    events = [*(e for e in source.events if not isinstance(e, Ending)), *destination.events]
    return replace(source, header=header, events=events)


def seeds_of(paths: Sequence[Path]) -> list[tuple[Path, Recording]]:
    """The usable recordings: those with both sides over TCP, and the merged ones of the lab's two hosts."""
    halves = [read_recording(DATA / "hosts" / f"{role}.rec") for role in ("source", "destination")]
    found = [(path, read_recording(path)) for path in paths]
    return [*((path, one) for path, one in found if is_two_sided(one)), (DATA / "hosts", by_one_clock(*halves))]


def skewed(recording: Recording, skew: Skew) -> Recording:
    """The recording with its times on another clock."""
    known = recording.header.clock
    moved = known and replace(known, monotonic_ns=known.monotonic_ns + skew.ahead(known.monotonic_ns))
    begin = recording.header.begin_ns + skew.ahead(recording.header.begin_ns)
    header = replace(recording.header, clock=moved, begin_ns=begin)
    return replace(recording, header=header, events=[skew.applied(event) for event in recording.events])


def is_two_sided(recording: Recording) -> bool:
    """Whether the recording has both sides of a completed migration over TCP."""
    found = analyse(recording).breakdown
    both = found.migration.source is not None and found.migration.destination is not None
    tcp = found.migration.transport == "tcp"
    return both and tcp and found.migration.result == "completed"


def contradictions(whole: Recording, one_clock: Breakdown, two: Breakdown, skew: Skew) -> list[str]:
    """Figures of the joined breakdown that differ from the truth by more than the stated bound."""
    remote = whole.header.remote
    if remote is None:
        return ["not joined"]
    found = []
    if remote.bound_ns is not None and abs(skew.ahead(remote.at_ns) - remote.offset_ns) > remote.bound_ns:
        found.append(f"offset {remote.offset_ns}, bound {remote.bound_ns}, truth {skew.ahead(remote.at_ns)}")
    pairs = [("blackout", two.blackout_ns, one_clock.blackout_ns, two.clock.bound_ns)]
    pairs += [("window", two.window_ns, one_clock.window_ns, two.window_bound_ns)]
    for a, b in zip(one_clock.phases, two.phases, strict=True):
        # A phase of the destination is measured with the destination's own clock.
        pairs.append((a.phase, b.duration_ns, a.duration_ns, b.bound_ns))
    pairs += [
        (f"vCPU {a.vcpu}", b.blackout_ns, a.blackout_ns, b.bound_ns)
        for a, b in zip(one_clock.vcpus, two.vcpus, strict=True)
    ]
    for name, got, true, bound in pairs:
        if got is None or true is None or bound is None:
            continue
        slack = 2 + int(abs(true) * MOST_PPM / 1e6)  # durations on the other clock are that much longer or shorter
        if abs(got - true) > bound + slack:
            found.append(f"{name}: {got}, one clock says {true}, bound {bound}")
    return found


Join = tuple[Path, Breakdown, Breakdown, list[str]]


def random_joins(seeds: Sequence[tuple[Path, Recording]], joins: int) -> Iterator[Join]:
    """Joins each recording in turn with a new clock: (recording, one-clock breakdown, joined breakdown,
    contradictions).
    """
    for number in range(joins):
        path, one = seeds[number % len(seeds)]
        ppm = random.uniform(-MOST_PPM, MOST_PPM)  # noqa: S311
        skew = Skew(random.randint(-HOUR_NS, HOUR_NS), ppm, one.header.begin_ns)  # noqa: S311
        two = side_of(one, "source"), skewed(side_of(one, "destination"), skew)
        whole = joined(*(two if number % 3 else two[::-1]))
        one_clock = analyse(one).breakdown
        breakdown = analyse(whole).breakdown
        bad = contradictions(whole, one_clock, breakdown, skew)
        yield path, one_clock, breakdown, [f"{path.name}, {skew}: {text}" for text in bad]


def lab(runs: int) -> int:
    """Runs `demo --two-hosts` several times and prints the bound and the offset found; the true offset is 0."""
    print("| run | blackout ms | bound us | off by us | pairs there | back |\n|--:|--:|--:|--:|--:|--:|")
    widths: list[int] = []
    wrong = 0
    for run in range(1, runs + 1):
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, "-m", "ebpf_mig.cli", "demo", "--two-hosts", "--format", "json"]
            command += ["--bandwidth", "10Gbit", "-o", f"{directory}/lab.rec"]
            done = subprocess.run(command, check=True, capture_output=True)
        measured = msgspec.json.decode(done.stdout, type=Breakdown)
        clock = measured.clock
        if clock.bound_ns is None or measured.blackout_ns is None:
            raise ValueError("one side is open")
        widths.append(clock.bound_ns)
        wrong += abs(clock.offset_ns) > clock.bound_ns
        print(
            f"| {run} | {measured.blackout_ns / 1e6:.3f} | {clock.bound_ns / 1e3:.1f} | {clock.offset_ns / 1e3:+.1f} | "
            f"{clock.pairs_there} | {clock.pairs_back} |",
            flush=True,
        )
    print(f"\nbound: median {statistics.median(widths) / 1e3:.1f} us; off by more than the bound: {wrong} of {runs}")
    return 1 if wrong else 0


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recordings", nargs="*", type=Path, help="default: those in tests/data")
    parser.add_argument("--joins", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lab", type=int, metavar="RUNS", help="measure `demo --two-hosts` instead")
    options = parser.parse_args()
    if options.lab:
        return lab(options.lab)
    random.seed(options.seed)
    seeds = seeds_of(options.recordings or sorted(DATA.glob("*.rec")))
    widths: dict[str, list[int]] = defaultdict(list)
    differences: list[int] = []
    wrong = open_ended = 0
    for path, one_clock, breakdown, bad in random_joins(seeds, options.joins):
        wrong += bool(bad)
        print(*bad, sep="\n", end="\n" if bad else "", file=sys.stderr)
        if breakdown.clock.bound_ns is None:
            open_ended += 1
            continue
        widths[path.stem].append(breakdown.clock.bound_ns)
        if breakdown.blackout_ns is not None and one_clock.blackout_ns is not None:
            differences.append(abs(breakdown.blackout_ns - one_clock.blackout_ns))
    print("| recording | joins | bound us, median | largest |\n|---|--:|--:|--:|")
    for name, found in sorted(widths.items()):
        print(f"| {name} | {len(found)} | {statistics.median(found) / 1e3:.1f} | {max(found) / 1e3:.1f} |")
    every = [width for found in widths.values() for width in found]
    print(f"\n{options.joins - wrong} of {options.joins} joins contain the truth; {open_ended} are open on one side;")
    print(f"bound: median {statistics.median(every) / 1e3:.1f} us, largest {max(every) / 1e3:.1f} us;")
    print(
        f"blackout off: median {statistics.median(differences) / 1e3:.1f} us, largest {max(differences) / 1e3:.1f} us"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
