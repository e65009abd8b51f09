# SPDX-License-Identifier: Apache-2.0
"""Postcopy: with a connection of its own for pages, on a script whose numbers are worked out by hand (us); and seen
from the source alone, on all recordings."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from ebpf_mig.analysis import parts
from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import Mark
from ebpf_mig.recording.file import Recording, RecordingReader, read_recording
from ebpf_mig.recording.kinds import pid_of
from tests.unit.script import Script
from tests.unit.scripts import cloud_hypervisor_local

DATA = Path(__file__).parents[2] / "data"
US = 1000
PAGE = 4096


def postcopy(*, late_pages: int = 100) -> Script:
    """The local migration, pages fetched through sockets 71 and 81 by threads 5: three in the blackout, the rest
    later.
    """
    script = cloud_hypervisor_local()
    source, destination = script.vms
    script.join(71, 81, unix=True)
    source.send(1200, 1202, 2, socket=71)  # the message with the purpose of the connection
    for begin in (2100, 2400, 2700):
        source.receive(begin - 50, begin, 32, socket=71, tid=5)
        source.send(begin + 5, begin + 10, 16 + PAGE, socket=71, tid=5)
        destination.send(begin - 20, begin - 18, 32, socket=81, tid=5)
        destination.receive(begin - 15, begin + 40, 16 + PAGE, socket=81, tid=5, off_cpu_us=50)
    source.receive(4000, 9990, 32 * late_pages, socket=71, tid=5, calls=late_pages)
    source.send(4000, 9990, PAGE * late_pages, socket=71, tid=5, calls=late_pages)
    destination.send(4000, 9995, 32 * late_pages, socket=81, tid=5, calls=late_pages)
    destination.receive(4000, 10_000, PAGE * late_pages, socket=81, tid=5, calls=late_pages, off_cpu_us=3000)
    return script


def test_pages_that_are_asked_for_are_no_state() -> None:
    plain, served = cloud_hypervisor_local().result(), postcopy().result()
    assert served.breakdown.migration.mode == "postcopy"
    assert served.phases == plain.phases
    assert served.breakdown.dirty_log.final is None


def test_pages_fetched_before_and_after_the_start() -> None:
    found = postcopy().result().breakdown.postcopy
    assert found is not None and found.while_dark is not None
    assert (found.while_dark.bytes, found.while_dark.asked) == (3 * (16 + PAGE), 3)
    assert found.while_dark.waited_ns == 150 * US
    assert (found.after.bytes, found.after.asked, found.after.waited_ns) == (100 * PAGE, 100, 3000 * US)
    assert found.drained_ns == (10_000 - 3800) * US


def test_a_run_of_calls_across_the_start_is_shared_out() -> None:
    script = postcopy()
    script.vms[1].receive(3700, 3900, 2000, socket=81, tid=5, calls=2, off_cpu_us=20)
    found = script.result().breakdown.postcopy
    assert found is not None and found.while_dark is not None
    assert (found.while_dark.bytes, found.after.bytes) == (3 * (16 + PAGE) + 1000, 100 * PAGE + 1000)


def test_other_modes_have_none() -> None:
    assert cloud_hypervisor_local().result().breakdown.postcopy is None


def alone(recording: Recording, pid: int) -> Recording:
    """What a host would have recorded that has only this process, and a VMM that says nothing."""
    header = replace(recording.header, targets=[target for target in recording.header.targets if target.pid == pid])
    own = [event for event in recording.events if pid_of(event) in (pid, None) and not isinstance(event, Mark)]
    return replace(recording, header=header, events=own)


def of_both_sides(path: Path) -> bool:
    with RecordingReader(path) as reader:
        return len(reader.header.targets) == 2 and reader.header.remote is None


@pytest.mark.parametrize("path", [*filter(of_both_sides, sorted(DATA.glob("*.rec")))], ids=lambda path: path.stem)
def test_a_source_alone_knows_postcopy(path: Path) -> None:
    """The witness is the destination's side of the same recording."""
    recording = read_recording(path)
    both = analyse(recording).breakdown
    migration = both.migration
    assert migration.source is not None
    seen = analyse(alone(recording, migration.source.pid))
    assert seen.breakdown.migration.mode == migration.mode
    if migration.mode == "postcopy":
        assert parts.observe(seen.traced, seen.attribution).source_ns is None
        assert seen.breakdown.window_ns is not None and both.window_ns is not None
        assert seen.breakdown.window_ns < both.window_ns, "its window has pages that followed the start"
        assert any("the window ends with the first answer" in note for note in seen.breakdown.notes)
