# SPDX-License-Identifier: Apache-2.0
"""Long recordings are read with their pre-copy coalesced; the calls of a switchover stay separate."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from msgspec.structs import replace

from bench.reading import SEED, stretched
from ebpf_mig.collector import analyse
from ebpf_mig.recording.coalesce import coalesced, read_coalesced, run_of
from ebpf_mig.recording.events import Ending, OffCpu, Transfer
from ebpf_mig.recording.file import RecordingWriter, read_recording
from tests.unit.joining.test_happens_before import send


def bytes_by_socket(events: list[object]) -> Counter[tuple[int, int, int]]:
    total: Counter[tuple[int, int, int]] = Counter()
    for event in events:
        if isinstance(event, Transfer):
            total[event.pid, event.socket, event.direction] += event.bytes
    return total


def test_a_short_recording_is_read_as_it_is() -> None:
    coalesced, plain = read_coalesced(str(SEED)), read_recording(SEED)
    assert coalesced == plain


def test_a_long_one_is_smaller_and_says_the_same(tmp_path: Path) -> None:
    seed = read_recording(SEED)
    with RecordingWriter(tmp_path / "long.rec", seed.header) as writer:
        writer.write_many(stretched(seed.header, seed.events, 150_000))
    coalesced, plain = read_coalesced(str(tmp_path / "long.rec")), read_recording(tmp_path / "long.rec")
    assert len(coalesced.events) < 0.8 * len(plain.events)
    assert not coalesced.truncated
    waits = [e for e in plain.events if isinstance(e, OffCpu)]
    assert len(waits) > sum(isinstance(e, OffCpu) for e in coalesced.events), "those far from the window are left out"
    assert bytes_by_socket(list(coalesced.events)) == bytes_by_socket(list(plain.events))
    one, two = analyse(coalesced).breakdown, analyse(plain).breakdown
    assert one.phases == two.phases
    assert one.vcpus == two.vcpus
    assert one.waits == two.waits
    assert one.pausing == two.pausing
    assert one.wire == two.wire
    assert one.sockets == two.sockets
    assert len(one.dirty_log.passes) == len(two.dirty_log.passes)
    assert sum(p.bytes for p in one.dirty_log.passes) == sum(p.bytes for p in two.dirty_log.passes)


def test_a_run_has_the_sums_of_its_calls() -> None:
    run = run_of([send(10, 20, 0, 100), send(30, 70, 100, 50)])
    assert (run.begin_ns, run.end_ns, run.position, run.bytes, run.calls) == (10, 70, 0, 150, 2)
    assert run.max_call_ns == 40


def test_a_run_of_queued_requests_begins_with_the_first_of_them_and_not_with_the_first_that_was_done() -> None:
    requests = [replace(send(*span), tid=0) for span in ((30, 40, 0, 100), (10, 70, 100, 50))]
    assert (run_of(requests).begin_ns, run_of(requests).end_ns) == (10, 70)


def calls_of(tid: int, *spans: tuple[int, int, int, int]) -> list[Transfer]:
    return [replace(send(*span), tid=tid) for span in spans]


def runs(block: list[Transfer]) -> list[tuple[int, int, int]]:
    return [(e.position, e.bytes, e.calls) for e in coalesced(list(block)) if isinstance(e, Transfer)]


def test_a_run_ends_where_bytes_are_missing_and_after_a_second() -> None:
    ms = 1_000_000
    near = calls_of(1, (1, 2, 0, 10), (3, 4, 10, 10), (5, 6, 20, 10))
    assert runs(near) == [(0, 30, 3)]
    assert runs([near[0], near[2]]) == [(0, 10, 1), (20, 10, 1)]
    far = calls_of(1, (1, 2, 0, 10), (900 * ms, 901 * ms, 10, 10), (1100 * ms, 1101 * ms, 20, 10))
    assert runs(far) == [(0, 20, 2), (20, 10, 1)]
    hour = 3600 * 10**9
    unseen = calls_of(1, (0, hour, 0, 10), (hour + 1, hour + 2, 10, 10), (hour + 3, hour + 4, 20, 10))
    assert runs(unseen) == [(0, 10, 1), (10, 20, 2)], "the begin of the first call is not known"


def test_threads_have_runs_of_their_own() -> None:
    mixed = [*calls_of(1, (1, 2, 0, 10)), *calls_of(2, (2, 3, 100, 10)), *calls_of(1, (3, 4, 10, 10))]
    assert sorted(runs(mixed)) == [(0, 20, 2), (100, 10, 1)]


def test_what_a_hostile_recording_claims_can_still_be_stored(tmp_path: Path) -> None:
    seed = read_recording(SEED)
    huge = [
        Transfer(1, (1 << 63) + n, 1, 1, 3, n % 2, 5, 1 << 63, 1 << 63, -(1 << 63), 7, 0, n) for n in range(200_000)
    ]
    with RecordingWriter(tmp_path / "huge.rec", seed.header) as writer:
        writer.write_many([*huge, Ending(1, "migrated")])
    read = read_coalesced(str(tmp_path / "huge.rec"))
    with RecordingWriter(tmp_path / "again.rec", read.header) as writer:
        writer.write_many(read.events)
