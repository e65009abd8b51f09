# SPDX-License-Identifier: Apache-2.0
"""Overhead of this and other observers on calls and on the blackout: `python -m bench.overhead`.

In: numbers of rounds and pairs. Out: two Markdown tables for docs/overhead.md: the nanoseconds that each observer adds
to a call, and what it adds to the blackout. Needs root and /dev/kvm. The row of an observer that is missing or fails
says why, and the others are measured. Exit code 1 if a target is missed.

Each round measures all observers in turn, with an unwatched measurement before and after each. An observer's figure is
its difference from these two. The blackout is taken from QEMU's time stamps of its QMP events STOP and RESUME, which
cost the same in both migrations of a pair.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

from bench.observers import OTHERS, OURS, Observer, ObserverError, Watched
from ebpf_mig.compare.stats import bootstrap_interval
from ebpf_mig.errors import EbpfMigError
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording.events import Mark
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.vmm.qemu.migration import QemuMigration

KINDS = {"dirty-log": 1000, "run": 300, "send": 500, "getppid": 2000}
"""Calls per batch, by kind of `bench.calls`."""
COLUMNS = ("dirty-log", "run", "send", "getppid", "untraced getppid")
BATCHES = 9
START_S, SHARE, MOST_NS, STRACE_RATIO = 1.5, 0.01, 200_000, 50
NOBODY = "nobody"

SCENARIO = Scenario(memory_bytes=64 * MIB, working_set_bytes=1 * MIB, pages_per_s=1_000, transport="unix")
"""Without TCP: the random delays of Nagle's algorithm are larger than the overhead to be measured."""


class Caller:
    """A process of `bench.calls`."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "bench.calls"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        if self._answer() != "ready":
            raise RuntimeError("bench.calls did not start")

    def _answer(self) -> str:
        return self._process.stdout.readline().strip() if self._process.stdout else ""

    def make(self, kind: str) -> float:
        """ns per call in one batch."""
        if self._process.stdin:
            self._process.stdin.write(f"{kind} {KINDS[kind]}\n")
            self._process.stdin.flush()
        return int(self._answer()) / KINDS[kind]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def batches(watched: Caller, other: Caller) -> dict[str, float]:
    """ns per call in the fastest batch of each kind; kinds take turns."""
    best: dict[str, float] = {}
    for _ in range(BATCHES):
        for column in COLUMNS:
            caller, kind = (other, "getppid") if column.startswith("untraced") else (watched, column)
            best[column] = min(best.get(column, float("inf")), caller.make(kind))
        time.sleep(0.01)
    return best


@dataclass
class Result:
    """One observer's results of all rounds."""

    added: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By column: ns above the neighbouring unwatched measurements."""
    runs: list[Watched] = field(default_factory=list)
    failed: str = ""
    """Why it could not be measured. It is then left out of all later rounds, and has no figures."""

    def ns(self, column: str) -> float:
        """The figure of the median round."""
        return median(self.added[column])


def measure_calls(observers: Sequence[Observer], rounds: int) -> tuple[dict[str, float], dict[str, Result]]:
    """Returns (ns per unwatched call by column, results by observer)."""
    with contextlib.closing(Caller()) as watched, contextlib.closing(Caller()) as other:
        return in_turn(observers, rounds, [watched.pid], lambda: batches(watched, other))


def in_turn(
    observers: Sequence[Observer], rounds: int, pids: Sequence[int], measure: Callable[[], dict[str, float]]
) -> tuple[dict[str, float], dict[str, Result]]:
    """As `measure_calls`; `measure` gives ns per call by column, `pids` are watched."""
    results = {observer.name: Result() for observer in observers}
    alone: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        before = measure()
        for observer in observers:
            result = results[observer.name]
            if result.failed:
                continue
            try:
                with observer.watching(pids) as run:
                    during = measure()
            except ObserverError as error:
                result.failed = str(error)
                continue
            after = measure()
            result.runs.append(run)
            for column in COLUMNS:
                result.added[column].append(during[column] - (before[column] + after[column]) / 2)
                alone[column].append(before[column])
            before = after
        for column in COLUMNS:
            alone[column].append(before[column])
    return {column: median(values) for column, values in alone.items()}, results


def stop_to_resume(observer: Observer | None) -> int:
    """The ns between QEMU's own STOP on the source and RESUME on the destination of one migration."""
    with QemuPair(SCENARIO) as pair:
        time.sleep(0.2)
        migration = QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options())
        with contextlib.closing(migration):
            migration.prepare()
            with watched_by(observer, [pair.source.pid, pair.destination.pid]):
                outcome = migration.run(60)
                time.sleep(0.1)
    marks = {m.name: m.at_ns for m in outcome.marks if isinstance(m, Mark)}
    if outcome.result != "completed" or not {"qmp.STOP", "qmp.RESUME"} <= marks.keys():
        raise RuntimeError(f"the migration {outcome.result}: {outcome.error}")
    return marks["qmp.RESUME"] - marks["qmp.STOP"]


@contextlib.contextmanager
def watched_by(observer: Observer | None, pids: Sequence[int]) -> Iterator[None]:
    """Runs under the observer, or unwatched if it is None."""
    if observer is None:
        yield
    else:
        with observer.watching(pids):
            yield


@dataclass
class Blackouts:
    """One observer's blackouts of all rounds."""

    pairs: list[tuple[int, int]] = field(default_factory=list)
    """(unwatched, watched), ns."""
    failed: str = ""
    """As in `Result`."""


def measure_blackouts(
    observers: Sequence[Observer], rounds: int, measure: Callable[[Observer | None], int] = stop_to_resume
) -> dict[str, Blackouts]:
    """By observer. One pair per round; the first observer rotates. `measure` gives the ns of one blackout."""
    found = {observer.name: Blackouts() for observer in observers}
    everybody = [None, *observers]
    for number in range(rounds):
        turn = number % len(everybody)
        took: dict[str, int] = {}
        for who in everybody[turn:] + everybody[:turn]:
            if who is None:
                took[NOBODY] = measure(None)
            elif not found[who.name].failed:
                try:
                    took[who.name] = measure(who)
                except ObserverError as error:
                    found[who.name].failed = str(error)
        for name in took.keys() - {NOBODY}:
            found[name].pairs.append((took[NOBODY], took[name]))
    return found


def print_calls(alone: dict[str, float], results: dict[str, Result]) -> bool:
    """Prints the first table. Returns whether the targets are met."""
    print("| ns added | KVM_GET_DIRTY_LOG | KVM_RUN | send | another system call | one of an untraced process |"
          " KVM ioctls seen |")  # fmt: skip
    print("|---|--:|--:|--:|--:|--:|--:|")
    print("| (a call alone takes, loop included) | " + " | ".join(f"{alone[c]:.0f}" for c in COLUMNS) + " | |")
    made = KINDS["dirty-log"] * BATCHES
    for name, result in results.items():
        if result.failed:
            print(_failed_row(name, result.failed, len(COLUMNS)))
            continue
        figures = " | ".join(f"{result.ns(column):+.0f}" for column in COLUMNS)
        seen = 100 * sum(run.seen for run in result.runs) / (made * len(result.runs))
        print(f"| {name} | {figures} | {seen:.1f} % |")
    ours = results[OURS.name]
    if ours.failed:
        return tell("nothing lost by us", good=False, measured=ours.failed)
    good = tell("nothing lost by us", not any(run.lost for run in ours.runs), "of what the kernel saw")
    start = max(run.start_s for run in ours.runs)
    good &= tell(f"start to armed at most {START_S} s", start <= START_S, f"{start:.2f} s in the slowest")
    own = ours.ns("dirty-log")
    for name, result in results.items():
        if result.failed:
            continue
        ratio = result.ns("dirty-log") / own if own else float("inf")
        if name.startswith("bpftrace"):
            good &= tell("cheaper than bpftrace a traced ioctl", ratio > 1, f"{ratio:.2f} times as dear")
        elif name.startswith("strace"):
            wanted = f"at least {STRACE_RATIO} times cheaper than strace"
            good &= tell(wanted, ratio >= STRACE_RATIO, f"{ratio:.0f} times as dear")
    return good


def print_blackouts(found: dict[str, Blackouts]) -> bool:
    """Prints the second table. Returns whether ours meets the target."""
    print("\n| blackout | pairs | alone, median ms | watched, median ms | added, median ms | 95 % interval of it |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, result in found.items():
        if result.failed:
            print(_failed_row(name, result.failed, 4))
            continue
        pairs = result.pairs
        added = [after - before for before, after in pairs]
        low, high = bootstrap_interval(added)
        without, watched = median(p[0] for p in pairs), median(p[1] for p in pairs)
        print(
            f"| {name} | {len(pairs)} | {without / 1e6:.3f} | {watched / 1e6:.3f} | {median(added) / 1e6:+.3f} | "
            f"{low / 1e6:+.3f} to {high / 1e6:+.3f} |"
        )
    target, ours = "blackout within 1 % and 200 us", found[OURS.name]
    if ours.failed:
        return tell(target, good=False, measured=ours.failed)
    middle = median(after - before for before, after in ours.pairs)
    share = middle / median(before for before, _ in ours.pairs)
    measured = f"{middle / 1e3:+.0f} us, {100 * share:+.1f} %"
    return tell(target, share <= SHARE and middle <= MOST_NS, measured)


def _failed_row(name: str, why: str, empty: int) -> str:
    """The row of an observer without figures; `empty` columns follow the reason."""
    reason = why.replace("|", "/")
    return f"| {name} | not measured: {reason} |" + " |" * empty


def tell(what: str, good: bool, measured: str) -> bool:
    """One line about a target."""
    print(f"\n{'met' if good else 'MISSED'}: {what} ({measured})")
    return good


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of calls; 0 leaves them out")
    parser.add_argument("--pairs", type=int, default=20, help="of migrations; 0 leaves them out")
    parser.add_argument("--ours", action="store_true", help="no other observers")
    options = parser.parse_args()
    try:
        return _measure([OURS, *(() if options.ours else OTHERS)], options.rounds, options.pairs)
    except (RuntimeError, EbpfMigError) as error:
        print(f"bench.overhead: {error}", file=sys.stderr)
        return 3


def _measure(observers: Sequence[Observer], rounds: int, pairs: int) -> int:
    """Measures and prints. Returns the exit code."""
    good = print_calls(*measure_calls(observers, rounds)) if rounds else True
    if pairs:
        good &= print_blackouts(measure_blackouts(observers, pairs))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
