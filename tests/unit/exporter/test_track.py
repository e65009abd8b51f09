# SPDX-License-Identifier: Apache-2.0
"""Which readers of dirty logs are migrating, where the begin was not seen. Synthetic events; ids as QEMU has them."""

from __future__ import annotations

import pytest

from ebpf_mig.exporter.track import as_of
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import SEND, AnyEvent, Exec, Ioctl, Transfer, VcpuState
from tests.unit.exporter.test_tracker import MS, SOURCE, S, begun, ended

MAIN, MIGRATION, CHANNEL, OTHER_CHANNEL = SOURCE, 11, 12, 13
PAGES, PICTURE, REPLY = 500_000, 500_000, 300


def fetch(tid: int, slots: int, cmd: int = kvm.GET_DIRTY_LOG) -> list[AnyEvent]:
    return [Ioctl(MS + slot, MS + slot + 1, SOURCE, tid, 5, cmd, 0, slot) for slot in range(slots)]


def send(tid: int, size: int, calls: int = 10) -> list[AnyEvent]:
    return [Transfer(2 * MS + tid, 2 * MS + tid + 1, SOURCE, tid, 7, SEND, 100 + tid, calls, size, 1, 1, 0, 0)]


def is_migrating(events: list[AnyEvent]) -> bool:
    tracks = begun(pids=[SOURCE])
    for event in events:
        tracks.saw([event], 3 * MS)
    return ended(tracks, 10 * S) == []


@pytest.mark.parametrize(
    "events",
    [
        [*fetch(MIGRATION, 3), *send(MIGRATION, PAGES)],
        [*fetch(MIGRATION, 2), *send(MIGRATION, PAGES)],
        [*fetch(MIGRATION, 1, kvm.RESET_DIRTY_RINGS), *send(MIGRATION, PAGES)],
        [*fetch(MIGRATION, 3), *send(CHANNEL, PAGES), *send(OTHER_CHANNEL, PAGES)],
        [*fetch(MAIN, 3), *send(MAIN, PAGES)],
        [*fetch(MAIN, 1), *send(MAIN, PICTURE), *fetch(MIGRATION, 2), *send(MIGRATION, PAGES)],
    ],
    ids=["three slots", "two slots", "dirty rings", "multifd", "by the main thread", "beside a display"],
)
def test_a_source_whose_begin_was_missed(events: list[AnyEvent]) -> None:
    assert is_migrating(events)


@pytest.mark.parametrize(
    "events",
    [
        [*fetch(MAIN, 2), *send(MAIN, PICTURE)],
        [*fetch(MIGRATION, 5)],
        [*fetch(MIGRATION, 5), *send(MIGRATION, 100 * REPLY, 100)],
        [*fetch(MIGRATION, 5), *send(MAIN, PAGES)],
        [*send(MIGRATION, PAGES), *fetch(MIGRATION, 5)],
        [*fetch(MIGRATION, 2), *send(CHANNEL, PAGES)],
        [*fetch(MIGRATION, 3), Exec(2 * MS, SOURCE, had_vm=1), *send(MIGRATION, PAGES)],
    ],
    ids=["display", "dirty rate", "its events", "a disk beside it", "sent before", "few slots", "another program"],
)
def test_other_readers_are_not_migrating(events: list[AnyEvent]) -> None:
    assert not is_migrating(events)


@pytest.mark.parametrize(
    ("enter", "left", "runs", "out", "expected"),
    [
        (0, 0, 0, 0, (0, 0)),
        (40, 30, 5, 9, (40, 30)),
        (30, 40, 5, 9, (30, 40)),
        (30, 70, 5, 9, (30, 0)),
        (60, 45, 5, 9, (0, 0)),
        (60, 0, 1, 0, None),
        (60, 55, 1, 5, (0, 0)),
    ],
    ids=["always inside", "inside", "outside", "left later", "entered again", "ran later only", "left and entered"],
)
def test_an_account_as_of_an_instant_in_the_past(
    enter: int, left: int, runs: int, out: int, expected: tuple[int, int] | None
) -> None:
    found = as_of(VcpuState(90, SOURCE, 11, 6, enter, left, 0, runs, 0, out, 0), 50)
    seen = (found.at_ns, found.enter_ns, found.exit_ns) if isinstance(found, VcpuState) else None
    assert seen == (expected and (50, *expected))


def test_a_batch_that_was_read_later_belongs_to_the_try_in_which_it_ended() -> None:
    (batch,) = send(MIGRATION, PAGES)
    assert isinstance(batch, Transfer)
    assert as_of(batch, batch.end_ns) is batch and as_of(batch, batch.end_ns - 1) is None
