# SPDX-License-Identifier: Apache-2.0
"""Saves a guest, loads it with memory on demand under the real tracer, and compares the waits with the server's clock.

In: a `Plan` with a `backend`, whose address is an empty directory. Out: a `Seen`.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from ebpf_mig.breakdown import Breakdown, PageSource, PageWaits, VcpuFaults
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import Target
from ebpf_mig.recording.file import Recording
from tests.truth.harness import helpers, trace
from tests.truth.parts import SLOWNESS, Plan, encode

WAKE_NS = int(2_000_000 * SLOWNESS)
"""How long the guest's thread or the server takes at most to notice that it is its turn, if it gets a CPU."""


@dataclass
class Seen:
    """One restore."""

    plan: Plan
    breakdown: Breakdown
    served: list[tuple[int, int]]
    """When each page was asked for, and when it was there."""
    touched_ns: int
    """From the start until the guest had touched its pages."""

    @property
    def row(self) -> VcpuFaults:
        """The only vCPU's."""
        (row,) = self.breakdown.page_faults or []
        return row

    @property
    def waits(self) -> PageWaits:
        """Those for the server."""
        none = PageWaits(source=PageSource.UNKNOWN, count=0, waited_ns=0, longest_ns=0, last_ns=0)
        return next((one for one in self.row.waits if one.source in self.sources()), none)

    @property
    def least_ns(self) -> int:
        """How long the server took for all pages. The guest waited for longer."""
        return sum(end - begin for begin, end in self.served)

    def sources(self) -> set[PageSource]:
        """Who can be seen to have served them. If the guest can be interrupted, KVM decides who waits."""
        if self.plan.backend == "file":
            return {PageSource.FILE, PageSource.BACKGROUND} if self.plan.interrupts else {PageSource.FILE}
        return {PageSource.USERFAULTFD, PageSource.BACKGROUND} if self.plan.interrupts else {PageSource.USERFAULTFD}

    def wrong(self) -> list[str]:
        """What the truth contradicts."""
        m, waits, delay = self.breakdown.migration, self.waits, self.plan.delays["page"]
        longest = max(end - begin for begin, end in self.served)
        claims = {
            "mode": (m.mode, m.result) == ("snapshot", "completed"),
            "source": [one.source for one in self.row.waits] == [waits.source],
            "count": waits.count == len(self.served) >= self.plan.dirty_pages,
            "waited": self.least_ns - waits.count * WAKE_NS <= waits.waited_ns <= self.touched_ns,
            "delay": waits.waited_ns >= 0.98 * delay * waits.count,
            "longest": delay <= waits.longest_ns <= longest + 5 * WAKE_NS,
            "last": waits.waited_ns <= waits.last_ns <= self.touched_ns + WAKE_NS,
        }
        if waits.source == PageSource.FILE:  # the kernel counts those itself; see `PageFaults`
            claims["major"] = self.row.major is not None and waits.count <= self.row.major <= waits.count + 8
        return [name for name, holds in claims.items() if not holds]


def ask(path: str, name: str) -> None:
    """One request, and its answer."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(f"PUT /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 204")


class Traced(NamedTuple):
    """A guest that was saved and loaded, and what each side said of it."""

    breakdown: Breakdown
    source: dict[str, Any]
    destination: dict[str, Any]
    waits: list[int]
    """How long the caller waited after each request, ns."""


def saved_and_loaded(plan: Plan, wait_ns: int) -> Traced:
    """Saves a guest and loads it in a second process. Between its requests the caller waits."""
    module, waits = "tests.truth.files", list[int]()
    with helpers((module, "destination", encode(plan)), (module, "source", encode(plan))) as (there, here):

        def act() -> list[dict[str, Any]]:
            for helper in (here, there):
                helper.say("go")
            for role, name in (("source", "pause"), ("source", "create"), ("destination", "load")):
                ask(f"{plan.address}/{role}", name)
                answered = time.monotonic_ns()
                time.sleep(wait_ns / 1e9)
                waits.append(time.monotonic_ns() - answered)
            ask(f"{plan.address}/destination", "resume")
            return [json.loads(here.expect()), json.loads(there.expect())]

        targets = [Target(pid=here.pid, role="source"), Target(pid=there.pid, role="destination")]
        header, events, (left, right) = trace(targets, act)
    return Traced(analyse(Recording(header=header, events=events)).breakdown, left, right, waits)


def restored(plan: Plan) -> Seen:
    """What was seen of a guest that is saved, loaded, and then touches its pages."""
    traced = saved_and_loaded(plan, 10_000_000)
    found = traced.destination
    return Seen(plan, traced.breakdown, [(begin, end) for begin, end in found["served"]], found["touched"])
