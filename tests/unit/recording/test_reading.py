# SPDX-License-Identifier: Apache-2.0
"""Long recordings: what `bench/reading.py` makes of a real one, and that time grows with the number of events alone."""

from __future__ import annotations

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.reading import SEED, precopy_of, stretched, switchover_of
from ebpf_mig.analysis.material import split
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import Header, Kick, Transfer
from ebpf_mig.recording.file import Recording, read_recording

_small = st.integers(0, 3)


@pytest.fixture(scope="module")
def seed() -> tuple[Header, list]:
    recording = read_recording(SEED)
    return recording.header, recording.events


def test_a_longer_precopy_leaves_the_switchover_as_it_was(seed) -> None:
    header, events = seed
    begin, end = precopy_of(header, events)
    assert end > begin
    longer = list(stretched(header, events, 5000))
    assert 4000 < len(longer) <= 5000
    real, long = (analyse(Recording(header=header, events=those)).breakdown for those in (events, longer))
    assert switchover_of(long) == switchover_of(real)
    assert len(long.dirty_log.passes) > 5 * len(real.dirty_log.passes)
    longer_ns = long.migration.total_ns - real.migration.total_ns
    assert longer_ns > 0 and longer_ns % (end - begin) == 0


def test_time_grows_with_the_number_of_events_and_no_faster(seed) -> None:
    """Four times the events take about four times the time; something quadratic would take sixteen times."""
    header, events = seed
    took = []
    for count in (20_000, 80_000):
        longer = list(stretched(header, events, count))
        recording = Recording(header=header, events=longer)
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            analyse(recording)
            best = min(best, time.process_time() - begin)
        took.append(best)
    assert took[1] < 8 * took[0]


@given(st.lists(st.builds(Kick, _small, st.just(1), _small, _small, _small)))
def test_events_are_sorted_by_all_their_fields(kicks: list[Kick]) -> None:
    sorted_by_all = sorted(kicks, key=msgspec.structs.astuple)
    found = split(Recording(header=Header(), events=kicks)).processes
    assert (found[1].kicks if kicks else []) == sorted_by_all


@given(st.lists(st.builds(Transfer, _small, _small, st.just(1), *[_small] * 10)))
def test_transfers_too(transfers: list[Transfer]) -> None:
    found = split(Recording(header=Header(), events=transfers)).processes
    ordered = found[1].transfers if transfers else []
    assert ordered == sorted(ordered, key=msgspec.structs.astuple)
    assert len(ordered) == len(transfers)
