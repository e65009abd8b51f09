# SPDX-License-Identifier: Apache-2.0
"""Stretches on the wire and TCP's reason for them, on streams written by hand (times in us, window from 0)."""

from __future__ import annotations

import msgspec

from ebpf_mig.analysis import wire
from ebpf_mig.breakdown import Wire
from ebpf_mig.recording.events import Retransmit, Segment, Transfer

US = 1000
SRC, DST, NEAR, FAR = 1000, 2000, 70, 80


def send(begin: int, end: int, position: int, size: int) -> Transfer:
    return Transfer(begin * US, end * US, SRC, SRC, 9, 0, NEAR, 1, size, (end - begin) * US, 0, 0, position)


def receive(begin: int, end: int, position: int, size: int) -> Transfer:
    return Transfer(begin * US, end * US, DST, DST, 9, 1, FAR, 1, size, (end - begin) * US, 0, 0, position)


def data(at: int, size: int) -> Segment:
    return Segment(at * US, DST, FAR, size, 0, 0, 0, 65536)


def ack(at: int, in_flight: int, unsent: int, window: int = 65536) -> Segment:
    return Segment(at * US, SRC, NEAR, 0, in_flight, in_flight, unsent, window)


def only(sends: list[Transfer], receives: list[Transfer], segments: list[Segment]) -> Wire:
    segments = sorted(segments, key=lambda s: s.at_ns)
    found = wire.gather(sends, receives, segments, (0, 100_000 * US))
    assert len(found) == 1
    return found[0]


SENDS = [send(100, 110, 0, 16), send(120, 130, 16, 43_047)]
"""A header and a payload, as Cloud Hypervisor sends its state."""


def test_payload_held_by_nagle_for_a_delayed_ack() -> None:
    receives = [receive(90, 150, 0, 16), receive(160, 40_500, 16, 43_047)]
    found = only(SENDS, receives, [data(140, 16), ack(40_450, 16, 43_047), data(40_456, 43_047)])
    assert found.reason == "Nagle, delayed ACK"
    assert found.evidence == ("43047 B behind 16 B not acknowledged; bare ACK after 40.3 ms")
    assert (found.bytes, found.sent, found.received) == (43_047, 150 * US, 40_500 * US)
    assert found.in_flight_ns == 40_350 * US


def test_a_reader_that_was_late() -> None:
    receives = [receive(90, 150, 0, 16), receive(9000, 9010, 16, 43_047)]
    found = only(SENDS, receives, [data(140, 16), data(200, 43_047)])
    assert found.reason == "late reader" and "8.810 ms before they were read" in found.evidence


def test_bytes_that_lay_there_all_the_time() -> None:
    receives = [receive(90, 150, 0, 16), receive(9000, 9010, 16, 43_047)]
    assert only(SENDS, receives, [data(140, 43_063)]).reason == "late reader"


def test_a_full_receive_window() -> None:
    receives = [receive(90, 150, 0, 16), receive(160, 8000, 16, 43_047)]
    found = only(SENDS, receives, [data(140, 16), ack(7900, 16_384, 26_000, 16_384), data(7950, 16_000)])
    assert found.reason == "receive window"


def test_an_ack_that_was_not_delayed() -> None:
    receives = [receive(90, 150, 0, 16), receive(160, 8000, 16, 43_047)]
    found = only(SENDS, receives, [data(140, 16), ack(7900, 16, 43_047), data(7950, 43_047)])
    assert found.reason == "waiting for an ACK"


def test_without_segments_the_reason_is_not_guessed() -> None:
    receives = [receive(90, 150, 0, 16), receive(160, 8000, 16, 43_047)]
    assert only(SENDS, receives, []).reason == "unknown"


def test_a_peek_at_the_first_bytes_does_not_shift_the_stream() -> None:
    receives = [receive(90, 145, 0, 4), receive(146, 150, 4, 16), receive(160, 40_500, 20, 43_047)]
    found = only(SENDS, receives, [data(140, 16), ack(40_450, 16, 43_047), data(40_456, 43_047)])
    assert found.bytes == 43_047


def test_short_stretches_and_silence_without_bytes_are_left_out() -> None:
    quick = [receive(90, 150, 0, 16), receive(160, 170, 16, 43_047)]
    assert wire.gather(SENDS, quick, [], (0, 100_000 * US)) == []
    late_send = [send(100, 110, 0, 16), send(50_000, 50_010, 16, 100)]
    prompt = [receive(90, 150, 0, 16), receive(160, 50_100, 16, 100)]
    assert wire.gather(late_send, prompt, [], (0, 100_000 * US)) == []
    assert wire.gather([], [], [], (0, 1)) == []


def test_batched_calls_show_no_reason() -> None:
    folded = msgspec.structs.replace(receive(160, 9010, 16, 43_047), calls=300)
    found = only(SENDS, [receive(90, 150, 0, 16), folded], [data(140, 16)])
    assert found.reason == "unknown" and "one by one" in found.evidence


def again(at: int, size: int, number: int) -> Retransmit:
    return Retransmit(at * US, SRC, NEAR, size, 0, number)


RECEIVED_LATE = [receive(90, 150, 0, 16), receive(160, 240_500, 16, 43_047)]


def late(segments: list[Segment], *repeated: Retransmit) -> Wire:
    (found,) = wire.gather(SENDS, RECEIVED_LATE, segments, (0, 300_000 * US), repeated)
    return found


def test_a_segment_that_got_lost() -> None:
    found = late([data(140, 16), ack(40_450, 16, 43_047), data(240_400, 43_047)], again(240_390, 43_047, 7))
    assert found.reason == "retransmission"
    assert found.evidence == "43047 B sent again, once, first after 240.2 ms; no. 7 of its socket"
    found = late([data(140, 16), data(240_400, 43_047)], again(40_150, 16, 1), again(240_390, 43_047, 2))
    assert found.evidence == "43047 B sent again, 2 times, first after 40.0 ms; no. 2 of its socket"


def test_a_retransmission_that_let_nothing_out() -> None:
    segments = [data(140, 16), ack(240_390, 16, 43_047), data(240_400, 43_047)]
    assert late(segments, again(100_000, 16, 1)).reason == "Nagle, delayed ACK"
    assert late(segments, again(240_450, 16, 1)).reason == "Nagle, delayed ACK"


def test_which_message_it_was() -> None:
    receives = [receive(90, 150, 0, 16), receive(160, 40_500, 16, 43_047)]
    for state_from, message in ((None, ""), (100 * US, "state"), (200 * US, "pages")):
        (found,) = wire.gather(SENDS, receives, [], (0, 100_000 * US), state_from=state_from)
        assert found.message == message
