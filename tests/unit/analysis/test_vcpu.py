# SPDX-License-Identifier: Apache-2.0
"""When a vCPU ran guest code, from the few KVM_RUN calls that are kept."""

from __future__ import annotations

from ebpf_mig.analysis.vcpu import Gap, Timeline, build, common
from ebpf_mig.recording.events import VcpuEnter, VcpuExit, VcpuState

US = 1000


def enter(at: int, left: int = 0, ret: int = 0) -> VcpuEnter:
    return VcpuEnter(at * US, 1, 2, 3, left * US, ret, 1)


def left(at: int, entered: int = 0, ret: int = -4) -> VcpuExit:
    return VcpuExit(at * US, 1, 2, 3, entered * US, ret)


def preempted(at: int, entered: int, without_cpu: int) -> VcpuExit:
    return VcpuExit(at * US, 1, 2, 3, entered * US, -4, without_cpu * US)


def account(entered: int, left: int) -> VcpuState:
    return VcpuState(10**9, 1, 2, 3, entered * US, left * US, 0, 1, 0, 0, 0)


def timeline(*events: VcpuEnter | VcpuExit | VcpuState, kicks: tuple[int, ...] = ()) -> Timeline:
    return build(
        2,
        [e for e in events if isinstance(e, VcpuEnter)],
        [e for e in events if isinstance(e, VcpuExit)],
        [e for e in events if isinstance(e, VcpuState)],
        [kick * US for kick in kicks],
    )


def gaps(line: Timeline) -> list[tuple[int | None, int | None]]:
    return [(g.begin and g.begin // US, g.end and g.end // US) for g in line.gaps]


def test_a_vcpu_inside_since_before_tracing_has_one_open_gap() -> None:
    line = timeline(left(100))
    assert gaps(line) == [(100, None)]
    assert line.ran_before and line.ran and line.first_run is None


def test_a_vcpu_that_was_never_kicked_runs_on() -> None:
    line = timeline(account(500, 400))
    assert gaps(line) == [(400, 500)]


def test_a_vcpu_that_left_by_itself_stopped_then() -> None:
    line = timeline(left(100), enter(130, 100, -4), account(4000, 5000))
    assert gaps(line) == [(100, 130), (5000, None)]
    assert line.gaps[-1].entry == 4000 * US


def test_the_first_entry_on_a_destination() -> None:
    line = timeline(enter(700))
    assert gaps(line) == [(None, 700)]
    assert not line.ran_before and line.first_run == 700 * US


def test_the_first_entry_that_returns_at_once_is_not_the_start() -> None:
    line = timeline(enter(700), left(822, 700), enter(830, 822, -4))
    assert gaps(line) == [(None, 830)]
    assert line.immediate == ((700 * US, 822 * US),)
    assert line.first_run == 830 * US


def test_the_second_return_after_a_stop_is_not_the_stop() -> None:
    line = timeline(left(40), enter(55, 40, -4), left(60, 55), enter(3000, 60, -4))
    assert gaps(line) == [(40, 3000)]


def test_a_call_that_was_preempted_before_it_returned_ran_no_guest() -> None:
    line = timeline(left(40), enter(55, 40, -4), preempted(5_055, 55, 4_900), enter(9_000, 5_055, -4))
    assert gaps(line) == [(40, 9_000)]
    assert line.immediate == ((55 * US, 5_055 * US),)
    line = timeline(left(40), enter(55, 40, -4), preempted(5_055, 55, 3_900), enter(9_000, 5_055, -4))
    assert gaps(line) == [(40, 55), (5_055, 9_000)]


def test_a_long_call_that_ends_with_eintr_ran_the_guest() -> None:
    line = timeline(left(40), enter(55, 40, -4), left(1056, 55))
    assert gaps(line) == [(40, 55), (1056, None)]


def test_a_kick_inside_the_call_shows_that_it_ran_the_guest() -> None:
    events = (left(40), enter(55, 40, -4), left(255, 55))
    assert gaps(timeline(*events, kicks=(30,))) == [(40, None)]
    assert gaps(timeline(*events, kicks=(30, 250))) == [(40, 55), (255, None)]


def test_an_error_other_than_eintr_is_a_return_like_any() -> None:
    line = timeline(left(40), enter(55, 40, -4), left(60, 55, ret=-14))
    assert gaps(line) == [(40, 55), (60, None)]


def test_an_eintr_without_a_stop_before_it_ran_the_guest() -> None:
    """Its entry came too soon after the previous return to be kept."""
    line = timeline(enter(1), left(5000, 4990))
    assert gaps(line) == [(None, 1), (5000, None)]
    assert line.immediate == ()


def test_an_entry_that_was_lost_is_known_from_its_return() -> None:
    line = timeline(left(100), left(9000, 500))
    assert gaps(line) == [(100, 500), (9000, None)]


def test_two_returns_in_a_row_leave_no_gap() -> None:
    assert gaps(timeline(left(100), left(9000))) == [(9000, None)]


def test_covering_and_start_after() -> None:
    line = timeline(left(100), enter(300, 100, -4), left(2000, 300))
    assert line.covering(99_999) is None
    assert line.covering(100 * US) == Gap(100 * US, 300 * US, None)
    assert line.covering(299_999) == line.gaps[0]
    assert line.covering(300 * US) is None
    assert line.covering(10**12) == line.gaps[1]
    assert line.start_after(50 * US) == 300 * US
    assert line.start_after(301 * US) is None


def test_no_events_no_gaps() -> None:
    line = timeline()
    assert line.gaps == () and not line.ran


def test_common_gaps_of_several_vcpus() -> None:
    one = timeline(left(100), enter(500, 100, -4), left(2000, 500))
    two = timeline(left(300), enter(900, 300, -4), left(1800, 900))
    assert common([one, two]) == [(300 * US, 500 * US), (2000 * US, None)]


def test_a_vcpu_that_never_ran_does_not_take_part() -> None:
    assert common([timeline(left(100)), timeline()]) == [(100 * US, None)]
    assert common([timeline()]) == []


def test_one_running_vcpu_means_no_common_gap() -> None:
    assert common([timeline(left(100)), timeline(account(50, 40))]) == []
