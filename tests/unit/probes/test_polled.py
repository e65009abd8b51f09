# SPDX-License-Identifier: Apache-2.0
"""When figures are read: at fetches, kicks and starts, with a limited rate."""

from __future__ import annotations

import pytest

from ebpf_mig.linux import kvm
from ebpf_mig.probes import polled
from ebpf_mig.probes.polled import Polled
from ebpf_mig.recording.events import AnyEvent, Ioctl, Kick, OwnCost, Socket, TcpInfo, Transfer, VcpuEnter

MS = 1_000_000
GET = Ioctl(1, 2, 10, 11, 9, kvm.GET_DIRTY_LOG, 0)
KICK, ENTER = Kick(3, 10, 11, 12, 10), VcpuEnter(4, 10, 12, 8, 3, -4, 9)
SOCKET = Socket(1, 10, 3, 70, 2, "127.0.0.1:4444", "127.0.0.1:5555")


def send(size: int) -> Transfer:
    return Transfer(1, 2, 10, 11, 3, 0, 70, 1, size, 1, 1, 0, 0)


class Reader:
    """Stands where sock_diag needs a real connection."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.closed = False
        self.waited = False

    def wait(self) -> None:
        self.waited = True

    def ask(self, socket: Socket) -> None:
        self.asked.append(socket.socket)

    def answers(self, timeout_s: float = 0.0) -> list[TcpInfo]:
        del timeout_s
        infos, self.asked = [TcpInfo(5, 10, inode, {}) for inode in self.asked], []
        return infos

    def close(self) -> None:
        self.closed = True


class Rig:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.reader = 1000 * MS, Reader()
        monkeypatch.setattr(polled, "TcpReader", lambda: self.reader)
        monkeypatch.setattr(polled.clock, "monotonic_ns", lambda: self.now)
        self.polled = Polled(lambda: (self.now // 1000, 5))
        self.polled.open()

    def after(self, ms: float, *events: AnyEvent) -> list[str]:
        """Kicks and entries are handed over first, as the tracer does."""
        self.now += int(ms * MS)
        edges = self.polled.in_stop([event for event in events if isinstance(event, Kick | VcpuEnter)])
        return [type(event).__name__ for event in [*edges, *self.polled.due(events)]]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def test_the_reader_is_ready_once_it_is_open(rig: Rig) -> None:
    assert rig.reader.waited


def test_nothing_is_read_before_anything_happens(rig: Rig) -> None:
    assert rig.after(500) == []
    assert rig.after(500, ENTER) == [], "a guest only runs"


def test_cost_is_read_from_the_first_fetch_on(rig: Rig) -> None:
    assert rig.after(1, GET) == ["OwnCost"]
    assert rig.after(29) == []
    assert rig.after(2) == ["OwnCost"]


def test_a_socket_is_asked_for_once_it_has_sent_enough(rig: Rig) -> None:
    rig.after(1, SOCKET, send(60_000))
    rig.after(200, GET)
    assert rig.reader.asked == []
    rig.after(200, send(6_000), GET)
    assert rig.reader.asked == [70]
    assert rig.after(1) == ["TcpInfo"], "the answer is read at the next poll"
    rig.after(50, GET)
    assert rig.reader.asked == [], "at most ten times a second"


def test_both_edges_of_a_stop_are_read_at_once(rig: Rig) -> None:
    rig.after(1, GET)
    assert rig.after(3, KICK) == ["OwnCost"]
    assert rig.after(3, KICK) == [], "the kick of the second vCPU is not read again"
    assert rig.after(18) == ["OwnCost"], "while the guest is stopped, whatever arrives"
    assert rig.after(3, ENTER) == ["OwnCost"]
    assert rig.after(3, ENTER) == []


def test_no_socket_is_asked_for_while_the_guest_is_stopped(rig: Rig) -> None:
    rig.after(1, SOCKET, send(70_000))
    rig.reader.answers()
    assert rig.after(200, KICK) == ["OwnCost"]
    assert rig.after(3, ENTER) == ["OwnCost", "TcpInfo"]


def test_the_last_reading_waits_for_answers_and_closing_is_final(rig: Rig) -> None:
    rig.after(1, SOCKET, send(70_000))
    rig.reader.answers()
    assert [type(event) for event in rig.polled.last()] == [OwnCost, TcpInfo]
    rig.polled.close()
    rig.polled.close()
    assert rig.reader.closed


def test_a_forgotten_process_is_asked_for_no_more(rig: Rig) -> None:
    rig.after(1, SOCKET, send(70_000))
    rig.reader.answers()
    rig.polled.forget(10)
    rig.after(200, GET)
    assert rig.reader.asked == []
