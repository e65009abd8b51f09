# SPDX-License-Identifier: Apache-2.0
"""Runs the truth machine under the real tracer and compares the result with the truth.

In: a `Plan`. Out: a `Run`: the breakdown, the events, and the true length of each phase, from the machine's own clock
readings around its steps.
"""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.probes.tiers import AUTO
from ebpf_mig.recording.events import AnyEvent, Header, Target
from ebpf_mig.recording.file import Recording
from ebpf_mig.tracing.session import Session
from tests.truth.parts import AFTER_MEMORY, SLOWNESS, Plan, encode

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE_NS = int(200_000 * SLOWNESS)
TOLERANCE = 0.05
PHASES = (
    "pause", "quiesce", "fetch.kernel", "fetch.user", "memory.send", "state.save", "state.send", "handover",
    "state.load", "resume",
)  # fmt: skip


class Memory:
    """An event sink in memory."""

    def __init__(self) -> None:
        self.events: list[AnyEvent] = []

    def write_many(self, events: Iterable[AnyEvent]) -> None:
        self.events.extend(events)

    def flush(self) -> None:
        """Does nothing."""


class Helper:
    """A child process that prints `ready`, works on `go`, prints a line of JSON and ends on `quit`."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = self.process.pid

    def expect(self) -> str:
        """The child's next line; RuntimeError if it died."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} died: {self.process.wait()}")
        return line.strip()

    def say(self, word: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """Asks the child to end, and kills it after a time-out."""
        try:
            self.process.communicate("quit\n", timeout=5)
        except (subprocess.TimeoutExpired, BrokenPipeError, ValueError):
            self.process.kill()
            self.process.wait()


@contextmanager
def helpers(*commands: Sequence[str]) -> Iterator[list[Helper]]:
    """Starts children and waits until all are ready."""
    with ExitStack() as stack:
        started = []
        for command in commands:
            helper = Helper(*command)
            stack.callback(helper.close)
            started.append(helper)
        for helper in started:
            assert helper.expect() == "ready"
        yield started


Traced = tuple[Header, list[AnyEvent]]


def trace(
    targets: Sequence[Target], act: Callable[[], list[dict[str, Any]]]
) -> tuple[Header, list[AnyEvent], list[dict[str, Any]]]:
    """Traces the targets while `act` runs in a thread."""
    ((header, events),), results = trace_by((AUTO,), targets, act)
    return header, events, results


def trace_by(
    tiers: Sequence[str], targets: Sequence[Target], act: Callable[[], list[dict[str, Any]]]
) -> tuple[list[Traced], list[dict[str, Any]]]:
    """Traces the targets by several tiers at once, each with its own programs, while `act` runs in a thread."""
    results: list[list[dict[str, Any]]] = []
    with ExitStack() as stack:
        sessions = [stack.enter_context(Session(targets, tier)) for tier in tiers]
        sinks = [Memory() for _ in tiers]
        headers = [session.arm() for session in sessions]
        worker = threading.Thread(target=lambda: results.append(act()), daemon=True)
        worker.start()

        def pump(session: Session, sink: Memory) -> None:
            session.pump(sink, lambda _: None if worker.is_alive() else "migrated")

        others = [threading.Thread(target=pump, args=pair) for pair in list(zip(sessions, sinks, strict=True))[1:]]
        for other in others:
            other.start()
        pump(sessions[0], sinks[0])
        for other in others:
            other.join()
        for session, sink in zip(sessions, sinks, strict=True):
            session.finish(sink, "migrated")
    if not results:
        raise RuntimeError("the traced work failed; see its standard error")
    return [(header, sink.events) for header, sink in zip(headers, sinks, strict=True)], results[0]


@dataclass
class Run:
    """One traced migration and its truth."""

    plan: Plan
    breakdown: Breakdown
    events: list[AnyEvent]
    truth: dict[str, tuple[int, int]]
    """(at least, at most) ns by phase, by the machine's own clock readings around its calls."""
    injected: dict[str, int]
    """Actual length of the injected delays, ns by phase."""
    fetched: list[dict[str, Any]]
    same_memory: bool
    ran: dict[str, int] = field(default_factory=dict)
    """For how long the delaying thread had a CPU in those delays, by its own CPU clock, ns by phase."""
    held: tuple[int, int] = (0, 0)
    """Begin and end of another thread's hold of slots_lock, if the plan delays fetch.kernel."""
    recording: Recording | None = None

    def error(self, phase: str) -> int:
        """How far our figure is outside the range that the truth allows, in ns."""
        ours, (least, most) = self.breakdown.phase_ns(phase), self.truth.get(phase, (0, 0))
        return min(ours - least, 0) + max(ours - most, 0)

    def tolerance(self, phase: str) -> int:
        """5 % of the injected delay, but at least 200 us times the slowness of this machine."""
        return max(TOLERANCE_NS, int(TOLERANCE * self.injected.get(phase, 0)))

    def doubtful(self) -> list[str]:
        """Phases whose truth is uncertain, because the machine lost the CPU between clock reading and call."""
        return [name for name, (least, most) in self.truth.items() if most - least > 2 * self.tolerance(name)]

    def wrong(self) -> dict[str, tuple[int, tuple[int, int]]]:
        """Phases that are off by more than the tolerance: (ours, truth)."""
        return {
            name: (self.breakdown.phase_ns(name), self.truth.get(name, (0, 0)))
            for name in PHASES
            if abs(self.error(name)) > self.tolerance(name)
        }


def migrate(plan: Plan, *, unix: bool = False) -> Run:
    """Runs one migration of the truth machine under the tracer."""
    (run,) = migrate_by((AUTO,), plan, unix=unix)
    return run


def migrate_by(tiers: Sequence[str], plan: Plan, *, unix: bool = False) -> list[Run]:
    """Runs one migration of the truth machine under several tiers' tracers at once. Returns one run per tier."""
    with tempfile.TemporaryDirectory() as directory:
        plan = replace(plan, address=f"{directory}/socket" if unix else f"127.0.0.1:{free_port()}")
        module = "tests.truth.machine"
        with helpers((module, "destination", encode(plan)), (module, "source", encode(plan))) as (there, here):

            def act() -> list[dict[str, Any]]:
                here.say("go")
                return [json.loads(here.expect()), json.loads(there.expect())]

            targets = [Target(pid=here.pid, role="source"), Target(pid=there.pid, role="destination")]
            traced, (left, right) = trace_by(tiers, targets, act)
    return [
        Run(
            plan,
            analyse(Recording(header=header, events=events)).breakdown,
            events,
            durations([*left["marks"], *right["marks"]]),
            {**left["injected"], **right["injected"]},
            left["fetched"],
            left["checksum"] == right["checksum"],
            {**left["ran"], **right["ran"]},
            tuple(left["held"]),
            Recording(header=header, events=events),
        )
        for header, events in traced
    ]


def work(name: str, argument: int) -> tuple[dict[str, Any], list[AnyEvent]]:
    """Runs one of `workloads` under the tracer. Returns the workload's own figures, and the events."""
    with helpers(("tests.truth.workloads", name, str(argument))) as (helper,):

        def act() -> list[dict[str, Any]]:
            helper.say("go")
            return [json.loads(helper.expect())]

        _, events, (said,) = trace([Target(pid=helper.pid, role="source")], act)
    return said, events


def undisturbed(plan: Plan, *, unix: bool = False, tries: int = 5) -> Run:
    """The first of several runs in which the truth is certain, or the last. On a busy host the machine loses its
    CPU.
    """
    for _ in range(tries):
        run = migrate(plan, unix=unix)
        if not run.doubtful():
            break
    return run


def durations(marks: list[tuple[int, int, str]]) -> dict[str, tuple[int, int]]:
    """(at least, at most) ns by phase. A phase can be entered more than once."""
    found: dict[str, tuple[int, int]] = {}
    for (opened, open_by, name), (closed, closed_by, _) in itertools.pairwise(marks):
        surely, perhaps = max(closed - open_by, 0), max(closed_by - opened, 0)
        phase = name
        if name == AFTER_MEMORY:
            phase, surely = "memory.send", 0
        least, most = found.get(phase, (0, 0))
        found[phase] = least + surely, most + perhaps
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
