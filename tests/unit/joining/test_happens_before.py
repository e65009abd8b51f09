# SPDX-License-Identifier: Apache-2.0
"""Clock bounds from sends, receives and TCP segments of two hosts, on streams in which every byte is known."""

from __future__ import annotations

import random

from ebpf_mig.joining import happens_before
from ebpf_mig.joining.clock import Hull
from ebpf_mig.recording.events import Segment, Transfer

AHEAD = 5_000_000_000
"""The true time on the receiver's clock."""
_WRAP = 1 << 32


def run(direction: int, begin: int, end: int, position: int, size: int, **more: int) -> Transfer:
    longest = more.get("longest", end - begin)
    calls = more.get("calls", 1)
    tid, hidden = more.get("tid", 1), more.get("hidden", 0)
    return Transfer(begin, end, 1, tid, 3, direction, 7, calls, size, 0, longest, 0, position, hidden=hidden)


def send(begin: int, end: int, position: int, size: int, **more: int) -> Transfer:
    return run(0, begin, end, position, size, **more)


def receive(begin: int, end: int, position: int, size: int, **more: int) -> Transfer:
    return run(1, begin + AHEAD, end + AHEAD, position, size, **more)


def most(sends: list[Transfer], receives: list[Transfer], *, from_start: bool = False) -> list[int]:
    hull = Hull()
    if not happens_before.follows(happens_before.Direction(sends, receives, from_start), hull, True):
        return []
    return [y - AHEAD for _, y in hull.points]


def test_a_byte_is_received_after_its_send_began() -> None:
    assert most([send(1000, 1010, 0, 5000)], [receive(1005, 1100, 0, 5000)]) == [100]


def test_the_first_call_of_a_run_ended_within_the_longest_and_the_last_began_within_it() -> None:
    folded = [send(1000, 9000, 0, 5000, calls=8, longest=50)]
    assert most(folded, [receive(9001, 9020, 0, 5000)]) == [70]  # the last byte left no sooner than 8950
    assert most([send(1000, 1010, 0, 5000)], [receive(1005, 9000, 0, 5000, calls=9, longest=40)]) == [45]


def test_a_peek_at_the_beginning_does_not_make_bytes_arrive_early() -> None:
    sends = [send(1000, 1010, 0, 5000), send(2000, 2010, 5000, 5000)]
    receives = [receive(1000, 1500, 0, 4), receive(1501, 1600, 4, 5000), receive(2010, 2300, 5004, 5000)]
    assert max(most(sends, receives)) <= 600
    assert min(most(sends, receives)) >= 300


def test_streams_of_unlike_length_are_compared_only_if_the_first_byte_was_traced() -> None:
    sends, receives = [send(1000, 1010, 0, 5000)], [receive(1005, 1100, 0, 4000)]
    assert most(sends, receives) == []
    assert most(sends, receives, from_start=True) == [100]


def test_a_send_whose_begin_is_not_known_bounds_nothing() -> None:
    sends = [send(1000, 1010, 0, 5000), send(2000, 2010, 5000, 5000, hidden=1)]
    assert most(sends, [receive(2000, 2600, 0, 10_000)]) == [1600]


def test_threads_that_share_a_stream_and_overtake_each_other_count_as_one() -> None:
    sends = [send(1000, 3000, 100, 50, tid=1), send(2000, 2500, 0, 100, tid=2)]
    assert most(sends, [receive(3000, 3100, 0, 150)]) == [2100]


def test_random_streams_never_bound_the_offset_below_the_truth() -> None:
    random.seed(5)
    for _ in range(100):
        now, place, sends, receives, waiting = 1000, 0, [], [], []
        for _ in range(random.randint(1, 60)):
            now += random.randint(1, 5000)
            size, took = random.randint(1, 70_000), random.randint(1, 3000)
            sends.append(send(now, now + took, place, size))
            waiting.append((now + random.randint(0, 10_000), size))
            place, now = place + size, now + took
        seen = at = 0
        for arrived, size in waiting:
            at = max(at, arrived) + random.randint(1, 500)
            receives.append(receive(at - random.randint(1, 500), at, seen, size))
            seen += size
        folded = _folded(sends) if random.random() < 0.5 else sends
        assert all(limit >= 0 for limit in most(folded, receives))


def _folded(sends: list[Transfer]) -> list[Transfer]:
    """Three calls per batch, as tracing does outside the blackout."""
    found = []
    for at in range(0, len(sends), 3):
        part = sends[at : at + 3]
        longest = max(t.end_ns - t.begin_ns for t in part)
        size = sum(t.bytes for t in part)
        found.append(send(part[0].begin_ns, part[-1].end_ns, part[0].position, size, calls=3, longest=longest))
    return found


class Wire:
    """A TCP connection of which each segment and acknowledgement is seen at its receiver; numbers run over 2^32."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.sends: list[Transfer] = []
        self.data: list[Segment] = []
        self.acks: list[Segment] = []
        self.least_delay = 1 << 60

    def carry(self, now: int, size: int) -> int:
        """One send, the segments it makes, and their acknowledgements; returns when all is done."""
        place = self.sends[-1].position + self.sends[-1].bytes if self.sends else 0
        took = random.randint(1, 2000)
        self.sends.append(send(now, now + took, place, size))
        there, back, left = now, now + took, size
        while left:
            payload = min(left, random.choice((1448, 14_480, 65_160)))
            there += random.randint(50, 4000)
            self.data.append(
                Segment(there + AHEAD, 2, 9, payload, 0, 0, 0, 1 << 20, self._number(place), 17, self._number(place))
            )
            place, left = place + payload, left - payload
            back = max(there, back) + random.randint(50, 4000)
            self.least_delay = min(self.least_delay, there - now)
            self.acks.append(
                Segment(back, 1, 7, 0, payload, left + payload, 0, 1 << 20, 17, self._number(place))
            )  # what is in flight counts from the last acknowledgement
        return max(there, back) + random.randint(1, 1000)

    def _number(self, place: int) -> int:
        return (self.first + place) % _WRAP


def test_segments_and_acknowledgements_bound_the_offset_on_both_sides_and_hold_the_truth() -> None:
    random.seed(9)
    for _ in range(100):
        wire, now = Wire(random.choice((0, 5, _WRAP - 30_000, random.randrange(_WRAP)))), 1000
        for _ in range(random.randint(2, 30)):
            now = wire.carry(now, random.randint(1, 200_000))
        above, below, more = Hull(), Hull(), Hull()
        happens_before.released(wire.acks, wire.data, more, True)
        assert all(y >= AHEAD for _, y in more.points)
        happens_before.arrived(wire.sends, wire.acks, wire.data, above, True)
        happens_before.acknowledged(wire.data, wire.acks, below, True)
        assert above.count
        assert below.count
        assert all(y >= AHEAD for _, y in above.points)
        assert all(-y <= AHEAD for _, y in below.points)
        assert min(y for _, y in above.points) - AHEAD < 50_000
        assert AHEAD - max(-y for _, y in below.points) < 50_000


def test_data_that_comes_twice_is_not_what_the_acknowledgement_waited_for() -> None:
    first = Segment(AHEAD + 100, 2, 9, 1000, 0, 0, 0, 0, 5000, 0, 5000)
    again = Segment(AHEAD + 900, 2, 9, 1000, 0, 0, 0, 0, 5000, 0, 6000)
    ack = Segment(300, 1, 7, 0, 1000, 1000, 0, 0, 0, 6000, 0)
    hull = Hull()
    happens_before.acknowledged([first, again], [ack], hull, True)
    assert hull.points == [(300, 200 - AHEAD)]
