# SPDX-License-Identifier: Apache-2.0
"""Long recordings read with their pre-copy folded: what a switchover is made of stays call by call."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from bench.reading import SEED, stretched
from ebpf_mig.collector import analyse
from ebpf_mig.events import Transfer
from ebpf_mig.folding import read_folded, run_of
from ebpf_mig.recording import RecordingWriter, read_recording
from tests.unit.test_pairs import send


def bytes_by_socket(events: list[object]) -> Counter[tuple[int, int, int]]:
    total: Counter[tuple[int, int, int]] = Counter()
    for event in events:
        if isinstance(event, Transfer):
            total[event.pid, event.socket, event.direction] += event.bytes
    return total


def test_a_short_recording_is_read_as_it_is() -> None:
    folded, plain = read_folded(str(SEED)), read_recording(SEED)
    assert folded == plain


def test_a_long_one_is_smaller_and_says_the_same(tmp_path: Path) -> None:
    seed = read_recording(SEED)
    with RecordingWriter(tmp_path / "long.rec", seed.header) as writer:
        writer.write_many(stretched(seed.header, seed.events, 150_000))
    folded, plain = read_folded(str(tmp_path / "long.rec")), read_recording(tmp_path / "long.rec")
    assert len(folded.events) < 0.8 * len(plain.events)
    assert not folded.truncated
    assert bytes_by_socket(list(folded.events)) == bytes_by_socket(list(plain.events))
    one, two = analyse(folded.header, folded.events), analyse(plain.header, plain.events)
    assert one.phases == two.phases
    assert one.vcpus == two.vcpus
    assert one.wire == two.wire
    assert one.sockets == two.sockets
    assert len(one.dirty_log.passes) == len(two.dirty_log.passes)
    assert sum(p.bytes for p in one.dirty_log.passes) == sum(p.bytes for p in two.dirty_log.passes)


def test_a_run_has_the_sums_of_its_calls() -> None:
    run = run_of([send(10, 20, 0, 100), send(30, 70, 100, 50)])
    assert (run.begin_ns, run.end_ns, run.position, run.bytes, run.calls) == (10, 70, 0, 150, 2)
    assert run.max_call_ns == 40
