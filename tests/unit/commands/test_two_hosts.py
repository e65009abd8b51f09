# SPDX-License-Identifier: Apache-2.0
"""What is added to the recording of the other host."""

from __future__ import annotations

from ebpf_mig.commands.two_hosts import with_marks
from ebpf_mig.recording.events import Header, Kick, Mark, Target
from ebpf_mig.recording.file import Recording

KICK = Kick(1, 77, 77, 78, 10)
SAID = Mark(5, -1, "qmp.RESUME")


def half(*targets: Target, events: tuple[Kick, ...] = (KICK,)) -> Recording:
    return Recording(header=Header(targets=list(targets)), events=list(events), truncated=False, reason="", unknown=0)


def test_a_process_that_started_after_its_recorder_gets_its_role_and_its_marks() -> None:
    known = Target(pid=0, role="destination", vmm="qemu", vmm_version="9.1")
    got = with_marks(half(), [known], [SAID], key=-1)
    assert got.header.targets == [Target(pid=77, role="destination", vmm="qemu", vmm_version="9.1")]
    assert got.events == [KICK, Mark(5, 77, "qmp.RESUME")]


def test_a_process_that_never_started_is_not_invented() -> None:
    got = with_marks(half(events=()), [Target(pid=0, role="destination", vmm="qemu")], [], key=-1)
    assert got.header.targets == []


def test_marks_of_the_other_end_stay_out() -> None:
    target = Target(pid=77, role="source", vmm="qemu")
    got = with_marks(half(Target(pid=77, role="unknown")), [target], [SAID, Mark(6, 77, "qmp.STOP")])
    assert got.header.targets == [target]
    assert got.events == [KICK, Mark(6, 77, "qmp.STOP")]
