# SPDX-License-Identifier: Apache-2.0
"""What the live line says of a migration, from events with known rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import FILE, AnyEvent, Ioctl, Kick, Socket, Transfer, VcpuEnter, VcpuExit, VcpuSpan
from ebpf_mig.recording.file import read_recording
from ebpf_mig.tracing.lifecycle import MigrationWatch
from ebpf_mig.tracing.progress import Progress

SRC, MIGRATION, MS, MIB = 10, 12, 1_000_000, 1 << 20
RAM, VGA = 1, 2
RECORDINGS = sorted((Path(__file__).parents[2] / "data").glob("*-54-*.rec"))


def logging(slot: int, bytes_: int) -> Ioctl:
    return Ioctl(1, 2, SRC, SRC, 5, kvm.SET_USER_MEMORY_REGION, 0, slot=slot, flags=1, size=bytes_)


def fetch(at_ms: float, slot: int = RAM, tid: int = MIGRATION) -> Ioctl:
    at = int(at_ms * MS)
    return Ioctl(at, at + 1, SRC, tid, 5, kvm.GET_DIRTY_LOG, 0, slot=slot)


def sent(until_ms: float, count: int, socket: int = 88) -> Transfer:
    until = int(until_ms * MS)
    return Transfer(until - MS, until, SRC, MIGRATION, 9, 0, socket, 2, count, 1, 1, 0, 0)


def after(*events: AnyEvent) -> Progress:
    watch = MigrationWatch([SRC])
    progress = Progress(watch)
    for event in (logging(RAM, 256 * MIB), logging(VGA, 16 * MIB), *events):
        watch.saw([event])
        progress.saw([event])
    return progress


def passes(dirtied_share: float) -> list[AnyEvent]:
    """The guest dirties 100 MiB in the first pass, and they are sent in the second one, which takes 1 s.

    So the send rate is 100 MiB/s, and the dirty rate is `dirtied_share` of it.
    """
    first = 1000 / dirtied_share
    second = [sent(1000 + first + n * 10 + 5, MIB) for n in range(100)]
    return [
        fetch(1000),
        sent(1500, 50 * MIB),
        fetch(1000 + first),
        *second,
        fetch(2000 + first),
        fetch(2000.01 + first, VGA),
    ]


def test_nothing_is_said_before_the_first_fetch() -> None:
    assert after(sent(500, MIB)).line() == ""


def test_two_slots_are_one_pass_and_the_first_pass_has_no_dirty_rate() -> None:
    events = [fetch(1000), fetch(1000.01, VGA), sent(2000, 100 * MIB), sent(3000, 100 * MIB)]
    assert after(*events).line() == "2.0 s, pass 1; 100.0 MiB/s sent; 200.0 MiB so far"


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.25, "5.0 s, pass 3; 100.0 MiB/s sent, 25.0 MiB/s dirtied; converges in about 1 s; 150.0 MiB so far"),
        (0.8, "2.3 s, pass 3; 100.0 MiB/s sent, 80.0 MiB/s dirtied; converges in about 3 s; 150.0 MiB so far"),
        (0.97, "2.0 s, pass 3; 100.0 MiB/s sent, 97.0 MiB/s dirtied; as fast as it is sent; 150.0 MiB so far"),
        (2.0, "1.5 s, pass 3; 100.0 MiB/s sent, 200.0 MiB/s dirtied; does not converge; 150.0 MiB so far"),
    ],
)
def test_whether_it_converges(share: float, words: str) -> None:
    """The next pass takes `share` of the time of this one, and so on, until one takes less than 0.3 s."""
    assert after(*passes(share)).line() == words


def test_a_batch_that_ended_long_ago_is_no_send_of_now() -> None:
    """The kernel half ends a thread's batch when that thread calls again: here the monitor's, 1.5 s later."""
    events = [fetch(1000), sent(2400, 50 * MIB), sent(2900, 50 * MIB), sent(1500, MIB), sent(900, MIB)]
    assert after(*events).line() == "1.9 s, pass 1; 100.0 MiB/s sent; 101.0 MiB so far"


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_no_rate_of_a_real_migration_is_below_zero(path: Path) -> None:
    """Real records in the order in which they came. Some came late."""
    events = list(read_recording(path).events)
    watch = MigrationWatch({event.pid for event in events if isinstance(event, Ioctl)})
    progress = Progress(watch)
    for event in events:
        watch.saw([event])
        progress.saw([event])
        if isinstance(event, Transfer):
            assert " -" not in progress.line()


def test_the_display_fetched_by_another_thread_is_no_pass() -> None:
    assert after(fetch(1000), *(fetch(1100 + n, VGA, tid=SRC) for n in range(50))).passes == 1


def test_a_ring_reports_its_pages() -> None:
    resets = [Ioctl(n * MS, n * MS + 1, SRC, 13, 5, kvm.RESET_DIRTY_RINGS, 256) for n in range(1000, 2000, 10)]
    line = after(fetch(1000), *resets, sent(1999, 200 * MIB)).line()
    assert ", 100.0 MiB/s dirtied; " in line or ", 100.1 MiB/s dirtied; " in line


def test_writes_to_files_are_not_the_migration() -> None:
    log = Socket(5, SRC, 3, 77, FILE, "", "")
    assert (
        "0 B so far" in after(log, fetch(1000), Transfer(1, 1001 * MS, SRC, SRC, 3, 0, 77, 1, MIB, 1, 1, 0, 0)).line()
    )


def test_the_longest_stall_since_the_migration_began() -> None:
    before = VcpuEnter(500 * MS, SRC, 11, 7, 100 * MS, 0, 1)
    within = VcpuEnter(1010 * MS, SRC, 11, 7, 1003 * MS, 0, 2)
    span = VcpuSpan(1010 * MS, 1300 * MS, SRC, 11, 30 * MS, 4 * MS, 9)
    line = after(VcpuExit(99 * MS, SRC, 11, 7, 1, -4), before, fetch(1000), within, span).line()
    assert line.endswith("longest vCPU stall 7.000 ms")


def test_it_is_quiet_while_the_guest_is_stopped() -> None:
    runs = VcpuEnter(900 * MS, SRC, 11, 7, 0, 0, 1)
    assert not after(runs, fetch(1000)).quiet
    assert after(runs, fetch(1000), Kick(1001 * MS, SRC, MIGRATION, 11, 10)).quiet
    stopped = [runs, fetch(1000), VcpuExit(1001 * MS, SRC, 11, 7, 900 * MS, -4), sent(1002, MIB)]
    assert after(*stopped).quiet
    assert not after(*stopped, VcpuEnter(1003 * MS, SRC, 11, 7, 1001 * MS, -4, 2)).quiet


def test_what_does_not_fit_is_left_out_from_the_end() -> None:
    progress = after(*passes(0.5))
    whole = progress.line()
    assert progress.line(len(whole)) == whole
    assert progress.line(len(whole) - 1) == whole.rpartition("; ")[0]
    assert progress.line(10) == whole[:10]
