# SPDX-License-Identifier: Apache-2.0
"""What a thread was still doing on its sockets when tracing ended."""

from __future__ import annotations

from ebpf_mig.probes import records
from ebpf_mig.probes.records import IN_VAIN, WORDS, decode, open_runs
from ebpf_mig.recording.events import Retransmit

RUN = records._RUN_WORDS


def thread(*, calls: int, failed: int) -> tuple[int, ...]:
    """The words of a `struct thread_state` of process 7 whose receives are open on socket 80."""
    words = [0] * WORDS["THREAD_WORDS"]
    words[0] = 7
    at = records._RUN_AT + RUN
    words[at : at + RUN] = [100, 200, 5, 1, 80, calls, 4096, 50, 50, failed, 0, 0, 0]
    return tuple(words)


def test_a_run_that_goes_on() -> None:
    (found,) = open_runs(9, thread(calls=3, failed=1), {80: (0, 1000)})
    assert (found.pid, found.tid, found.direction, found.socket) == (7, 9, 1, 80)
    assert (found.calls, found.bytes, found.failed, found.position) == (3, 4096, 1, 1000)


def test_calls_in_vain_are_told_if_there_are_many() -> None:
    assert open_runs(9, thread(calls=0, failed=IN_VAIN - 1), {}) == []
    (found,) = open_runs(9, thread(calls=0, failed=IN_VAIN), {80: (0, 5096)})
    assert (found.calls, found.bytes, found.in_call_ns, found.failed) == (0, 0, 0, IN_VAIN)
    assert (found.begin_ns, found.end_ns, found.position) == (100, 200, 5096)


def test_a_retransmission() -> None:
    words = (12, 1000, 7, 80, 31_200, 0xFFFFFFF0, 3)
    record = b"".join(word.to_bytes(8, "little") for word in words)
    assert decode(record) == Retransmit(1000, 7, 80, 31_200, 0xFFFFFFF0, 3)
