# SPDX-License-Identifier: Apache-2.0
"""How a migration ended, from two calls and two real processes, as old and new versions behave."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ebpf_mig.errors import VmmError
from ebpf_mig.vmm.base import RemoteEnd
from ebpf_mig.vmm.call import Call
from ebpf_mig.vmm.cloud_hypervisor import completion, source
from ebpf_mig.vmm.cloud_hypervisor.api import RefusedError
from ebpf_mig.vmm.cloud_hypervisor.completion import Ending
from ebpf_mig.vmm.cloud_hypervisor.source import FarSource, NearSource


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits: here one side shows the result right after the other, or never."""
    monkeypatch.setattr(completion, "AFTER_S", 0.3)
    monkeypatch.setattr(completion, "REASON_S", 0.2)
    monkeypatch.setattr(source, "FIRST_LOOK_S", 0.2)
    monkeypatch.setattr(source, "LOOK_S", 0.1)


class World:
    """Two idle processes, and two calls that return when the test says so."""

    def __init__(self) -> None:
        self.source, self.destination = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
        self.fds = [os.pidfd_open(process.pid) for process in (self.source, self.destination)]
        self.send, self.receive, self.cancelled = Call(), Call(), Call()
        self.log, self.has_vm = "", True
        self.far: RemoteEnd | None = None

    def source_is_far(self, run: Callable[[list[str]], str] | None = None) -> None:
        """The source is checked with real commands, as over ssh."""
        self.far = RemoteEnd(pid=self.source.pid, run=run or said)

    def judge(self, *acts: Callable[[World], object], long: bool = False, timeout_s: float = 20) -> tuple[str, str]:
        near = NearSource(self.source.pid, self.fds[0])
        ending = Ending(
            send=self.send, receive=self.receive, cancelled=self.cancelled,
            source=FarSource(self.far) if self.far else near, destination=self.fds[1], long=long,
            why_failed=lambda: self.log, destination_has_vm=lambda: self.has_vm,
        )  # fmt: skip

        def play() -> None:
            for act in acts:
                time.sleep(0.05)
                act(self)

        player = threading.Thread(target=play)
        player.start()
        answer = ending.wait(time.monotonic() + timeout_s)
        player.join()
        return answer

    def close(self) -> None:
        for process in (self.source, self.destination):
            process.kill()
            process.wait()
        for fd in self.fds:
            os.close(fd)
        for call in (self.send, self.receive, self.cancelled):
            call.close()


def said(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    with contextlib.closing(made):
        yield made


def exits(w: World) -> None:
    w.source.kill()
    w.source.wait()


def dies(w: World) -> None:
    w.destination.kill()
    w.receive.error = VmmError("it closed the connection")
    w.receive.finish()


def received(w: World) -> None:
    w.receive.finish()


def sent(w: World) -> None:
    w.send.finish()


def send_refused(w: World) -> None:
    w.send.error = VmmError("no: because")
    w.send.finish()


def receive_refused(w: World) -> None:
    w.receive.error = VmmError("Migration was aborted")
    w.receive.finish()


def test_an_old_source_answers_at_the_end(world: World) -> None:
    assert world.judge(received, sent, exits) == ("completed", "")


def test_a_new_source_answers_at_once(world: World) -> None:
    assert world.judge(received, exits) == ("completed", "")


def test_the_source_may_exit_before_the_receive_call_returns(world: World) -> None:
    assert world.judge(exits, received) == ("completed", "")


def test_a_refused_send(world: World) -> None:
    assert world.judge(send_refused) == ("failed", "no: because")


def test_an_old_receiver_answers_success_to_an_aborted_migration(world: World) -> None:
    assert world.judge(received, send_refused) == ("failed", "no: because")


def test_and_where_the_source_says_nothing_either(world: World) -> None:
    world.has_vm = False
    assert world.judge(received) == ("failed", "the destination has no VM and the source goes on")


def test_an_old_receiver_answers_success_when_its_sender_has_died(world: World) -> None:
    world.has_vm = False
    result, why = world.judge(exits, received)
    assert result == "failed" and "has no VM" in why


def test_the_sources_own_reason_goes_before_the_destinations(world: World) -> None:
    assert world.judge(receive_refused) == ("failed", "Migration was aborted")
    world.log = "Connection reset"
    assert world.judge() == ("failed", "Connection reset")


def test_a_sender_that_dies_and_a_receiver_that_does_not_notice(world: World) -> None:
    result, why = world.judge(exits)
    assert result == "failed" and "the source ended" in why


def send_broken(w: World) -> None:
    w.send.error = VmmError("it closed the connection")
    w.send.finish()


def test_an_old_source_that_is_ended_after_its_last_byte(world: World) -> None:
    """Its call never answers. The destination has the VM, and runs it."""
    assert world.judge(send_broken, exits, received) == ("completed", "")


def test_an_old_source_that_is_ended_before(world: World) -> None:
    result, reason = world.judge(send_broken, exits)
    assert result == "failed" and "does not report that it has the VM" in reason


def test_a_new_source_fails_and_nobody_answers(world: World) -> None:
    world.log = "Error connecting: Connection refused"
    result, why = world.judge(sent)
    assert result == "failed" and "goes on with the VM" in why and "Connection refused" in why


def test_a_receiver_that_dies(world: World) -> None:
    assert world.judge(dies) == ("failed", "it closed the connection")


def test_postcopy_is_not_over_before_the_source_has_served_all(world: World) -> None:
    begin = time.monotonic()
    assert world.judge(received, lambda _: time.sleep(0.6), exits, long=True) == ("completed", "")
    assert time.monotonic() - begin > 0.6


def test_postcopy_whose_destination_dies_later(world: World) -> None:
    answer = world.judge(received, lambda w: w.destination.kill(), lambda w: w.destination.wait(), exits, long=True)
    assert answer == ("failed", "the destination ended")


def test_cancelled_and_too_late(world: World) -> None:
    assert world.judge(timeout_s=0.1)[0] == "unknown"
    assert world.judge(lambda w: w.cancelled.finish())[0] == "unknown"


def test_waiting_costs_no_cpu(world: World) -> None:
    before = time.thread_time_ns()
    world.judge(timeout_s=1.0)
    assert time.thread_time_ns() - before < 20_000_000


def connection_lost(w: World) -> None:
    w.send.error = VmmError("it closed the connection")
    w.send.finish()


def really_refused(w: World) -> None:
    w.send.error = RefusedError("the source refuses: no")
    w.send.finish()


@pytest.mark.parametrize("acts", [(received, exits), (exits, received), (sent, received, exits)])
def test_a_source_elsewhere_is_known_to_be_gone(world: World, acts: tuple[Callable[[World], object], ...]) -> None:
    world.source_is_far()
    assert world.judge(*acts) == ("completed", "")


def test_a_source_elsewhere_that_cannot_be_asked_any_more(world: World) -> None:
    world.source_is_far(lambda _command: "")
    assert world.judge(connection_lost, received) == ("completed", "")
    assert world.judge() == ("completed", "")


def test_a_source_elsewhere_that_refuses_or_gives_up(world: World) -> None:
    world.source_is_far()
    world.log = "Error connecting: Connection refused"
    result, why = world.judge(sent)
    assert result == "failed" and "goes on with the VM" in why and "Connection refused" in why
    world.send.error = None
    assert world.judge(really_refused) == ("failed", "the source refuses: no")


def test_a_source_elsewhere_that_dies(world: World) -> None:
    world.source_is_far()
    result, why = world.judge(exits)
    assert result == "failed" and "the source ended" in why


def test_a_source_elsewhere_is_looked_at_seldom(world: World) -> None:
    asked: list[list[str]] = []

    def counted(command: list[str]) -> str:
        asked.append(command)
        return said(command)

    world.source_is_far(counted)
    world.judge(timeout_s=1.2)
    assert len(asked) == 3, "after 0.2, 0.4 and 0.8 s; the next would be at 1.6 s"
