# SPDX-License-Identifier: Apache-2.0
"""Which process is the source where the beginning of its migration was missed."""

from __future__ import annotations

import pytest

from ebpf_mig.analysis import roles
from ebpf_mig.analysis.process import Process
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import RECEIVE, SEND, Ioctl, Transfer

MS = 1_000_000
UPDATE = next(cmd for cmd in kvm.MEMSLOT)


def slot(at: int, flags: int, size: int = 128 << 20) -> Ioctl:
    return Ioctl(at, at + 1000, 1, 1, 3, UPDATE, 0, 0, flags, 0, size)


def moved(at: int, direction: int, size: int) -> Transfer:
    return Transfer(at, at + 1000, 1, 9, 9, direction, 70, 1, size, 1000, 1000, 0, 0)


def found(*events: Ioctl | Transfer) -> bool:
    process = Process(1, ioctls=[e for e in events if isinstance(e, Ioctl)])
    process.transfers.extend(e for e in events if isinstance(e, Transfer))
    return roles.assign([process])[0] is process


def test_a_source_whose_beginning_was_missed() -> None:
    """It sent much, then its memory lost the flag. Nothing else of its migration was seen."""
    assert found(moved(MS, SEND, 100 << 10), slot(2 * MS, 0))


@pytest.mark.parametrize(
    "events",
    [
        (slot(MS, 0), moved(2 * MS, SEND, 100 << 10)),
        (moved(MS, SEND, 1000), slot(2 * MS, 0)),
        (moved(MS, RECEIVE, 100 << 10), slot(2 * MS, 0)),
        (moved(MS, SEND, 100 << 10), slot(2 * MS, 0, 0), slot(3 * MS, 0)),
        (moved(MS, SEND, 100 << 10), slot(2 * MS, 0, 4096)),
    ],
    ids=["made before it sent", "sent little", "only received", "made again", "a small slot"],
)
def test_what_is_no_source(events: tuple[Ioctl | Transfer, ...]) -> None:
    assert not found(*events)
