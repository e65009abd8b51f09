# SPDX-License-Identifier: Apache-2.0
"""Which records are decoded at once, and which wait until the guest runs again."""

from __future__ import annotations

import struct

import pytest

from ebpf_mig.probes.backlog import LEAVING_NS, MOST_HELD_NS, STARTING_NS, Backlog
from ebpf_mig.recording.events import AnyEvent, Exec, Ioctl, Kick, Socket, VcpuEnter
from ebpf_mig.recording.kinds import BY_TYPE
from ebpf_mig.recording.layout import WORD

MS = 1_000_000
VM, OTHER = 10, 20


def record(kind: type, pid: int = VM) -> bytes:
    """A record as the kernel writes it: its kind, the process, and zeros."""
    described = BY_TYPE[kind].record
    assert described is not None
    words = [0] * (described.layout.size // WORD)
    for field in described.layout.fields:
        words[field.at] = {"kind": described.number, "pid": pid}.get(field.name, 0)
    return struct.pack(f"={len(words)}Q", *words)


IOCTL, KICK, ENTER = record(Ioctl), record(Kick), record(VcpuEnter)


class Rig:
    def __init__(self) -> None:
        self.now = 1000 * MS
        self.running: set[int] = set()
        self.backlog = Backlog(lambda pid: pid in self.running)

    def after(self, ms: float, *records: bytes) -> list[bytes] | None:
        self.now += int(ms * MS)
        self.edges = self.backlog.add(records, self.now)
        return self.backlog.take(self.now)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def kinds(events: list[AnyEvent]) -> list[type]:
    return [type(event) for event in events]


def test_records_are_due_at_once_while_the_guest_runs(rig: Rig) -> None:
    assert rig.after(1, IOCTL, IOCTL) == [IOCTL, IOCTL]
    assert rig.after(1) == []
    assert rig.edges == []


def test_a_kick_is_told_at_once_and_holds_the_records_around_it(rig: Rig) -> None:
    assert rig.after(1, IOCTL, KICK, IOCTL) is None
    assert kinds(rig.edges) == [Kick]
    assert rig.after(30, IOCTL) is None
    assert rig.edges == []


def test_they_are_due_in_order_some_time_after_a_vcpu_has_entered(rig: Rig) -> None:
    rig.after(1, IOCTL, KICK)
    assert rig.after(30, ENTER) is None
    assert kinds(rig.edges) == [VcpuEnter]
    assert rig.after(STARTING_NS / MS, IOCTL) == [IOCTL, KICK, ENTER, IOCTL]
    assert rig.after(1, IOCTL) == [IOCTL]


def test_a_kick_that_does_not_stop_the_guest_holds_nothing_for_long(rig: Rig) -> None:
    rig.running.add(VM)
    assert rig.after(1, KICK) is None, "the vCPU may not have left yet"
    assert rig.after(LEAVING_NS / MS) == [KICK]
    assert rig.after(1, IOCTL) == [IOCTL]


def test_the_stop_of_one_vm_outlasts_the_kick_of_another_that_runs(rig: Rig) -> None:
    rig.running.add(OTHER)
    rig.after(1, KICK, record(Kick, OTHER))
    assert rig.after(LEAVING_NS / MS) is None
    rig.backlog.forget(VM)
    assert rig.after(1) == [KICK, record(Kick, OTHER)]


@pytest.mark.parametrize(
    "edges",
    [[KICK], [KICK, record(Kick, OTHER)], [KICK, ENTER], [ENTER]],
    ids=["kicks", "kicks of two VMs", "kicks that end at once", "entries"],
)
def test_no_record_is_held_for_longer_than_that(rig: Rig, edges: list[bytes]) -> None:
    waiting = longest = 0
    for turn in range(200):
        waiting = waiting + 5 if rig.after(5, edges[turn % len(edges)]) is None else 0
        longest = max(longest, waiting)
    assert longest <= MOST_HELD_NS // MS
    assert rig.after(MOST_HELD_NS / MS, IOCTL) is not None
    assert rig.after(1, IOCTL) == [IOCTL], "a long stop is read as any other time"


@pytest.mark.parametrize("kind", [Socket, Exec])
def test_what_may_need_another_process_to_be_traced_is_due_at_once(rig: Rig, kind: type) -> None:
    rig.after(1, KICK)
    assert rig.after(1, IOCTL, record(kind)) == [KICK, IOCTL, record(kind)]
    assert rig.after(1, IOCTL) is None, "the guest is still stopped"


def test_everything_can_be_taken_at_any_time(rig: Rig) -> None:
    rig.after(1, KICK, IOCTL)
    assert rig.backlog.release() == [KICK, IOCTL]
    assert rig.backlog.release() == []
