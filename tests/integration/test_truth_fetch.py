# SPDX-License-Identifier: Apache-2.0
"""The explanation of the final fetch, checked with workloads whose cause is known: see tests/truth.

Covers the split of an ioctl, ring pages, bitmap work on and off the CPU, TCP's limit, brownout, and untracked sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from ebpf_mig.analysis import fetch_split, tcp_info
from ebpf_mig.analysis.material import split
from ebpf_mig.breakdown import Split
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import AnyEvent, Header, Ioctl, Samples, TcpInfo, Transfer, VcpuSpan
from ebpf_mig.recording.file import Recording
from tests.conftest import requires
from tests.truth.harness import migrate, undisturbed, work
from tests.truth.parts import Plan

pytestmark = [requires("root", "/dev/kvm", "bcc", "kernel BTF")]

TDP_MMU = Path("/sys/module/kvm/parameters/tdp_mmu")
MS = 1_000_000


def together(events: Sequence[AnyEvent], cmd: int) -> tuple[Split, list[Ioctl], int]:
    """(split, ioctls, number of samples) of all sampled ioctls of one kind."""
    samples = fetch_split.by_ioctl(e for e in events if isinstance(e, Samples))
    ioctls = [e for e in events if isinstance(e, Ioctl) and e.cmd == cmd]
    found = fetch_split.split(ioctls, samples)
    assert found is not None
    return found, ioctls, sum(s.count for several in samples.values() for s in several)


def share(found: Split, name: str) -> float:
    return found.parts[name] / sum(found.parts.values())


def test_a_fetch_of_a_clean_log_is_copying() -> None:
    """With manual protection a GET only copies the bitmap."""
    said, events = work("get-clean", 400)
    found, ioctls, samples = together(events, kvm.GET_DIRTY_LOG)
    assert len(ioctls) == said["calls"], "records behind samples reach us"
    if found.samples != "exact":
        assert 50 < samples < 400, "once a millisecond on the CPU while nothing was kicked"
    assert share(found, "copy") > 0.9
    assert share(found, "walk") < 0.02
    assert sum(found.parts.values()) == sum(fetch_split.on_cpu(i) for i in ioctls)


@requires("x86-64")
def test_re_arming_a_dirty_log_is_walking() -> None:
    """A dirty log that begins all dirty, on untouched memory: every page is looked up and protected."""
    if TDP_MMU.exists() and TDP_MMU.read_text().strip() == "Y":
        pytest.skip("missing feature: a CLEAR_DIRTY_LOG of unmapped memory that takes long (shadow paging)")
    for _ in range(3):  # 54 samples once said 0.89 on a busy machine: so few of them vary by more than 5 %
        said, events = work("clear-all", 128)
        found, ioctls, samples = together(events, kvm.CLEAR_DIRTY_LOG)
        assert len(ioctls) == said["calls"]
        if share(found, "walk") > 0.9:
            break
    assert share(found, "walk") > 0.9
    assert share(found, "copy") < 0.05
    if found.samples != "exact":
        assert samples > 30
        assert (found.walk_error or 0) < 0.15 * sum(found.parts.values())
        assert (found.flush_error or 0) > 0, "that no sample hit the flush does not mean that there was none"


def test_pages_of_the_rings_are_counted_exactly() -> None:
    run = undisturbed(Plan(log="ring", slots=4, passes=3, dirty_pages=300, vcpus=2))
    assert not any(fetch["missing"] or fetch["surplus"] for fetch in run.fetched), run.fetched
    log = run.breakdown.dirty_log
    assert log.mode == "ring"
    # The first fetch covers all memory and finds nothing dirty in the rings.
    assert [one.pages for one in log.passes] == [0, 300, 300]
    assert log.final is not None and log.final.pages == 300
    assert log.passes[1].dirty_pages_per_s is not None and log.passes[1].dirty_pages_per_s > 0


@pytest.mark.parametrize("log", ["legacy", "manual"])
def test_a_bitmap_tells_no_count_but_the_bytes_are_a_bound(log: str) -> None:
    run = undisturbed(Plan(log=log, passes=3, dirty_pages=200))
    log_rows = run.breakdown.dirty_log
    assert [one.pages for one in log_rows.passes] == [None] * 3
    assert all(one.pages_at_most is not None and 200 <= one.pages_at_most <= 203 for one in log_rows.passes[1:])


@pytest.mark.parametrize("spin", [False, True], ids=["asleep", "busy"])
def test_bitmap_work_is_told_on_and_off_the_cpu(spin: bool) -> None:
    run = undisturbed(Plan(delays={"fetch.user": 20 * MS}, spin=spin))
    final = run.breakdown.dirty_log.final
    assert final is not None and final.user_off_cpu_ns is not None
    assert final.user_ns >= 0.95 * run.injected["fetch.user"]
    if spin:  # another process can take its CPU: the thread's own CPU clock says for how long it had one
        assert final.user_ns - final.user_off_cpu_ns >= 0.95 * run.ran["fetch.user"] > 0
    else:
        assert final.user_off_cpu_ns >= 0.95 * run.injected["fetch.user"] - 0.2 * MS


def test_logging_is_switched_on_once_for_all_slots() -> None:
    run = migrate(Plan(slots=8))
    (on,) = run.breakdown.dirty_log.logging
    assert on.on and on.slots == 8 and on.kernel_ns > 0 and on.in_blackout_ns == 0
    assert on.begin < run.breakdown.dirty_log.passes[0].begin


def test_our_own_cost_in_the_window_is_between_its_bounds() -> None:
    state = migrate(Plan(delays={"memory.send": 30 * MS})).breakdown.completeness
    if state.observer_ns is None:
        pytest.skip("missing feature: run statistics of BPF programs")
    assert state.observer_window_ns is not None and state.observer_window_least_ns is not None
    assert 0 <= state.observer_window_least_ns <= state.observer_window_ns <= state.observer_ns
    assert state.observer_window_ns > 0


def test_tcp_says_that_a_slow_reader_held_it_up() -> None:
    said, events = work("slow-reader", 600)
    process = next(iter(split(Recording(header=Header(), events=events)).processes.values()))
    readings = [e for e in events if isinstance(e, TcpInfo) and e.socket == said["socket"]]
    assert len(readings) >= 3
    stretch = (readings[0].at_ns, readings[-1].at_ns)
    found = tcp_info.verdict(process, said["socket"], stretch, 0)
    assert found is not None
    assert found["rwnd_limited_us"] >= 0.8 * found["busy_us"]
    assert found["busy_us"] * 1000 >= 0.7 * said["ns"]
    assert found["sndbuf_limited_us"] <= 0.1 * found["busy_us"]
    assert found["resolution_us"] >= 1000 and found["busy_us"] % found["resolution_us"] == 0
    assert readings[-1].values["bytes_acked"] - said["bytes"] in (0, 1), "the witness of the bytes: the FIN's or SYN's"


def test_a_vcpu_kept_out_of_the_guest_is_told_stay_by_stay() -> None:
    said, events = work("outside", 12)
    spans = sorted((e for e in events if isinstance(e, VcpuSpan)), key=lambda e: e.since_ns)
    assert len(spans) >= len(said["stays"])
    close = 0
    for span, stay in zip(spans, said["stays"], strict=False):
        assert span.longest_ns >= stay, "its clock readings lie inside the stay"
        close += span.longest_ns - stay < 0.05 * stay + 0.2 * MS
    assert close >= 0.75 * len(said["stays"]), "on a busy host the thread loses the CPU between a reading and a call"


def test_sends_past_the_system_calls_are_seen_to_the_byte() -> None:
    said, events = work("spliced", 200)
    hidden = [e for e in events if isinstance(e, Transfer) and e.hidden]
    if not hidden:
        pytest.skip("missing feature: sock:sock_send_length and splice that passes it (Linux 6.5)")
    ours = [e for e in hidden if e.socket == said["socket"]]
    assert sum(e.bytes for e in ours) == said["bytes"]
    assert all(e.in_call_ns == 0 and e.off_cpu_ns == -1 for e in ours), "their duration is not known"
