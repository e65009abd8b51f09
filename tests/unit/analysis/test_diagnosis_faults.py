# SPDX-License-Identifier: Apache-2.0
"""Each rule of the diagnosis is judged on a fault that the bench makes, or the bench says why there is none."""

from __future__ import annotations

from collections import Counter

import pytest
from msgspec.structs import replace

from bench.diagnosis import CERTAIN, NONE, RIGHT, UNCERTAIN, Score, row, verdict
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
