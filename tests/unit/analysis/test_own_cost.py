# SPDX-License-Identifier: Apache-2.0
"""What our programs took in the window: on recordings of real migrations, and on timelines by hand."""

from __future__ import annotations

from dataclasses import replace as with_fields
from pathlib import Path

import pytest
from msgspec.structs import replace

from ebpf_mig.analysis import own_cost
from ebpf_mig.analysis.material import split
from ebpf_mig.breakdown import Phase, PhaseName, Side, Span
from ebpf_mig.collector import analyse
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.file import Recording, read_recording

DATA = Path(__file__).parents[2] / "data"
RECORDINGS = sorted(DATA.rglob("*.rec"))
CPUS = 2
"""Of the machines that made them."""
MS = 1_000_000
SLACK_NS = len(PhaseName)
"""Each phase is rounded down to a nanosecond."""


def phase(name: PhaseName, *spans: Span) -> Phase:
    return Phase(phase=name, side=Side.SOURCE, duration_ns=sum(e - b for b, e in spans), spans=list(spans))


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_cost_is_never_more_than_the_cpus_had(path: Path) -> None:
    found = analyse(read_recording(path)).breakdown
    state, window = found.completeness, found.window_ns
    if state.observer_window_estimate_ns is None:
        assert state.observer_phases_ns is None
        return
    least, most = state.observer_window_least_ns, state.observer_window_ns
    assert window is not None and least is not None and most is not None and state.observer_phases_ns is not None
    assert least <= state.observer_window_estimate_ns <= most <= CPUS * window
    assert abs(sum(state.observer_phases_ns.values()) - state.observer_window_estimate_ns) <= SLACK_NS
    for part in found.phases:
        assert 0 <= state.observer_phases_ns[part.phase] <= CPUS * (part.duration_ns or 0)


def test_readings_that_were_left_out_are_estimated() -> None:
    """Of three readings the middle one is left out: what ran before it is known, and estimated without it."""
    wrong = cost = stretches = 0
    for path in RECORDINGS:
        recording = read_recording(path)
        material = split(recording)
        if recording.header.remote is not None:
            continue
        for one, middle, last in zip(material.costs, material.costs[1:], material.costs[2:], strict=False):
            left = with_fields(material, costs=[c for c in material.costs if c is not middle])
            window = one.at_ns, middle.at_ns
            found = own_cost.observe(left, window, [phase(PhaseName.PAUSE, (0, middle.at_ns - one.at_ns))])
            assert found.estimate is not None
            wrong += abs(found.estimate - (middle.run_ns - one.run_ns))
            cost += last.run_ns - one.run_ns
            stretches += 1
    assert stretches > 50
    assert wrong < cost * 0.12


def busy(*, cpus: int, run_ns: int) -> Recording:
    """A window from 100 to 150 ms: 900 calls in its first 10 ms, 100 in its last. Readings at 90 ms and at 700 ms."""
    calls = [ev.Transfer(at * MS, (at + 1) * MS, 7, 7, 3, ev.SEND, 1, n, n, n, 1, 0, 0) for at, n in CALLS]
    readings = [ev.OwnCost(90 * MS, 1 * MS, 1000), ev.OwnCost(700 * MS, 1 * MS + run_ns, 3000)]
    header = ev.Header(begin_ns=1, cpus=cpus, targets=[ev.Target(pid=7, role="source")])
    return Recording(header=header, events=[*calls, *readings], truncated=False, unknown=0)


CALLS = [*((at, 90) for at in range(100, 110)), (149, 100)]
WINDOW = (100 * MS, 150 * MS)
PHASES = [
    phase(PhaseName.PAUSE, (0, 10 * MS)),
    phase(PhaseName.QUIESCE, (10 * MS, 40 * MS)),
    phase(PhaseName.MEMORY_SEND, (40 * MS, 50 * MS)),
]


def test_each_phase_has_the_cost_of_its_calls() -> None:
    found = own_cost.observe(split(busy(cpus=2, run_ns=10 * MS)), WINDOW, PHASES)
    assert found.phases is not None and found.estimate is not None
    assert found.phases["pause"] == pytest.approx(9 * MS, rel=1e-3)
    assert found.phases["quiesce"] < MS / 100
    assert found.phases["memory.send"] == pytest.approx(1 * MS, rel=1e-3)
    assert (found.least, found.most) == (0, 10 * MS)


@pytest.mark.parametrize(("cpus", "most"), [(0, 556 * MS), (2, 100 * MS), (64, 556 * MS)])
def test_no_more_ran_than_the_cpus_had(cpus: int, most: int) -> None:
    found = own_cost.observe(split(busy(cpus=cpus, run_ns=556 * MS)), WINDOW, PHASES)
    assert found.most == most and found.estimate is not None and found.phases is not None
    assert found.estimate <= most
    if cpus == 2:
        assert found.phases["pause"] == 20 * MS and found.phases["memory.send"] == 20 * MS


def test_runs_for_other_processes_are_even_in_time() -> None:
    recording = busy(cpus=2, run_ns=10 * MS)
    *others, last = recording.events
    assert isinstance(last, ev.OwnCost)
    many = replace(last, runs=1000 + 2000 + 10 * MS // own_cost.IDLE_RUN_NS)
    found = own_cost.observe(split(replace(recording, events=[*others, many])), WINDOW, PHASES)
    assert found.estimate == pytest.approx(10 * MS * 50 / 610, rel=1e-3)
    assert found.phases is not None and found.phases["quiesce"] == pytest.approx(10 * MS * 30 / 610, rel=1e-3)


def test_without_a_reading_after_the_window_there_is_no_estimate() -> None:
    recording = busy(cpus=2, run_ns=10 * MS)
    found = own_cost.observe(split(replace(recording, events=recording.events[:-1])), WINDOW, PHASES)
    assert found == own_cost.OwnCost(least=0)
