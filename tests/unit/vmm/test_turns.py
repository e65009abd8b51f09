# SPDX-License-Identifier: Apache-2.0
"""When an event loop handles what arrives during a migration: a real loop and real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

from ebpf_mig.linux import clock
from ebpf_mig.vmm.qemu.turns import REST_S, Turns

MS = 1e-3
NS = 1_000_000_000


def handled(turns: Turns, gaps_s: list[float]) -> list[float]:
    """When each of some bytes was handled, in seconds after the first was sent; each is sent so long after another."""
    ours, theirs = socket.socketpair()
    loop = asyncio.SelectorEventLoop(turns)
    found: list[float] = []
    begin = 0.0

    def take() -> None:
        for _ in ours.recv(100):
            found.append(time.monotonic() - begin)
        if len(found) == len(gaps_s):
            loop.stop()

    def send() -> None:
        nonlocal begin
        time.sleep(0.05)  # the loop waits by then
        begin = time.monotonic()
        for gap in gaps_s:
            time.sleep(gap)
            theirs.send(b"x")

    with ours, theirs:
        loop.add_reader(ours, take)
        thread = threading.Thread(target=send)
        thread.start()
        loop.run_forever()
        thread.join()
        loop.remove_reader(ours)
        loop.close()
    return found


def test_what_arrives_in_a_rest_is_handled_together_after_it() -> None:
    turns = Turns()
    turns.rests = True
    first, second = handled(turns, [0, REST_S / 4])
    assert first >= REST_S - MS and second - first < MS
    # Both clocks are those of the arrival: the rest and the handling came later.
    assert clock.monotonic_ns() - turns.woken.monotonic_ns >= (REST_S - MS) * NS


def test_what_arrives_later_has_its_own_rest() -> None:
    turns = Turns()
    turns.rests = True
    first, second = handled(turns, [0, 2 * REST_S])
    assert first < 2 * REST_S <= second - REST_S + MS


def test_without_rests_it_is_handled_at_once() -> None:
    (first,) = handled(Turns(), [0])
    assert first < REST_S


def test_work_that_the_loop_has_is_not_delayed() -> None:
    turns = Turns()
    turns.rests = True
    ours, theirs = socket.socketpair()
    with ours, theirs, turns:
        turns.register(ours, 1)
        theirs.send(b"x")
        begin = time.monotonic()
        assert turns.select(0) and time.monotonic() - begin < REST_S
        assert turns.select(1) and time.monotonic() - begin >= REST_S


def test_a_wait_without_an_event_ends_in_time() -> None:
    with Turns() as turns:
        turns.rests = True
        begin = time.monotonic()
        assert turns.select(0.001) == [] and time.monotonic() - begin == pytest.approx(0.001, abs=REST_S / 2)
