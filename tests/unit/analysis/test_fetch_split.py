# SPDX-License-Identifier: Apache-2.0
"""Stacks to classes, and samples to shares with their errors; the intervals are worked out by hand."""

from __future__ import annotations

import math

import pytest

from ebpf_mig.analysis import fetch_split
from ebpf_mig.linux import kvm
from ebpf_mig.recording.events import Ioctl, Samples

TAIL = ("kvm_vm_ioctl", "__x64_sys_ioctl", "do_syscall_64", "entry_SYSCALL_64_after_hwframe")
COPY = ("_copy_to_user", "kvm_get_dirty_log_protect", *TAIL)
WALK = ("rmap_write_protect", "kvm_arch_mmu_enable_log_dirty_pt_masked", "kvm_clear_dirty_log_protect", *TAIL)


@pytest.mark.parametrize(
    ("expected", "stack"),
    [
        ("copy", COPY),
        ("walk", WALK),
        ("copy", ("clear_page_erms", "handle_mm_fault", "asm_exc_page_fault", "rep_movs_alternative", *COPY)),
        ("walk", ("clear_dirty_pt_masked.isra.0", "kvm_tdp_mmu_clear_dirty_pt_masked", *TAIL)),
        ("walk", ("kvm_reset_dirty_gfn.part.0", "kvm_dirty_ring_reset", *TAIL)),
        ("flush", ("smp_call_function_many_cond", "kvm_make_all_cpus_request", "kvm_flush_remote_tlbs", *TAIL)),
        ("flush", ("kvm_flush_remote_tlbs_memslot", "kvm_clear_dirty_log_protect", *TAIL)),
        ("lock", ("native_queued_spin_lock_slowpath", "queued_write_lock_slowpath", "kvm_get_dirty_log_protect")),
        ("lock", ("mutex_spin_on_owner", "__mutex_lock.constprop.0", *TAIL)),
        ("other", ("kvm_get_dirty_log_protect", *TAIL)),
        ("other", ("memset_orig", "kvm_get_dirty_log_protect", *TAIL)),
        ("other", ()),
    ],
)
def test_the_innermost_function_with_a_class_decides(expected: str, stack: tuple[str, ...]) -> None:
    assert fetch_split.class_of(stack) == expected


def ioctl(begin: int, took: int, **more: int) -> Ioctl:
    return Ioctl(begin, begin + took, 1, 2, 3, kvm.CLEAR_DIRTY_LOG, 0, **more)


def of(begin: int, stack: tuple[str, ...], count: int, period: int = 100_000) -> Samples:
    return Samples(begin, 1, 2, period, count, stack)


def test_shares_of_samples_become_time_on_the_cpu() -> None:
    """3 of 4 samples are in the walk. Of 10 ms, 2 ms are sleep and 1 ms is spinning; 7 ms are split."""
    call = ioctl(50, 10_000_000, off_cpu_ns=2_000_000, spin_ns=1_000_000)
    found = fetch_split.split([call], fetch_split.by_ioctl([of(50, WALK, 75), of(50, COPY, 25)]))
    assert found is not None
    assert (found.walk, found.copy, found.flush, found.other) == (5_250_000, 1_750_000, 0, 0)
    assert found.samples == 100
    # Wilson, z 1.96, n 100: p 0.75 lies in [0.6570, 0.8245], p 0 in [0, 0.0370].
    assert found.walk_error == pytest.approx(7_000_000 * (0.75 - 0.6570), rel=0.01)
    assert found.flush_error == pytest.approx(7_000_000 * 0.0370, rel=0.01)


def test_samples_of_another_rate_count_by_their_period() -> None:
    """9 samples of 0.1 ms and 1 sample of 0.9 ms stand for equal times."""
    call = ioctl(50, 2_000_000)
    found = fetch_split.split([call], fetch_split.by_ioctl([of(50, WALK, 9), of(50, COPY, 1, 900_000)]))
    assert found is not None
    assert found.walk == found.copy == 1_000_000
    assert found.samples == 10
    # Because of the weight of the one slow sample, all count as 18^2 / (9 + 81) = 3.6 equal samples.
    z2 = 1.96**2 / 3.6
    half = 1.96 / (1 + z2) * math.sqrt(0.25 / 3.6 + z2 / 4 / 3.6)
    assert found.walk_error == pytest.approx(2_000_000 * half, rel=0.001)


def test_spinning_for_a_lock_is_no_work() -> None:
    spin = ("queued_write_lock_slowpath", *TAIL)
    found = fetch_split.split([ioctl(50, 1000)], fetch_split.by_ioctl([of(50, spin, 99), of(50, COPY, 1)]))
    assert found is not None and found.copy == 1000 and found.samples == 1
    assert fetch_split.split([ioctl(50, 1000)], fetch_split.by_ioctl([of(50, spin, 99)])) is None


def test_several_ioctls_are_taken_together_and_strangers_left_out() -> None:
    calls = [ioctl(50, 1000), ioctl(5000, 3000)]
    samples = fetch_split.by_ioctl([of(50, COPY, 1), of(5000, WALK, 3), of(9000, WALK, 7)])
    found = fetch_split.split(calls, samples)
    assert found is not None and (found.copy, found.walk, found.samples) == (1000, 3000, 4)


@pytest.mark.parametrize("bad", [of(50, COPY, 0), of(50, COPY, 3, 0), of(50, COPY, -1), of(50, COPY, 1, -5)])
def test_samples_that_make_no_sense_are_none(bad: Samples) -> None:
    assert fetch_split.split([ioctl(50, 1000)], fetch_split.by_ioctl([bad])) is None


def test_nothing_is_known_without_samples_or_probes() -> None:
    assert fetch_split.split([], {}) is None
    assert fetch_split.split([ioctl(50, 1000)], {}) is None
    mixed = [ioctl(50, 1000, walk_ns=1, flush_ns=1, copy_ns=1), ioctl(5000, 1000)]
    assert fetch_split.split(mixed, {}) is None, "exact times for one of two ioctls are not enough"
