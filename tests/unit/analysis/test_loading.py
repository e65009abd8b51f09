# SPDX-License-Identifier: Apache-2.0
"""What counts as loading a guest's state, and as waiting for bytes meanwhile."""

from __future__ import annotations

from ebpf_mig.analysis import loading
from ebpf_mig.recording.events import Ioctl, Transfer
from tests.unit.script import cmd

MS = 1_000_000


def ioctl(name: str, begin: int, end: int) -> Ioctl:
    return Ioctl(begin, end, 1, 1, 9, cmd(name), 0)


class TestLoading:
    def test_ends_with_the_last_vcpu_setter_before_the_clock(self) -> None:
        found = loading.after(
            [
                ioctl("SET_USER_MEMORY_REGION", 10, 20),
                ioctl("SET_REGS", 30, 40),
                ioctl("SET_CLOCK", 50, 60),
                ioctl("SET_VAPIC_ADDR", 61, 62),
                ioctl("SET_REGS", 70, 80),
            ],
            since=0,
            start=100,
            sent_at=(),
        )
        assert found == loading.Loading(10, 40)

    def test_reads_clock_and_dirty_log_are_not_restoring(self) -> None:
        rest = [ioctl(n, 10, 20) for n in ("GET_REGS", "SET_CLOCK", "KVMCLOCK_CTRL", "GET_DIRTY_LOG")]
        assert loading.after(rest, since=0, start=None, sent_at=()) is None

    def test_setup_before_the_migration_does_not_count(self) -> None:
        early, late = ioctl("SET_REGS", 10, 20), ioctl("SET_REGS", 110, 120)
        assert loading.after([early, late], since=100, start=200, sent_at=()) == loading.Loading(110, 120)

    def test_continues_until_the_source_requests_the_resume(self) -> None:
        work = [ioctl("SET_REGS", 10, 20), ioctl("IRQFD", 30, 40), ioctl("IRQFD", 60, 70)]
        assert loading.after(work, since=0, start=100, sent_at=[5, 50]) == loading.Loading(10, 40)


def receive(begin: int, end: int) -> Transfer:
    return Transfer(begin, end, 1, 1, 7, 1, 80, 1, 100, end - begin, 0, 0, 0)


class TestArrivals:
    def test_a_long_wait_that_ends_with_bytes_is_the_wires(self) -> None:
        restores = [ioctl("SET_REGS", 0, 10), ioctl("SET_REGS", 40 * MS, 41 * MS)]
        found = loading.arrivals([receive(30 * MS, 30 * MS + 5)], restores, 0, 50 * MS)
        assert found == [(10, 30 * MS + 5)]

    def test_a_blocking_receive_is_a_wait_too(self) -> None:
        found = loading.arrivals([receive(20, 30 * MS)], [ioctl("SET_REGS", 0, 10)], 0, 50 * MS)
        assert found == [(10, 30 * MS)]

    def test_short_waits_and_work_are_loading(self) -> None:
        restores = [ioctl("SET_REGS", 0, 10), ioctl("SET_REGS", 20 * MS, 30 * MS)]
        assert loading.arrivals([receive(MS, MS + 5), receive(30 * MS, 30 * MS + 5)], restores, 0, 50 * MS) == []
