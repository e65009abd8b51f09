# SPDX-License-Identifier: Apache-2.0
"""Runs the truth machine under the real tracer and sets the result beside the truth.

In: a `Plan`. Out: a `Run`: the breakdown, the events, and how long each phase really was by the machine's own clock
readings around its steps.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.events import AnyEvent, Header, Target
from ebpf_mig.session import Session
from tests.truth.machine import Plan, encode

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE_NS = 200_000
TOLERANCE = 0.05
PHASES = (
    "pause", "quiesce", "fetch.kernel", "fetch.user", "memory.send", "state.save", "state.send", "handover",
    "state.load", "resume",
)  # fmt: skip


class Memory:
    """A sink that keeps events."""

    def __init__(self) -> None:
        self.events: list[AnyEvent] = []

    def write_many(self, events: Iterable[AnyEvent]) -> None:
        self.events.extend(events)

    def flush(self) -> None:
        """Nothing to do: it is memory."""


class Helper:
    """A child process that says `ready`, does its work on `go`, tells a line of JSON and leaves on `quit`."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = self.process.pid

    def expect(self) -> str:
        """Its next line; RuntimeError if it died."""
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
        """Asks it to leave, then makes it."""
        try:
            self.process.communicate("quit\n", timeout=5)
        except (subprocess.TimeoutExpired, BrokenPipeError, ValueError):
            self.process.kill()
            self.process.wait()


@contextmanager
def helpers(*commands: Sequence[str]) -> Iterator[list[Helper]]:
    """Children, all ready."""
    with ExitStack() as stack:
        started = []
        for command in commands:
            helper = Helper(*command)
            stack.callback(helper.close)
            started.append(helper)
        for helper in started:
            assert helper.expect() == "ready"
        yield started


def trace(targets: Sequence[Target], act: Callable[[], list[dict[str, Any]]]) -> tuple[Header, list[AnyEvent], list[dict[str, Any]]]:
    """Traces the targets while `act` goes on in a thread."""
    import threading

    sink, results = Memory(), list[list[dict[str, Any]]]()
    with Session(targets) as session:
        header = session.arm()
        worker = threading.Thread(target=lambda: results.append(act()), daemon=True)
        worker.start()
        session.pump(sink, lambda _: None if worker.is_alive() else "migrated")
        session.finish(sink, "migrated")
    if not results:
        raise RuntimeError("the traced work failed; see its standard error")
    return header, sink.events, results[0]


@dataclass
class Run:
    """One traced migration and the truth about it."""

    plan: Plan
    breakdown: Breakdown
    events: list[AnyEvent]
    truth: dict[str, int]
    """ns by phase, by the machine's own clock readings."""
    injected: dict[str, int]
    """How long the delays really were."""
    window_ns: int
    fetched: list[dict[str, Any]]
    same_memory: bool
    errors: dict[str, int] = field(init=False)
    """Ours minus the truth, by phase."""

    def __post_init__(self) -> None:
        self.errors = {name: self.breakdown.phase_ns(name) - self.truth.get(name, 0) for name in PHASES}

    def wrong(self) -> dict[str, tuple[int, int]]:
        """Phases that are off by more than the tolerance: (ours, truth)."""
        return {
            name: (self.breakdown.phase_ns(name), self.truth.get(name, 0))
            for name, error in self.errors.items()
            if abs(error) > max(TOLERANCE_NS, TOLERANCE * self.truth.get(name, 0))
        }


def migrate(plan: Plan, *, unix: bool = False) -> Run:
    """One migration of the truth machine under the tracer."""
    with tempfile.TemporaryDirectory() as directory:
        plan = replace(plan, address=f"{directory}/socket" if unix else f"127.0.0.1:{_free_port()}")
        module = "tests.truth.machine"
        with helpers((module, "destination", encode(plan)), (module, "source", encode(plan))) as (there, here):

            def act() -> list[dict[str, Any]]:
                here.say("go")
                return [json.loads(here.expect()), json.loads(there.expect())]

            time.sleep(0.05)
            targets = [Target(pid=here.pid, role="source"), Target(pid=there.pid, role="destination")]
            header, events, (left, right) = trace(targets, act)
    marks = [*left["marks"], *right["marks"]]
    truth: dict[str, int] = {}
    for (begin, phase), (end, _) in zip(marks, marks[1:], strict=False):
        truth[phase] = truth.get(phase, 0) + end - begin
    return Run(
        plan,
        analyse(header, events),
        events,
        truth,
        {**left["injected"], **right["injected"]},
        marks[-1][0] - marks[0][0],
        left["fetched"],
        left["checksum"] == right["checksum"],
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
