# SPDX-License-Identifier: Apache-2.0
"""A delay in each phase of a snapshot and of a restore lands there. The truth is the machine's own clock."""

from __future__ import annotations

import itertools
import json
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import Target
from ebpf_mig.recording.file import Recording
from tests.conftest import requires
from tests.truth.files import PHASES
from tests.truth.harness import helpers, trace
from tests.truth.parts import SLOWNESS, Plan, encode

pytestmark = [requires("root", "/dev/kvm", "bcc", "kernel BTF", "x86-64")]

MS = 1_000_000
REST_NS = int(4 * MS * SLOWNESS)
"""What a phase takes without a delay, if no thread waits for a CPU; a wait for the caller needs no more around it."""


def ask(path: str, name: str) -> None:
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
    """Between its requests the caller waits."""
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


def handed_over(plan: Plan, wait_ns: int) -> tuple[Breakdown, dict[str, int], dict[str, int]]:
    """The breakdown, the delays as they were, and what else took time."""
    breakdown, left, right, waits = saved_and_loaded(plan, wait_ns)
    assert left["checksum"] == right["checksum"]
    injected = {**left["injected"], **right["injected"], "management": sum(waits)}
    whole = {**left["whole"], **right["whole"], "waited": left["waited"] + right["waited"]}
    requests = [*left["requests"].values(), *right["requests"].values()]
    whole["management"] = sum(there - answer for (_, answer, _), (there, _, _) in itertools.pairwise(requests))
    return breakdown, injected, whole


@pytest.mark.parametrize("one", [False, True], ids=["all", "each"])
def test_delays_land_in_their_phase(one: bool, tmp_path: Path) -> None:
    for number, chosen in enumerate([(name,) for name in PHASES[::4]] if one else [PHASES]):
        directory = tmp_path / str(number)
        directory.mkdir()
        delays = {name: (10 + 3 * PHASES.index(name)) * MS for name in chosen}
        b, injected, whole = handed_over(Plan(delays=delays, address=str(directory)), 20 * MS)
        assert (b.migration.mode, b.migration.result, b.migration.transport) == ("snapshot", "completed", "file")
        assert b.phase_ns("unattributed") == 0 and sum(p.duration_ns or 0 for p in b.phases) == b.window_ns
        for name in PHASES:
            least = injected.get(name, 0)
            most = whole.get(name, least) + whole["waited"] + REST_NS
            assert 0.98 * least <= b.phase_ns(name) <= most, (name, least, b.phase_ns(name))
        assert 0.9 * injected["sync"] - MS <= b.phase_ns("sync") <= whole["sync"]
        most = whole["management"] + 3 * REST_NS + whole["waited"]
        assert 0.98 * injected["management"] <= b.phase_ns("management") <= most
