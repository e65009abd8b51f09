# SPDX-License-Identifier: Apache-2.0
"""Two sides with a forwarder between them are one migration on one node, if their streams leave no doubt."""

from __future__ import annotations

from collections.abc import Sequence

from ebpf_mig.exporter.tracker import Ended, Tracks
from ebpf_mig.recording.events import RECEIVE, SEND, AnyEvent, Transfer
from tests.unit.exporter.test_tracker import MS, S, ended, logging, restore, run, stop, unix

SIZES = [(10, 300_000), (110, 200_000), (210, 100_000), (300, 50_000), (310, 30_000)]
"""(ms, bytes) of each send of a source that stops at 250 ms."""


def stream(
    pid: int, direction: int, sizes: Sequence[tuple[int, int]], *, late: int = 0, missed: int = 0
) -> list[AnyEvent]:
    """One call each; of the first, `missed` bytes were not seen."""
    found: list[AnyEvent] = []
    position = 0
    for at, size in sizes:
        seen = size if found else size - missed
        begin = (at + late) * MS
        found.append(Transfer(begin, begin + 1, pid, pid, 7, direction, pid * 100, 1, seen, 1, 1, 0, position))
        position += seen
    return found


def halves(
    pairs: Sequence[tuple[int, int]],
    *,
    late: int = 3,
    missed: int = 0,
    sizes: Sequence[int] = (),
    after: Sequence[int] = (),
    tracks: Tracks | None = None,
) -> Tracks:
    """Migrations of `pairs` at the same time, each through a forwarder. `sizes`: bytes more in the first send.
    `after`: how much later each sends all but its last bytes, ms."""
    tracks = tracks or Tracks()
    for source, destination in pairs:
        tracks.begin(source, "thread", 0, fresh=False)
        tracks.begin(destination, "thread", 0, fresh=True)
    for at, (source, destination) in enumerate(pairs):
        more = sizes[at] if sizes else 0
        shift = after[at] if after else 0
        calls = [(ms + shift * (ms < SIZES[-1][0]), size + more * (ms == SIZES[0][0])) for ms, size in SIZES]
        tracks.saw([unix(source, 1), unix(destination, 2), logging(source, MS)], MS)
        tracks.saw([*stream(source, SEND, calls), stop(source, 250 * MS)], 320 * MS)
        tracks.saw(stream(destination, RECEIVE, calls, late=late, missed=missed), 320 * MS)
        tracks.saw([restore(destination, 320 * MS), run(destination, 330 * MS)], 330 * MS)
    return tracks


def found(tracks: Tracks, pids: Sequence[int]) -> dict[frozenset[int], str]:
    over: list[Ended] = []
    for now in (700 * MS, 3 * S, 100 * S):
        over += ended(tracks, now, pids)
    return {frozenset(end.pids): end.reason for end in over}


def test_two_halves_become_one_migration() -> None:
    tracks = halves([(10, 20)])
    (end,) = ended(tracks, 700 * MS, (10, 20))
    assert end.pids == (10, 20) and end.reason == "migrated"
    assert {event.pid for event in end.events if isinstance(event, Transfer)} == {10, 20}
    assert not tracks


def test_a_source_that_has_just_booted_is_a_source() -> None:
    tracks = Tracks()
    tracks.begin(10, "thread", 0, fresh=True)
    tracks.saw([restore(10, 1), run(10, 2)], 3)
    assert found(halves([(10, 20)], tracks=tracks), (10, 20)) == {frozenset({10, 20}): "migrated"}


def test_one_that_missed_the_beginning_is_paired_if_nothing_else_fits() -> None:
    assert found(halves([(10, 20)], missed=1000), (10, 20)) == {frozenset({10, 20}): "migrated"}


def test_each_of_two_at_a_time_finds_its_own() -> None:
    tracks = halves([(10, 20), (30, 40)], sizes=[0, 777])
    assert found(tracks, (10, 20, 30, 40)) == {frozenset({10, 20}): "migrated", frozenset({30, 40}): "migrated"}


def test_two_that_cannot_be_told_apart_stay_alone() -> None:
    tracks = halves([(10, 20), (30, 40)], sizes=[0, 0])
    over = ended(tracks, 700 * MS, (10, 20, 30, 40))
    assert {end.pids: end.doubtful for end in over} == {(20,): True, (40,): True}
    assert set(found(tracks, (10, 30))) == {frozenset({10}), frozenset({30})}


def test_two_that_can_be_paired_in_one_way_only() -> None:
    """40 may have received what 10 sent, 8 ms later. But then 20 would have received its bytes before 30 sent them."""
    pairs = [(10, 20), (30, 40)]
    tracks = halves(pairs, after=[0, 5], missed=1000)
    assert found(tracks, (10, 20, 30, 40)) == {frozenset(pair): "migrated" for pair in pairs}


def test_three_that_can_be_paired_in_one_way_only() -> None:
    pairs = [(50, 60), (10, 20), (30, 40)]
    tracks = halves(pairs, after=[5, 0, 9], missed=1000)
    assert found(tracks, [pid for pair in pairs for pid in pair]) == {frozenset(pair): "migrated" for pair in pairs}


def test_nobody_is_paired_if_one_stays_alone() -> None:
    """The destination of 10 is elsewhere. By time alone, 40 may have received what 10 sent."""
    tracks = halves([(30, 40)], after=[5], missed=1000)
    tracks.begin(10, "thread", 330 * MS, fresh=False)
    tracks.saw([unix(10, 1), logging(10, MS), *stream(10, SEND, SIZES), stop(10, 250 * MS)], 330 * MS)
    assert set(found(tracks, (10, 30, 40))) == {frozenset({10}), frozenset({30}), frozenset({40})}


def test_one_that_is_left_over_is_not_paired_by_default() -> None:
    tracks = halves([(10, 20), (30, 40)], sizes=[0, 0])
    alive = [10, 20, 30, 40]
    first = ended(tracks, 700 * MS, alive)
    tracks.begin(50, "thread", 700 * MS, fresh=True)  # as 20 and 40, but it ends later
    tracks.saw(stream(50, RECEIVE, SIZES, late=4), 700 * MS)
    tracks.saw([restore(50, 701 * MS), run(50, 702 * MS)], 702 * MS)
    assert {end.pids for end in first} == {(20,), (40,)}
    assert set(found(tracks, [10, 30, 50])) == {frozenset({10}), frozenset({30}), frozenset({50})}


def test_another_stream_is_no_other_half() -> None:
    assert set(found(halves([(10, 20)], late=-5), (10, 20))) == {frozenset({10}), frozenset({20})}


def test_what_the_kernel_half_still_holds_belongs_to_the_stream() -> None:
    """The last calls may be in a batch that nothing has ended yet, while the other side's are there."""
    sent, received = stream(10, SEND, SIZES), stream(20, RECEIVE, SIZES, late=3)
    tracks = Tracks(pending=lambda pid: [t for t in received[-1:] if pid == 20 and isinstance(t, Transfer)])
    tracks.begin(10, "thread", 0, fresh=False)
    tracks.begin(20, "thread", 0, fresh=True)
    tracks.saw([unix(10, 1), unix(20, 2), logging(10, MS)], MS)
    tracks.saw([*sent, stop(10, 250 * MS)], 320 * MS)
    tracks.saw(received[:-1], 320 * MS)
    tracks.saw([restore(20, 320 * MS), run(20, 330 * MS)], 330 * MS)
    assert found(tracks, (10, 20)) == {frozenset({10, 20}): "migrated"}


def test_what_was_sent_before_logging_belongs_to_the_track_before() -> None:
    """A destination migrates on through a forwarder, and sends the header before it logs. Its positions go on."""
    tracks = Tracks()
    tracks.begin(10, "thread", 0, fresh=False)
    tracks.begin(20, "thread", 0, fresh=True)
    tracks.saw([logging(10, 1), logging(10, 2, on=False)], 2)
    sent = stream(10, SEND, SIZES)
    tracks.saw([unix(10, 1), unix(20, 2), sent[0], logging(10, 12 * MS)], 12 * MS)
    tracks.saw([*sent[1:], stop(10, 250 * MS)], 320 * MS)
    tracks.saw([*stream(20, RECEIVE, SIZES, late=3), restore(20, 320 * MS), run(20, 330 * MS)], 330 * MS)
    assert frozenset({10, 20}) in found(tracks, (10, 20))
