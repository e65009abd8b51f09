# SPDX-License-Identifier: Apache-2.0
"""Predictions without a cause that the diagnosis names, on the recordings of real migrations."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from ebpf_mig.analysis.diagnosis.rules import PREDICTABLE, RULES
from ebpf_mig.analysis.whatif import Hypothesis, predict
from ebpf_mig.breakdown import Result
from ebpf_mig.collector import analyse
from ebpf_mig.commands.changes import parse_changes
from ebpf_mig.errors import UsageError
from ebpf_mig.recording.file import read_recording

DATA = Path(__file__).parents[2] / "data"
RECORDINGS = sorted(DATA.glob("*.rec"))
NONE = Fraction(0)


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_what_is_gained_is_what_the_diagnosis_explained(path: Path) -> None:
    analysis = analyse(read_recording(path))
    b = analysis.breakdown
    if b.blackout_ns is None or b.migration.result != Result.COMPLETED:
        with pytest.raises(UsageError, match="needs the blackout of a completed migration"):
            predict(analysis, Hypothesis(nodelay=True))
        return
    every = tuple((name, NONE) for name in PREDICTABLE)
    found = predict(analysis, Hypothesis(causes=every, texts=tuple((name, f"{name}=0") for name in PREDICTABLE)))
    gains = {change.wish.removesuffix("=0"): -(change.change_ns or 0) for change in found.changes}
    assert gains.keys() == PREDICTABLE.keys() and min(gains.values()) >= 0
    assert found.blackout_ns == b.blackout_ns - sum(gains.values()) >= 0
    explained: dict[str, int] = {}
    for cause in b.diagnosis.because if b.diagnosis else ():
        explained[cause.rule] = explained.get(cause.rule, 0) + cause.duration_ns
    queued = {c.wish.removesuffix("=0") for c in found.changes if "drained its queue" in c.why}
    for name in explained.keys() & PREDICTABLE.keys() - queued:
        assert gains[name] >= explained[name]  # the diagnosis shows the largest only
    half = predict(analysis, Hypothesis(causes=tuple((name, Fraction(1, 2)) for name in PREDICTABLE)))
    assert half.blackout_ns == pytest.approx(b.blackout_ns - sum(gains.values()) / 2, abs=len(gains))


@pytest.mark.parametrize(
    ("tcp", "unix", "off"),
    [("cloud-hypervisor-54-tcp", "cloud-hypervisor-54-unix", 0.3), ("qemu-10.0-ring", "qemu-10.0-tcp", 0.3)],
)
def test_without_nagle_it_takes_as_long_as_a_run_that_had_none(tcp: str, unix: str, off: float) -> None:
    """The witness is another run: over a UNIX socket, or one in which nothing was held back."""
    held, free = (analyse(read_recording(DATA / f"{name}.rec")) for name in (tcp, unix))
    then = predict(held, Hypothesis(nodelay=True)).blackout_ns
    assert then is not None and free.breakdown.blackout_ns is not None
    assert then == pytest.approx(free.breakdown.blackout_ns, rel=off)


def test_what_was_not_held_back_gains_nothing() -> None:
    found = predict(analyse(read_recording(DATA / "qemu-7.2-tcp.rec")), Hypothesis(nodelay=True))
    assert found.changes[0].change_ns == 0 and "found nothing of this kind" in found.changes[0].why


def test_each_cause_with_a_remedy_can_be_predicted_or_is_the_links() -> None:
    not_predicted = {rule.name for rule in RULES if rule.known and not rule.without}
    assert not_predicted == {"nagle", "link", "window", "reader", "buffer", "fetch", "late"}


def test_the_words_are_read() -> None:
    read = parse_changes(["nodelay", "srcu=0", "cpu=25%"])
    assert (read.nodelay, read.causes) == (True, (("srcu", NONE), ("cpu", Fraction(1, 4))))
    for bad in ("nodelay=0", "nodelay=", "nagle=0", "srcu", "srcu=", "srcu=1ms", "work=0", "link=0"):
        with pytest.raises(UsageError):
            parse_changes([bad])
