# SPDX-License-Identifier: Apache-2.0
"""Messages of the watch to a listener that is away."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from ebpf_mig.exporter import watch_process
from ebpf_mig.exporter.analyst import socket_pair
from ebpf_mig.exporter.listener_messages import MESSAGE_BYTES, Found, Message
from ebpf_mig.exporter.messages import Answer
from ebpf_mig.exporter.watch_process import Outbox
from tests.unit.exporter.observations import observation, status


def test_a_listener_that_stays_away_holds_nothing_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_process, "WAIT_S", 1)
    inbox, ours = socket_pair()
    outbox = Outbox(ours.detach())
    sent = 0
    with pytest.raises(BlockingIOError):
        for sent in itertools.count():  # noqa: B007
            outbox.send(Answer("x", observation()))
    assert sent > 20, "a listener that is replaced misses nothing meanwhile"
    outbox.state(status())  # at once, and dropped
    read = msgspec.json.decode(inbox.recv(MESSAGE_BYTES), type=Message)
    assert isinstance(read, Found) and read.number == 1 and read.observation == observation(at=read.observation.at)
    outbox.state(status())
    for _ in range(sent - 1):
        read = msgspec.json.decode(inbox.recv(MESSAGE_BYTES), type=Message)
        assert isinstance(read, Found)
    assert read.number == sent
