# SPDX-License-Identifier: Apache-2.0
"""Two emulated machines, each with its own kernel and clock, compared with the clock of the outer host.

The recordings in tests/data/machines are those of `python -m tests.vm pair --keep`: a migration from one machine to the
other. `heard.json` is what the outer host heard meanwhile.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ebpf_mig.collector import analyse
from ebpf_mig.joining.merge import read_both
from tests.vm.pair import DATA, Ear, Heard, agree, listened

MS = 1_000_000


@pytest.fixture
def ears(tmp_path: Path) -> tuple[Ear, Ear]:
    return Ear(tmp_path / "source"), Ear(tmp_path / "destination")


def test_beats_and_clock_readings_are_told_apart_however_they_are_cut(ears: tuple[Ear, Ear]) -> None:
    ear, rest = ears[0], b""
    for now, data in enumerate((b"AAC12", b"3;AC4", b"A5;C6;A", b"C7")):
        rest = ear.take(rest + data, now)
    assert ear.beats == [0, 0, 1, 2, 2]
    assert ear.readings == [(123, 1), (45, 2), (6, 2)]
    assert rest == b"C7"


def test_silence_period_and_clocks_by_the_outer_clock(ears: tuple[Ear, Ear]) -> None:
    source, destination = ears
    source.beats = [at * MS for at in (0, 10, 20, 32)]
    destination.beats = [at * MS for at in (500, 511, 521)]
    for number, late in enumerate((3, 1, 2, 9, 9)):
        source.readings.append((number * MS, (number + late) * MS))
        destination.readings.append((7000 * MS + number * MS, (number + late + 1) * MS))
    heard = listened(source, destination)
    assert (heard.silent_ns, heard.period_ns) == (468 * MS, 12 * MS)
    assert heard.ahead_ns == (1 - (1 + 1 - 7000)) * MS, "the quickest reading of each"
    assert heard.doubt_ns == 2 * MS
    source.beats = [1]
    with pytest.raises(ValueError, match="1 beats from the source"):
        listened(source, destination)


def test_two_kernels_and_two_clocks_agree_with_what_was_heard_outside() -> None:
    whole = read_both(*(str(DATA / f"{role}.rec") for role in ("destination", "source")))
    outcome = analyse(whole).breakdown
    heard = Heard(**json.loads((DATA / "heard.json").read_text()))
    assert outcome.completeness.verdict != "incomplete"
    assert outcome.migration.result == "completed"
    remote = whole.header.remote
    assert remote is not None
    assert remote.kernel != whole.header.kernel
    assert remote.boot_id != whole.header.boot_id
    assert agree(outcome, heard)
    assert outcome.blackout_ns is not None
    moved = heard.period_ns + 2 * (outcome.clock.bound_ns or 0)
    assert not agree(outcome, Heard(heard.silent_ns + 2 * moved, heard.period_ns, heard.ahead_ns, heard.doubt_ns))
