# SPDX-License-Identifier: Apache-2.0
"""Events of Cloud Hypervisor's monitor: decoding, and where they are put on our clock."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ebpf_mig.errors import VmmError
from ebpf_mig.vmm.cloud_hypervisor.event_monitor import EventFile, MonitorEvent, decode, marks

MS = 1_000_000


def text(name: str, stamp_ns: int) -> str:
    secs, nanos = divmod(stamp_ns, 10**9)
    event = {"timestamp": {"secs": secs, "nanos": nanos}, "source": "vm", "event": name, "properties": None}
    return json.dumps(event, indent=2) + "\n\n"


def test_whole_events_and_the_rest() -> None:
    both = text("pausing", 5) + text("paused", 3 * 10**9 + 7)
    assert decode(both) == ([("pausing", 5), ("paused", 3 * 10**9 + 7)], "")
    found, rest = decode(both[:-30])
    assert found == [("pausing", 5)]
    assert decode(rest + both[-30:])[0] == [("paused", 3 * 10**9 + 7)]


@pytest.mark.parametrize(
    "junk", ["", "[1, 2]", '{"event": "x"}', '{"timestamp": 3, "event": "x"}', "garbage", "[" * 9999]
)
def test_what_is_no_event(junk: str) -> None:
    assert decode(junk)[0] == []


def test_an_event_lies_between_what_it_follows_and_its_reading() -> None:
    start = 1000 * MS  # the VMM's start, which is not known to us
    seen = [
        MonitorEvent("migration-started", 50 * MS, start + 51 * MS),
        MonitorEvent("paused", 90 * MS, start + 90 * MS + 100_000),
    ]
    found = marks(7, seen, (0, start + 49 * MS + 500_000))
    assert [mark.name for mark in found] == ["ch.event.migration-started", "ch.event.paused"]
    for mark, event in zip(found, seen, strict=True):
        assert mark.pid == 7 and 0 <= mark.at_ns - (start + event.stamp_ns) <= mark.doubt_ns == 600_000


def test_the_send_call_bounds_what_a_destination_says() -> None:
    seen = [
        MonitorEvent("migration-receive-ready", 10 * MS, 1011 * MS),
        MonitorEvent("migration-receive-started", 500 * MS, 1500 * MS + 200_000),
    ]
    (ready, _) = marks(7, seen, (1005 * MS, 1499 * MS + 900_000))
    assert 0 <= ready.at_ns - 1010 * MS <= ready.doubt_ns == 300_000


def test_no_marks_without_bounds_or_against_them() -> None:
    paused = MonitorEvent("paused", 90 * MS, 2000 * MS)
    assert marks(7, [], (0, 0)) == [] and marks(7, [paused], (0, 0)) == []
    assert marks(7, [paused, MonitorEvent("migration-started", 0, 2000 * MS)], (0, 10**12)) == []


def test_a_file_that_grows_is_read_as_it_does(tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_text(text("booted", 1))
    file = EventFile(str(path))
    file.start()
    written = []
    with path.open("a", buffering=1) as out:
        for number, name in enumerate(("migration-started", "pausing", "paused")):
            half = len(text(name, number)) // 2
            out.write(text(name, number)[:half])
            out.flush()
            time.sleep(0.02)
            out.write(text(name, number)[half:])
            out.flush()
            written.append(time.monotonic_ns())
            time.sleep(0.02)
    seen = file.stop()
    assert [event.name for event in seen] == ["migration-started", "pausing", "paused"]
    assert all(at <= event.read_ns + 5 * MS < at + 200 * MS for at, event in zip(written, seen, strict=True))
    assert file.stop() == seen


def test_no_such_file() -> None:
    with pytest.raises(VmmError, match="No such file"):
        EventFile("/nonexistent/events").start()
    assert EventFile("/nonexistent/events").stop() == []
