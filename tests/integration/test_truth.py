# SPDX-License-Identifier: Apache-2.0
"""Figures of a migration whose delays are all known, because the truth machine injects them: see tests/truth.

Some delays are tested here; all of them, many times: `python -m tests.truth sweep --runs 100`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from ebpf_mig.collector import analyse
from ebpf_mig.linux import kvm
from ebpf_mig.probes import macros
from ebpf_mig.recording.events import Ending, Header, Ioctl, Transfer
from ebpf_mig.recording.file import Recording
from ebpf_mig.recording.thresholds import DETAIL_BUDGET, DETAIL_PER_MS
from tests.conftest import requires
from tests.truth import large
from tests.truth.harness import PHASES, migrate, undisturbed, work
from tests.truth.machine import HOG_SLOT
from tests.truth.parts import SLOWNESS, Plan
from tests.truth.workloads import MESSAGE

pytestmark = [requires("root", "/dev/kvm", "bcc", "kernel BTF")]

TDP_MMU = Path("/sys/module/kvm/parameters/tdp_mmu")
MS = 1_000_000
MILLION = 1_000_000


@pytest.mark.parametrize("phase", PHASES)
def test_a_delay_is_booked_where_it_was_made(phase: str) -> None:
    log = "initially-set" if phase == "fetch.kernel" else "legacy"
    run = undisturbed(Plan(delays={phase: 5 * MS}, log=log))
    assert run.wrong() == {}
    assert run.breakdown.completeness.verdict == "complete"
    if phase != "fetch.kernel":
        assert run.breakdown.phase_ns(phase) >= 0.95 * run.injected[phase] >= 4.7 * MS


@pytest.mark.parametrize(
    ("delay_ns", "state_first"),
    [
        pytest.param(1 * MS, False, id="1ms-ram-first"),
        pytest.param(1 * MS, True, id="1ms-state-first"),
        pytest.param(20 * MS, False, id="20ms-ram-first", marks=[pytest.mark.everywhere("truth"), pytest.mark.times]),
        pytest.param(20 * MS, True, id="20ms-state-first"),
    ],
)
def test_delays_everywhere_at_once(
    delay_ns: int, state_first: bool, record_property: Callable[[str, object], None]
) -> None:
    record_property("slowness", SLOWNESS)
    delays = {phase: delay_ns for phase in PHASES if phase != "fetch.kernel"}
    run = undisturbed(Plan(delays=delays, state_first=state_first, spin=state_first, vcpus=2), unix=state_first)
    assert run.wrong() == {}
    assert run.breakdown.phase_ns("unattributed") == 0
    for phase, injected in run.injected.items():
        assert run.breakdown.phase_ns(phase) >= 0.95 * injected, phase


@pytest.mark.everywhere("truth")
@pytest.mark.times
@requires("tracepoints of lock waits")
def test_a_fetch_behind_slots_lock_names_the_lock() -> None:
    """The wait lasts from the begin of our call to the end of the other thread's. On a busy host ours may begin
    late.
    """
    for _ in range(5):
        run = migrate(Plan(delays={"fetch.kernel": 20 * MS}, log="initially-set"))
        if run.injected["fetch.kernel"] < 5 * MS:
            pytest.skip("missing feature: a CLEAR_DIRTY_LOG of unmapped memory that takes long (shadow paging)")
        fetches = [e for e in run.events if isinstance(e, Ioctl) and e.cmd == kvm.GET_DIRTY_LOG]
        beside = [e for e in fetches if run.held[0] <= e.begin_ns < run.held[1]]
        longest = max(beside, key=lambda e: e.end_ns - e.begin_ns, default=fetches[-1])
        # The thread that held the lock may lose its CPU before it reads the clock again, so use the end of its call.
        holder = [e for e in run.events if isinstance(e, Ioctl) and e.slot == HOG_SLOT and e.end_ns > run.held[0]]
        let_go = min([run.held[1], *(e.end_ns for e in holder)])
        behind, took = let_go - longest.begin_ns, longest.end_ns - longest.begin_ns
        if took >= 0.9 * behind >= 4.5 * MS:
            break
    assert took >= 0.9 * behind >= 4.5 * MS
    rows = [i for fetch in run.breakdown.dirty_log.fetches for i in fetch.ioctls]
    row = next(i for i in rows if i.duration_ns == took)
    assert row.lock_wait_ns is not None
    assert row.lock_wait_ns["slots_lock"] >= 0.9 * behind
    assert row.lock_wait_ns["slots_lock"] + row.lock_wait_ns.get("mmu_lock", 0) <= took
    assert row.lock_wait_ns.get("mmu_lock", 0) < 0.1 * took


@requires("tracepoints of lock waits", "x86-64")
def test_a_fetch_behind_mmu_lock_names_the_lock() -> None:
    if TDP_MMU.exists() and TDP_MMU.read_text().strip() == "Y":
        pytest.skip("missing feature: an MMU notifier that takes long on unmapped memory (shadow paging)")
    said, events = work("mmu-lock", 500)
    fetches = [e for e in events if isinstance(e, Ioctl) and e.cmd == kvm.GET_DIRTY_LOG]
    assert len(fetches) == said["calls"]
    waits = [e for e in fetches if e.mmu_lock_ns > 0]
    assert waits, "no fetch ever had to wait"
    assert sum(e.slots_lock_ns for e in fetches) == 0, "nobody else took slots_lock"
    assert all(e.mmu_lock_ns <= e.end_ns - e.begin_ns for e in waits)
    assert max(e.mmu_lock_ns for e in waits) > 0.1 * MS


@pytest.mark.parametrize(
    "log",
    [
        pytest.param("legacy", marks=pytest.mark.everywhere("dirty log")),
        "manual",
        pytest.param("initially-set", marks=pytest.mark.everywhere("dirty log")),
        pytest.param("ring", marks=[pytest.mark.everywhere("ring"), requires("KVM's dirty ring")]),
    ],
)
def test_fetches_find_exactly_the_pages_that_the_guest_wrote(log: str) -> None:
    """Fetches find exactly the pages that the guest wrote, and the guest that arrives has the same memory."""
    run = migrate(Plan(log=log, slots=8, passes=3, dirty_pages=300))
    assert len(run.fetched) == 3
    assert not any(fetch["missing"] or fetch["surplus"] for fetch in run.fetched), run.fetched
    assert run.same_memory and not run.breakdown.completeness.lost


def test_a_million_small_sends_beside_a_running_guest_are_all_counted() -> None:
    runs = _many("sends-running", MILLION)
    assert len(runs) <= 1000


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(200_000, marks=pytest.mark.everywhere("loss"), id="200000"),
        pytest.param(MILLION, id="million"),
    ],
)
def test_many_small_sends_in_a_blackout_are_all_counted(count: int) -> None:
    """At first each call is kept; then the budget coalesces them."""
    runs = _many("sends", count)
    took_ms = (runs[-1].end_ns - runs[0].begin_ns) / MS
    backwards = [one.end_ns - other.begin_ns for one, other in pairwise(runs) if other.begin_ns < one.end_ns]
    said = f"{len(runs)} records, {took_ms:.0f} ms, the clock went back {len(backwards)} times: {backwards[:9]}"
    assert len(runs) <= 1.1 * (DETAIL_BUDGET + DETAIL_PER_MS * took_ms), said


@pytest.mark.everywhere("loss")
def test_what_is_lost_is_told_and_its_bytes_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a ring buffer that is far too small, the lost records are exactly the gaps in the others' stream
    positions.
    """
    monkeypatch.setattr(macros, "RING_BYTES", 16384)
    said, events = work("sends", 100_000)
    ending = events[-1]
    assert isinstance(ending, Ending)
    assert ending.lost["transfer"] > 0
    runs = sorted(
        (e for e in events if isinstance(e, Transfer) and e.socket == said["socket"] and e.direction == 0),
        key=lambda run: run.position,
    )
    ends = [0, *(run.position + run.bytes for run in runs)]
    gaps = [run.position - end for run, end in zip(runs, ends, strict=False)]
    gaps.append(said["bytes"] - ends[-1])
    assert all(gap >= 0 for gap in gaps) and sum(gap > 0 for gap in gaps) <= ending.lost["transfer"]
    assert sum(gaps) + sum(run.bytes for run in runs) == said["bytes"]
    assert analyse(Recording(header=Header(), events=events)).breakdown.completeness.verdict == "incomplete"


def _many(workload: str, count: int) -> list[Transfer]:
    """The records of that many sends, after a check that the sums are exact and nothing was lost."""
    said, events = work(workload, count)
    runs = [e for e in events if isinstance(e, Transfer) and e.socket == said["socket"] and e.direction == 0]
    runs.sort(key=lambda run: run.position)
    ending = events[-1]
    assert isinstance(ending, Ending)
    assert ending.lost == {}
    assert sum(run.calls for run in runs) == said["calls"] == count
    assert sum(run.bytes for run in runs) == said["bytes"] == count * MESSAGE
    assert runs[-1].position + runs[-1].bytes == said["bytes"]
    return runs


@requires("x86-64")
def test_large_shapes_can_be_measured() -> None:
    """A dirty log of 64 GiB without memory behind it: re-arming costs far more than reading."""
    rows = {what: ms for what, ms, _, _ in large.measure()}
    assert rows["CLEAR all-ones, all dirty"] > rows["GET manual, all dirty"]
