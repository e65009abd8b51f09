# SPDX-License-Identifier: Apache-2.0
"""Each rule of the diagnosis is judged on a fault that the bench makes, or the bench says why there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace as replaced
from pathlib import Path

import pytest
from msgspec.structs import replace

from bench import waited
from bench.diagnosis import CERTAIN, NONE, RIGHT, UNCERTAIN, Ran, Score, row, unmade, verdict
from bench.faults import FAULTS, UNMADE, Fault
from ebpf_mig import breakdown as b
from ebpf_mig.analysis.diagnosis.rules import RULES
from tests.unit import breakdowns

KNOWN = {rule.name for rule in RULES if rule.known}
MADE = frozenset().union(*(fault.answers for fault in FAULTS))
FAULT = Fault("link", "slow", frozenset({"link", "window"}), lambda _path, _on: None, "source")


def test_each_rule_names_a_fault_or_the_reason_why_there_is_none() -> None:
    assert MADE | UNMADE.keys() == KNOWN
    assert not MADE & UNMADE.keys()
    assert all(UNMADE.values())


def test_each_fault_has_a_name_of_its_own() -> None:
    assert set(Counter(fault.name for fault in FAULTS).values()) == {1}


def judged(rule: str, *, single: bool = True, known: bool = True, side: b.Side = b.Side.SOURCE) -> str:
    cause = b.Cause(
        rule=rule, what="w", side=side, phase=b.PhaseName.HANDOVER, duration_ns=9, share=0.9, known=known, evidence=[]
    )
    whole = breakdowns.precopy()
    diagnosis = b.Diagnosis(headline="", mostly=None, single=single, because=[cause], not_=[], help=[])
    return verdict(FAULT, replace(whole, diagnosis=diagnosis))[0]


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (judged("link"), RIGHT),
        (judged("window"), RIGHT),
        (judged("link", side=b.Side.BOTH), RIGHT),
        (judged("link", side=b.Side.DESTINATION), CERTAIN),
        (judged("cpu"), CERTAIN),
        (judged("work", known=False), UNCERTAIN),
        (judged("link", single=False), NONE),
        (judged("cpu", single=False), NONE),
    ],
)
def test_verdicts(found: str, wanted: str) -> None:
    assert found == wanted


def test_a_breakdown_without_a_diagnosis_names_no_cause() -> None:
    assert verdict(FAULT, replace(breakdowns.precopy(), diagnosis=None))[0] == NONE


@pytest.mark.parametrize(
    ("verdicts", "good"),
    [
        ({RIGHT: 9, NONE: 1}, True),
        ({RIGHT: 9, UNCERTAIN: 1}, True),
        ({RIGHT: 8, UNCERTAIN: 2}, False),
        ({RIGHT: 9, CERTAIN: 1}, False),
        ({}, False),
    ],
)
def test_nine_of_ten_must_be_right_and_nothing_wrong_certain(verdicts: dict[str, int], good: bool) -> None:
    score = Score(FAULT, 1_000_000, Counter(verdicts), [9_000_000], Counter({"so": 1}))
    assert score.good == good
    assert row(score).startswith("| link | slow | 1.0 | 9.0 |") and row(score).endswith("| 1 x so |")


MS = 1_000_000
RUN = Ran(breakdowns.precopy(), 100 * MS, 1000 * MS)


def reading(at_ms: int, source_ms: int, destination_ms: int) -> waited.Reading:
    """Two threads a side; the second one waits a third as long."""
    sides = {"source": source_ms * MS, "destination": destination_ms * MS}
    return at_ms * MS, at_ms * MS + 1, {side: {"7": ns, "8": ns // 3} for side, ns in sides.items()}


@pytest.mark.parametrize(
    ("waits", "throttles", "source_ms", "destination_ms", "why"),
    [
        ("source", False, 60, 5, ""),
        ("source", False, 40, 5, "the source waited 40.0 ms for a CPU, the destination waited 5.0 ms for a CPU"),
        ("source", False, 60, 70, "the source waited 60.0 ms for a CPU, the destination waited 70.0 ms for a CPU"),
        ("", False, 40, 5, ""),
        ("", False, 5, 60, "the source waited 5.0 ms for a CPU, the destination waited 60.0 ms for a CPU"),
        ("", True, 60, 5, ""),
    ],
)
def test_the_scheduler_must_agree_that_the_fault_took_half(
    waits: str, throttles: bool, source_ms: int, destination_ms: int, why: str, tmp_path: Path
) -> None:
    """Readings before and after the downtime do not count: both sides waited long then."""
    within = [reading(1001, 500, 500), reading(1095, 500 + source_ms, 500 + destination_ms)]
    readings = [reading(900, 0, 0), *within, reading(1200, 2000, 2000)]
    (tmp_path / "x.waited").write_text(json.dumps(readings))
    fault = replaced(FAULT, waits=waits, throttles=throttles)
    assert unmade(fault, 10 * MS, RUN, tmp_path / "x.rec") == why


def test_waits_of_a_thread_that_ended_count(tmp_path: Path) -> None:
    """QEMU's migration thread ends before the guest runs at the destination. Thread 9 is new, 5 waited before."""
    steps: list[dict[str, int]] = [{"5": 70 * MS}, {"5": 71 * MS, "9": 30 * MS}, {"5": 71 * MS, "9": 40 * MS}, {}]
    readings = [[at * 10 * MS, at * 10 * MS + 1, {"source": step}] for at, step in enumerate(steps, 1)]
    (tmp_path / "x.waited").write_text(json.dumps(readings))
    assert waited.within(tmp_path / "x.waited", 0, 100 * MS) == {"source": 40 * MS}


def test_the_machines_own_clock_must_agree(tmp_path: Path) -> None:
    fault, path = replaced(FAULT, timed="fetch.kernel"), tmp_path / "x.rec"
    for least, why in ((60, ""), (40, "fetch.kernel took 40.0 ms")):
        path.with_suffix(".truth").write_text(json.dumps({"fetch.kernel": [least * MS, 90 * MS]}))
        assert unmade(fault, 10 * MS, RUN, path) == why


def test_a_downtime_that_is_hardly_longer_has_another_cause(tmp_path: Path) -> None:
    assert unmade(FAULT, 60 * MS, RUN, tmp_path / "x.rec") == "it is no longer than without it"
    assert unmade(FAULT, 40 * MS, RUN, tmp_path / "x.rec") == ""  # nothing was read beside it


def test_a_thread_that_shares_its_cpu_waits_by_the_kernels_account(tmp_path: Path) -> None:
    """Two processes spin on one CPU, so each waits while the other one runs."""
    cpu = max(os.sched_getaffinity(0))
    spin = [sys.executable, "-c", f"import os\nos.sched_setaffinity(0, [{cpu}])\nwhile True: pass"]
    spinning = [subprocess.Popen(spin) for _ in range(2)]
    try:
        time.sleep(0.2)
        with waited.watching(tmp_path / "x.waited", {"source": spinning[0].pid}):
            time.sleep(1.5)
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    readings = json.loads((tmp_path / "x.waited").read_text())
    begin, end = readings[0][0], readings[-1][1]
    assert end - begin > 500 * MS and len(readings) > 20
    waits = waited.within(tmp_path / "x.waited", begin, end)["source"]
    assert 0.4 * (end - begin) < waits <= end - begin
