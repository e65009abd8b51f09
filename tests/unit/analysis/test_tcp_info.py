# SPDX-License-Identifier: Apache-2.0
"""TCP's limit in a stretch: which readings count, and how differences are taken."""

from __future__ import annotations

from ebpf_mig.analysis import tcp_info
from ebpf_mig.analysis.process import Process
from ebpf_mig.recording.events import Socket, TcpInfo


def reading(at: int, busy: int, rwnd: int, retrans: int = 0, socket: int = 70) -> TcpInfo:
    values = {"busy_time": busy, "rwnd_limited": rwnd, "sndbuf_limited": 0, "total_retrans": retrans}
    return TcpInfo(at, 1, socket, {**values, "rtt": at, "queued": 7, "jiffy_us": 4000})


def process(*readings: TcpInfo) -> Process:
    return Process(1, tcp=list(readings), socket_events=[Socket(50, 1, 3, 70, 2, "", "")])


def test_the_readings_around_the_stretch_are_subtracted() -> None:
    found = tcp_info.verdict(
        process(reading(100, 10, 0), reading(200, 30, 8), reading(300, 60, 20, 1), reading(400, 90, 50, 3)),
        70, (210, 390), 1000,
    )  # fmt: skip
    assert found == {
        "busy_us": 60, "rwnd_limited_us": 42, "sndbuf_limited_us": 0, "retransmits": 3, "rtt_us": 400, "queued": 7,
        "resolution_us": 4000, "from": -800, "until": -600,
    }  # fmt: skip


def test_a_socket_first_read_within_the_stretch_counts_from_its_creation() -> None:
    found = tcp_info.verdict(process(reading(300, 60, 20)), 70, (200, 400), 0)
    assert found is not None
    assert (found["busy_us"], found["from"], found["until"]) == (60, 50, 300)


def test_without_a_reading_after_the_begin_there_is_no_verdict() -> None:
    assert tcp_info.verdict(process(reading(100, 10, 0)), 70, (200, 400), 0) is None
    assert tcp_info.verdict(process(), 70, (200, 400), 0) is None
    assert tcp_info.verdict(process(reading(300, 10, 0, socket=71)), 70, (200, 400), 0) is None


def test_several_sockets_add_up_except_for_the_latest_values() -> None:
    both = process(reading(300, 60, 20, 1), reading(310, 40, 0, 2, socket=71))
    found = tcp_info.together(both, {70, 71, 99}, (200, 400), 0)
    assert found is not None
    assert (found["busy_us"], found["rwnd_limited_us"], found["retransmits"], found["rtt_us"]) == (100, 20, 3, 310)
    assert (found["resolution_us"], found["from"]) == (4000, 50)
    assert tcp_info.together(both, set(), (200, 400), 0) is None


def test_a_reading_without_a_figure_leaves_it_out() -> None:
    found = tcp_info.verdict(Process(1, tcp=[TcpInfo(300, 1, 70, {"busy_time": 5})]), 70, (200, 400), 0)
    assert found == {"busy_us": 5, "resolution_us": 0, "from": 300, "until": 300}
