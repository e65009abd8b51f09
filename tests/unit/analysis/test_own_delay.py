# SPDX-License-Identifier: Apache-2.0
"""`--what-if untraced`: with sums by hand in a real recording, and in one that does not say what tracing took."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from ebpf_mig.analysis import own_delay
from ebpf_mig.analysis.result import Analysis
from ebpf_mig.analysis.whatif import Hypothesis, predict
from ebpf_mig.breakdown import Side
from ebpf_mig.collector import analyse
from ebpf_mig.commands.changes import parse_changes
from ebpf_mig.errors import UsageError
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.file import read_recording

FILE = Path(__file__).parents[2] / "data" / "qemu-7.2-tcp.rec"
UNTRACED = Hypothesis(untraced=True)
NS_A_US = 100
"""Of each microsecond of the window, our programs take so much in this test."""


def with_sums() -> Analysis:
    """The recording, as if our programs had taken a tenth of one CPU all the time."""
    recording = read_recording(FILE)
    plain = analyse(recording)
    begin, end = plain.origin_ns, plain.origin_ns + (plain.breakdown.window_ns or 0)
    took = (end - begin) * NS_A_US // 1000
    own = [
        ev.OwnRates(begin - 1000, 50, 0),
        ev.OwnRuns(begin, begin, begin, 0, 0, 1, 0, 0, 0),
        ev.OwnRuns(begin, end, end, 0, took, 1, 0, 0, 0),
    ]
    return analyse(replace(recording, events=[*recording.events, *own]))


def test_what_ran_in_the_process_that_was_to_act_is_subtracted() -> None:
    analysis = with_sums()
    b = analysis.breakdown
    assert b.blackout is not None and b.blackout_ns is not None
    found = own_delay.delays(analysis.traced, b.phases, analysis.origin_ns, b.blackout)
    assert found is not None
    in_all = {name: cost.programs_ns for name, cost in b.completeness.tracing.phases.items()}  # type: ignore[union-attr]
    for phase in b.phases:
        assert 0 <= found[phase.phase] <= in_all[phase.phase] + 1
    both = [phase.phase for phase in b.phases if phase.side == Side.BOTH and phase.duration_ns]
    assert both and all(abs(found[name] - in_all[name]) <= 2 for name in both), "where both act, all of it counts"
    assert 0 < sum(found.values()) < sum(in_all.values()), "a part of the other side's is left out, and the pause"
    predicted = predict(analysis, UNTRACED)
    assert predicted.blackout_ns == b.blackout_ns - sum(found.values())
    assert predicted.changes[0].change_ns == -sum(found.values()) and "ms in the process" in predicted.changes[0].why


def test_a_recording_without_the_sums_has_no_prediction() -> None:
    found = predict(analyse(read_recording(FILE)), UNTRACED)
    assert found.blackout_ns is None and found.changes[0].change_ns is None
    assert "does not say what tracing took" in found.changes[0].why


def test_the_condition_has_no_value() -> None:
    assert parse_changes(["untraced"]).untraced and not parse_changes(["nodelay"]).untraced
    for bad in ("untraced=0", "untraced=", "traced"):
        with pytest.raises(UsageError, match="cannot read the change"):
            parse_changes([bad])
