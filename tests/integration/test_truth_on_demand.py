# SPDX-License-Identifier: Apache-2.0
"""A restored guest waits for each page for a known time. The truth is the clock of the process that serves them, and
the kernel's own count of page faults."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from ebpf_mig.breakdown import Breakdown, PageSource
from tests.conftest import requires
from tests.integration.test_truth_files import saved_and_loaded
from tests.truth.parts import SLOWNESS, Plan

pytestmark = [requires("root", "/dev/kvm", "bcc", "kernel BTF", "x86-64")]

MS = 1_000_000
WAKE_NS = int(2 * MS * SLOWNESS)
"""How long the guest's thread or the server takes at most to notice that it is its turn, if it gets a CPU."""


class Seen(NamedTuple):
    breakdown: Breakdown
    served: list[tuple[int, int]]
    touched_ns: int


def restored(plan: Plan) -> Seen:
    """What was seen of a guest that is saved, loaded, and then touches its pages."""
    traced = saved_and_loaded(plan, 10 * MS)
    found = traced.destination
    served = [(begin, end) for begin, end in found["served"]]
    return Seen(traced.breakdown, served, found["touched"])


@pytest.mark.parametrize(
    ("backend", "interrupts", "sources"),
    [
        ("userfaultfd", False, {PageSource.USERFAULTFD}),
        ("file", False, {PageSource.FILE}),
        ("userfaultfd", True, {PageSource.USERFAULTFD, PageSource.BACKGROUND}),  # KVM decides who waits
    ],
    ids=["userfaultfd", "file", "interrupts"],
)
def test_waits_for_pages(backend: str, interrupts: bool, sources: set[PageSource], tmp_path: Path) -> None:
    delay = 4 * MS
    plan = Plan(
        delays={"page": delay}, address=str(tmp_path), backend=backend, interrupts=interrupts, dirty_pages=32, slots=1
    )
    seen = restored(plan)
    b = seen.breakdown
    assert (b.migration.mode, b.migration.result) == ("snapshot", "completed")
    assert b.page_faults is not None
    (row,) = b.page_faults
    (waits,) = row.waits
    assert waits.source in sources and waits.count == len(seen.served)
    assert waits.count >= plan.dirty_pages
    least = sum(end - begin for begin, end in seen.served)
    assert least - waits.count * WAKE_NS <= waits.waited_ns <= seen.touched_ns
    assert waits.waited_ns >= 0.98 * delay * waits.count
    assert delay <= waits.longest_ns <= max(end - begin for begin, end in seen.served) + 5 * WAKE_NS
    assert waits.waited_ns <= waits.last_ns <= seen.touched_ns + WAKE_NS
    if waits.source == PageSource.FILE:  # the kernel counts those itself; see `PageFaults`
        assert row.major is not None and waits.count <= row.major <= waits.count + 8
