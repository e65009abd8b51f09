# SPDX-License-Identifier: Apache-2.0
"""What each part of tracing adds to a blackout of 400 calls and 100 switches: `python -m bench.ablation`.

In: the seconds to measure, and a file that keeps the rounds, so that a later run adds to them. Out: a Markdown table
for docs/overhead.md. Needs root, /dev/kvm and bcc, and should have the machine to itself.

A round measures every variant of the tracer in random order, and the same blackouts untraced before and after each. A
variant's figure in a round is the difference of its median from these two medians. The table has the median of all
rounds and its 95 % interval by resampling rounds. The processes measure themselves (`bench.blackouts`). All is the
tracepoint tier. With `--only`, other tools can take part, which start anew in each round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.observers import OTHERS, Observer
from ebpf_mig.compare.stats import bootstrap_interval
from ebpf_mig.errors import EbpfMigError
from ebpf_mig.linux import btf
from ebpf_mig.probes import attach
from ebpf_mig.probes.hook_points import EXTRAS
from ebpf_mig.probes.loader import Program
from ebpf_mig.probes.macros import STACK_NEVER, defines
from ebpf_mig.probes.plan import Plan
from ebpf_mig.probes.polled import Polled
from ebpf_mig.probes.records import CONTRACT
from ebpf_mig.probes.tiers import Choice
from ebpf_mig.probes.tracer import Tracer
from ebpf_mig.recording.events import AnyEvent
from ebpf_mig.tracing.session import POLL_MS

BLACKOUTS = 8
"""Per measurement; its figure is their median."""
NO_PROCESS = (1 << 22) + 1
"""Above the largest pid of Linux, so that every program returns after its first test."""
BACK, SWITCHES = {"sched_exit_tp"}, {"sched_exit_tp", "sched_switch"}
LOCKS = {"contention_begin", "contention_end"}
TCP = {"tcp_probe", "tcp_retransmit_skb"}
RARE = {"sched_process_exec", "sched_prepare_exec", "sock_send_length"}
EXTRA = SWITCHES | LOCKS | TCP | RARE
EVERYTHING, LEAVES, NO_STACKS = "everything", "stacks as threads leave", "no stacks"


@dataclass(frozen=True)
class Variant:
    """A tracer that lacks something."""

    name: str
    without: frozenset[str] = frozenset()
    """Tracepoints that are not attached."""
    macros: dict[str, int] = field(default_factory=dict)
    targets: bool = True
    statistics: bool = False
    """Whether the kernel counts the run time of our programs all the time, not only while they calibrate it."""
    reader: bool = True
    readings: bool = True
    """Whether the reader reads our own cost and the quotas when a vCPU is kicked."""


def _variant(name: str, without: set[str] = set(), **other: object) -> Variant:  # noqa: B006 - it is not changed
    return Variant(name, frozenset(without), **other)  # type: ignore[arg-type]


VARIANTS = (
    _variant(EVERYTHING),
    _variant(LEAVES, BACK),
    _variant(NO_STACKS, macros={"WAIT_STACKS": STACK_NEVER}, without=BACK),
    _variant("no sched_switch", SWITCHES),
    _variant("no lock", LOCKS),
    _variant("no wire, no retransmits", TCP),
    _variant("no exec, no hidden sends", RARE),
    _variant("run statistics all the time", statistics=True),
    _variant("no reader", reader=False),
    _variant("no reading of own cost and quotas", readings=False),
    _variant("system calls alone", EXTRA),
    _variant("system calls alone, no reader", EXTRA, reader=False),
    _variant("the same, of no process: the floor", EXTRA, reader=False, targets=False),
)  # fmt: skip


class Pair:
    """The processes of `bench.blackouts`."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "bench.blackouts"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pids = [int(word) for word in self._answer().split()[1:]]

    def _answer(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError("bench.blackouts ended")
        return line

    def measure(self) -> float:
        """The median of some blackouts, in ns."""
        if self._process.stdin:
            self._process.stdin.write(f"{BLACKOUTS}\n")
            self._process.stdin.flush()
        return median(int(word) for word in self._answer().split())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class _NoReadings(Polled):
    """Reads nothing."""

    def open(self) -> None: ...

    def in_stop(self, edges: Sequence[AnyEvent]) -> list[AnyEvent]:
        del edges
        return []

    def due(self, events: Sequence[AnyEvent]) -> list[AnyEvent]:
        del events
        return []

    def take(self) -> list[AnyEvent]:
        return []


class Other:
    """Another tool, which runs while `on` is open."""

    def __init__(self, tool: Observer, pids: Sequence[int]) -> None:
        self.name, self._tool, self._pids = tool.name, tool, pids

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Starts it, waits until it watches, and ends it. ObserverError if it fails."""
        with self._tool.watching(self._pids):
            yield

    def close(self) -> None: ...


class Traced:
    """One variant, compiled and loaded; attached while `on` is open."""

    def __init__(self, variant: Variant, pids: Sequence[int]) -> None:
        self.name = variant.name
        names = {name for extra in EXTRAS for name, _ in extra.all_hooks} - variant.without
        tracepoints = btf.tracepoints(btf.VMLINUX, names)
        macros = defines(pids if variant.targets else [NO_PROCESS], tracepoints) | variant.macros
        self._program = Program(attach.FAMILY, macros, CONTRACT)
        hooks = tuple(attach._hooks(Choice(), tracepoints))
        for hook in hooks:
            self._program.load_hook(hook)
        self.variant = variant
        self._tracer = Tracer(pids, Plan(hooks, self._program, {}))
        self._tracer._statistics.close()
        if not variant.readings:
            self._tracer._polled = _NoReadings(lambda: None, tcp=False)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Traces as `record` does: a thread takes the records."""
        self._program.table("threads").clear()
        self._tracer.arm()
        if self.variant.statistics:
            self._tracer._calibrated_ns = sys.maxsize
        else:
            self._tracer._statistics.close()
        over = threading.Event()
        reader = threading.Thread(target=self._read, args=(over,))
        if self.variant.reader:
            reader.start()
        try:
            yield
        finally:
            over.set()
            if self.variant.reader:
                reader.join()
            self._tracer.disarm()
            self._tracer.poll(0)

    def _read(self, over: threading.Event) -> None:
        while not over.is_set():
            self._tracer.poll(POLL_MS)

    def close(self) -> None:
        self._tracer.close()


def measure(seconds: float, variants: Sequence[Variant | Observer]) -> Iterator[dict[str, list[float]]]:
    """Each round: by variant, ns untraced (the mean of before and after) and traced."""
    with contextlib.closing(Pair()) as pair, contextlib.ExitStack() as stack:
        made = [Traced(v, pair.pids) if isinstance(v, Variant) else Other(v, pair.pids) for v in variants]
        for one in made:
            stack.callback(one.close)
        end, draw = time.monotonic() + seconds, random.Random()  # noqa: S311 - the order of the variants
        while time.monotonic() < end:
            found: dict[str, list[float]] = {}
            before = pair.measure()
            for one in draw.sample(made, len(made)):
                with one.on():
                    pair.measure()  # the first blackouts touch new memory
                    during = pair.measure()
                after = pair.measure()
                found[one.name] = [(before + after) / 2, during]
                before = after
            yield found


def rows(rounds: Sequence[dict[str, list[float]]]) -> Iterator[tuple[str, list[float], list[float]]]:
    """By variant: what it adds to the blackout, and what it adds less than `everything`, ns in each round."""
    added: dict[str, list[float]] = defaultdict(list)
    less: dict[str, list[float]] = defaultdict(list)
    for found in rounds:
        for name, (alone, during) in found.items():
            added[name].append(during - alone)
            if EVERYTHING in found:
                whole_alone, whole = found[EVERYTHING]
                less[name].append(whole - whole_alone - (during - alone))
    for name, values in added.items():
        yield name, values, less[name]


def _figure(values: Sequence[float]) -> str:
    low, high = bootstrap_interval(values)
    return f"{median(values) / 1000:+.0f} ({low / 1000:+.0f} to {high / 1000:+.0f})"


def _say(line: str) -> None:
    print(line)


def report(rounds: Sequence[dict[str, list[float]]]) -> None:
    """Prints the table."""
    alone = median(one for found in rounds for one, _ in found.values())
    _say(f"{len(rounds)} rounds, a blackout takes {alone / 1000:.0f} us untraced\n")
    _say("| attached | us added, 95 % interval | us less than everything |")
    _say("|---|--:|--:|")
    order = {variant.name: number for number, variant in enumerate(VARIANTS)}
    for name, added, less in sorted(rows(rounds), key=lambda row: order.get(row[0], len(order))):
        _say(f"| {name} | {_figure(added)} | {_figure(less) if less and name != EVERYTHING else ''} |")


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=200, help="0: only print the rounds of the file")
    parser.add_argument("--only", action="append", default=[], help="a variant, or another tool; may be repeated")
    parser.add_argument("-o", "--output", type=Path, help="a file of JSON lines to which the rounds are added")
    options = parser.parse_args()
    rounds: list[dict[str, list[float]]] = []
    if options.output and options.output.exists():
        rounds = [json.loads(line) for line in options.output.read_text().splitlines()]
    chosen = [one for one in (*VARIANTS, *OTHERS) if one.name in (options.only or [v.name for v in VARIANTS])]
    try:
        for found in measure(options.seconds, chosen) if options.seconds else ():
            rounds.append(found)
            if options.output:
                with options.output.open("a") as kept:
                    kept.write(json.dumps(found) + "\n")
    except (RuntimeError, EbpfMigError) as error:
        print(f"bench.ablation: {error}", file=sys.stderr)
        return 3
    if not rounds:
        print("bench.ablation: no rounds", file=sys.stderr)
        return 2
    report(rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
