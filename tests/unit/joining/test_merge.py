# SPDX-License-Identifier: Apache-2.0
"""Joining the recordings of two hosts, made of real recordings in which one kernel saw both."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from msgspec.structs import replace

from bench.joining import DATA, Skew, random_joins, seeds_of, side_of, skewed
from ebpf_mig.collector import analyse
from ebpf_mig.commands.join import Offset
from ebpf_mig.errors import UsageError
from ebpf_mig.joining.match import JoinError
from ebpf_mig.joining.merge import Hint, joined
from ebpf_mig.recording.events import AnyEvent, ClockPair, Ending, Segment, Socket, TcpInfo, Transfer
from ebpf_mig.recording.file import Recording, RecordingWriter, read_recording
from ebpf_mig.report import text
from ebpf_mig.text import printable
from tests.unit.commands.test_cli import run

QEMU = DATA / "qemu-11.1-tcp.rec"
CH = DATA / "cloud-hypervisor-54-4connections.rec"
HOUR = 3600 * 10**9


def sides(path: Path, offset: int = HOUR, ppm: float = 30) -> tuple[Recording, Recording]:
    one = read_recording(path)
    return side_of(one, "source"), skewed(side_of(one, "destination"), Skew(offset, ppm, one.header.begin_ns))


def changed(recording: Recording, change: Callable[[AnyEvent], AnyEvent | None]) -> Recording:
    return replace(recording, events=[new for event in recording.events if (new := change(event)) is not None])


def only(kind: type, **fields: object) -> Callable[[AnyEvent], AnyEvent]:
    return lambda event: replace(event, **fields) if isinstance(event, kind) else event


def test_the_truth_lies_within_the_bound_whatever_the_clocks() -> None:
    random.seed(11)
    seeds = seeds_of(sorted(DATA.glob("*.rec")))
    assert len(seeds) > 15
    for _, _, _, bad in random_joins(seeds, 2 * len(seeds)):
        assert bad == []


def test_sequence_numbers_bound_the_clocks_within_microseconds() -> None:
    random.seed(12)
    for _, _, joined_one, bad in random_joins(seeds_of([]), 50):
        assert bad == []
        assert joined_one.clock.bound_ns is not None
        assert joined_one.clock.bound_ns < 100_000


@pytest.mark.parametrize("path", [QEMU, CH], ids=lambda path: path.stem)
def test_the_order_of_the_two_does_not_matter(path: Path) -> None:
    there, back = joined(*sides(path)), joined(*sides(path)[::-1])
    assert analyse(there).breakdown == analyse(back).breakdown


def test_the_breakdown_reports_which_clock_is_ahead_and_by_how_much() -> None:
    whole = joined(*sides(QEMU))
    breakdown = analyse(whole).breakdown
    assert breakdown.migration.source is not None
    assert breakdown.migration.source.host == "source"
    assert breakdown.migration.destination is not None
    assert breakdown.migration.destination.host == "destination"
    assert breakdown.clock.bound_ns is not None
    assert abs(breakdown.clock.offset_ns - HOUR) < 10**6
    exact = {"pause", "quiesce", "fetch.kernel", "fetch.user", "memory.send", "state.save", "state.send"}
    for phase in breakdown.phases:
        assert (phase.bound_ns == 0) == (phase.phase in exact) or phase.phase not in {*exact, "handover"}
    shown = text.render(breakdown)
    assert " ± " in shown.splitlines()[0]
    assert "+3600000." in shown


def test_a_joined_recording_can_be_written_and_read_again(tmp_path: Path) -> None:
    whole = joined(*sides(CH))
    with RecordingWriter(tmp_path / "both.rec", whole.header) as writer:
        writer.write_many(whole.events)
    again = read_recording(tmp_path / "both.rec")
    assert analyse(again).breakdown == analyse(whole).breakdown
    with pytest.raises(JoinError, match="is already a joined recording"):
        joined(again, sides(CH)[0])


def test_through_nat_the_bytes_identify_the_connection() -> None:
    source, destination = sides(CH)
    other = changed(destination, only(Socket, local="10.0.0.7:4444", remote="192.0.2.1:1024"))
    whole = joined(source, other)
    plain = joined(*sides(CH))
    breakdown = analyse(whole).breakdown
    assert breakdown.blackout_ns == analyse(plain).breakdown.blackout_ns
    assert breakdown.migration.connections == 4
    assert any("NAT" in note for note in breakdown.notes)


def test_equal_process_ids_on_both_hosts_stay_apart() -> None:
    source, destination = sides(QEMU)
    pid = source.header.targets[0].pid
    header = replace(destination.header, targets=[replace(destination.header.targets[0], pid=pid)])
    renamed = changed(destination, lambda event: replace(event, pid=pid) if hasattr(event, "pid") else event)
    whole = joined(source, replace(renamed, header=header))
    plain = joined(*sides(QEMU))
    one, two = analyse(whole).breakdown, analyse(plain).breakdown
    assert one.phases == two.phases
    assert one.migration.destination is not None
    assert one.migration.destination.pid == pid


def test_where_nothing_came_back_one_side_is_open_and_the_report_says_so() -> None:
    source, destination = sides(QEMU)

    def one_way(event: AnyEvent) -> AnyEvent | None:
        if isinstance(event, Segment):
            return None
        back = isinstance(event, Transfer) and event.direction == (
            1 if event.pid == source.header.targets[0].pid else 0
        )
        return None if back else event

    whole = joined(changed(source, one_way), changed(destination, one_way))
    breakdown = analyse(whole).breakdown
    assert breakdown.clock.bound_ns is None
    assert breakdown.clock.open == "least"
    true = analyse(read_recording(QEMU)).breakdown.blackout_ns
    assert breakdown.blackout_ns is not None
    assert true is not None
    assert breakdown.blackout_ns <= true
    shown = text.render(breakdown)
    assert shown.startswith("Downtime ≥ ")
    assert "since nothing came back" in shown


def _opened(path: Path):  # type: ignore[no-untyped-def]  # header and events
    one = read_recording(path)
    return one.header, one.events


def test_recordings_that_do_not_belong_together_are_refused_with_the_reason() -> None:
    source, destination = sides(QEMU)
    other_source, other_destination = sides(CH)
    with pytest.raises(JoinError, match=r"A and B have no connection in common: the largest are 127\.0\.0\.1:43744 - "):
        joined(source, other_destination, ("A", "B"))
    with pytest.raises(JoinError, match="A and B were both recorded on a source"):
        joined(source, other_source, ("A", "B"))
    with pytest.raises(JoinError, match="A and B are the same recording"):
        joined(source, side_of(read_recording(QEMU), "source"), ("A", "B"))
    with pytest.raises(JoinError, match="A already has both sides of a migration"):
        joined(read_recording(QEMU), destination, ("A", "B"))
    half = changed(destination, lambda e: replace(e, bytes=0, position=0) if isinstance(e, Transfer) else e)
    with pytest.raises(JoinError, match="in common, but not its bytes"):
        joined(source, half, ("A", "B"))
    empty = replace(destination, events=[])
    with pytest.raises(JoinError, match="B has no connection with enough bytes"):
        joined(source, empty, ("A", "B"))


def test_the_same_bytes_at_times_that_no_clock_explains_are_another_migration() -> None:
    source, destination = sides(QEMU)
    first = min(e.begin_ns for e in destination.events if isinstance(e, Transfer))

    def stretched(event: AnyEvent) -> AnyEvent:
        if isinstance(event, Transfer):
            later = 2 * (event.begin_ns - first)
            return replace(event, begin_ns=event.begin_ns + later, end_ns=event.end_ns + later)
        return event

    with pytest.raises(JoinError, match="received before they were sent"):
        joined(source, changed(destination, stretched), ("A", "B"))


def test_a_hint_narrows_the_bound_and_is_refused_if_it_contradicts_it() -> None:
    clock = ClockPair(10**9, 10**18, 100)

    def walls(ahead_ns: int) -> tuple[Recording, Recording]:
        source, destination = sides(QEMU, HOUR, 0)
        theirs = replace(clock, monotonic_ns=clock.monotonic_ns + HOUR, realtime_ns=clock.realtime_ns + ahead_ns)
        return (
            replace(source, header=replace(source.header, clock=clock)),
            replace(destination, header=replace(destination.header, clock=theirs)),
        )

    known = joined(*walls(5000), hint=Hint(5000, 1000)).header.remote
    assert known is not None
    assert known.bound_ns is not None
    assert known.bound_ns <= 1200
    assert abs(known.offset_ns - HOUR) <= known.bound_ns
    with pytest.raises(
        UsageError, match="--clock-offset contradicts what was sent and received: it is off by at least"
    ):
        joined(*walls(0), hint=Hint(10**9, 1000))
    without = [replace(one, header=replace(one.header, clock=None)) for one in walls(0)]
    with pytest.raises(UsageError, match="without its wall clock"):
        joined(without[0], without[1], hint=Hint(0, 0))


def test_of_several_migrations_in_one_recording_one_is_chosen() -> None:
    one, other = sides(CH), sides(QEMU, -HOUR, -20)

    def both(a: Recording, b: Recording) -> Recording:
        header = replace(a.header, targets=[*a.header.targets, *b.header.targets])
        return replace(a, header=header, events=[*a.events, *(e for e in b.events if not isinstance(e, Ending))])

    second = [side.header.targets[0].pid for side in other]
    largest = joined(both(one[0], other[0]), both(one[1], other[1]))
    assert largest.header.targets[0].pid == sides(CH)[0].header.targets[0].pid
    assert any("also hold migrations of" in note for note in largest.header.notes)
    one, other = sides(CH), sides(QEMU, -HOUR, -20)
    chosen = joined(both(one[0], other[0]), both(one[1], other[1]), pid=second[1])
    plain = joined(*sides(QEMU, -HOUR, -20))
    assert [target.pid for target in chosen.header.targets] == second
    assert analyse(chosen).breakdown.blackout_ns == analyse(plain).breakdown.blackout_ns
    with pytest.raises(UsageError, match="no migration of process 1 is in both"):
        joined(*sides(CH), pid=1)


def test_tracing_that_began_during_the_connection_bounds_nothing_by_its_bytes() -> None:
    source, destination = sides(QEMU)
    late = 3 * 10**4

    def missed(event: AnyEvent) -> AnyEvent | None:
        if isinstance(event, TcpInfo):
            return None
        if isinstance(event, Transfer) and event.direction == 0:
            return replace(event, position=event.position - late) if event.position >= late else None
        return event

    with pytest.raises(JoinError, match="nothing in them bounds the clocks"):
        joined(changed(changed(source, missed), _without_segments), changed(destination, _one_way_only))


def _without_segments(event: AnyEvent) -> AnyEvent | None:
    back = isinstance(event, Transfer) and event.direction == 1
    return None if back or isinstance(event, Segment) else event


def _one_way_only(event: AnyEvent) -> AnyEvent | None:
    back = isinstance(event, Transfer) and event.direction == 0
    return None if back or isinstance(event, Segment) else event


def test_a_hostile_recording_costs_little_and_its_names_do_nothing(tmp_path: Path) -> None:
    source, destination = sides(QEMU)
    evil = "\x1b]0;owned\x07/etc/passwd"
    header = replace(destination.header, host=evil, notes=[evil] * 3, kernel=evil)

    def poison(event: AnyEvent) -> AnyEvent:
        if isinstance(event, Socket):
            return replace(event, local=event.local or evil, remote=event.remote or evil)
        return event

    many: list[AnyEvent] = [
        Transfer(10**9 + n, 1 << 63, 1, n, 3, n % 2, n + 10**6, 1, (1 << 63) - n, 1, 1, 0, n % 7) for n in range(20_000)
    ]
    many += [Socket(1, 1, 3, n + 10**6, 2, f"10.0.0.1:{n}", f"10.0.0.2:{n % 3}", n) for n in range(20_000)]
    bad = changed(replace(destination, header=header, events=[*destination.events, *many]), poison)
    whole = joined(source, bad)
    breakdown = analyse(whole).breakdown
    shown = text.render(breakdown)
    assert "\x1b" not in shown
    assert printable(evil) in shown
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(JoinError) as caught:
        joined(sides(QEMU)[0], replace(bad, events=[*many]), ("A", evil))
    assert "\x1b" not in printable(str(caught.value), 2000)


def test_absurd_instants_are_cut_and_the_joined_recording_can_still_be_written(tmp_path: Path) -> None:
    source, destination = sides(QEMU)
    pid = destination.header.targets[0].pid
    absurd: list[AnyEvent] = [
        Segment((1 << 64) - 1, pid, 5, 1, 0, 0, 0, 0, 1 << 63, 1 << 62),
        Segment(1, pid, 5, 1, 0, 0, 0, 0),
    ]
    whole = joined(source, replace(destination, events=[*destination.events, *absurd]))
    with RecordingWriter(tmp_path / "both.rec", whole.header) as writer:
        writer.write_many(whole.events)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("0+-20us", Hint(0, 20_000)),
        ("-1.2ms±50us", Hint(-1_200_000, 50_000)),
        ("+5us", Hint(5000, 0)),
        ("3600s+-1ms", Hint(HOUR, 1_000_000)),
    ],
)
def test_a_hint_is_an_offset_and_its_doubt(text: str, hint: Hint) -> None:
    assert Offset().convert(text, None, None) == hint


@pytest.mark.parametrize("text", ["", "+-5us", "5", "1ms+-", "1ms+-2", "--1ms"])
def test_an_invalid_hint_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Offset().convert(text, None, None)


def test_the_command_prints_the_report_of_its_joined_recording(tmp_path: Path) -> None:
    halves = [str(DATA / "hosts" / f"{role}.rec") for role in ("destination", "source")]
    both = str(tmp_path / "both.rec")
    joined = run("join", *halves, "--recording", both, "--format", "json")
    assert joined.returncode == 0, joined.stderr
    assert run("report", both, "--format", "json").stdout == joined.stdout
    assert run("join", *halves, "--recording", both).returncode == 2
    refused = run("join", both, halves[0])
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "is already a joined recording" in refused.stderr


@pytest.mark.parametrize("form", ["html", "perfetto", "csv", "text"])
def test_a_joined_breakdown_goes_into_every_format(tmp_path: Path, form: str) -> None:
    halves = [str(DATA / "hosts" / f"{role}.rec") for role in ("source", "destination")]
    done = run("join", *halves, "--format", form, "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").stat().st_size > 300
