# SPDX-License-Identifier: Apache-2.0
"""What a dirty-log ioctl did on the CPU: walk, flush, copy, other.

In: ioctls, and the stack samples taken inside them. Out: a split. It is exact if function probes measured it. Otherwise
it is estimated from the samples, with their number and an error for each class.

The innermost kernel function that has a class decides (Linux 5.10 to 7.2, x86 and arm64). `walk` is write-protecting
pages or clearing their dirty bits. `flush` is the TLB flush, including the wait for other CPUs. `copy` is copying the
bitmap to or from user space, including page faults. `other` is all else, such as scanning and clearing the bitmap.
Spinning for a lock is not work: it is left out here and reported as a wait.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import attrgetter

from ebpf_mig.breakdown import Split
from ebpf_mig.recording.events import Ioctl, Samples

CLASSES = ("walk", "flush", "copy", "other")
_LOCK = "lock"
_Z = 1.96
"""Two-sided 95 %."""

_RULES = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        (_LOCK, r"(native_|pv_|__pv_)?queued_(spin|read|write)_(un)?lock.*|__?mutex_lock.*|mutex_spin_on_owner|"
                r"mutex_optimistic_spin|osq_lock|rwsem_(down|optimistic|spin).*"),
        ("flush", r"kvm_(arch_)?flush_remote_tlbs.*|kvm_make_all_cpus_request.*|kvm_tlb_flush_vmid.*|"
                  r"hv_(common_)?flush_remote_tlb.*|smp_call_function_many.*|flush_tlb.*"),
        ("walk", r"kvm_arch_mmu_enable_log_dirty_pt_masked|kvm_mmu_write_protect_pt_masked|"
                 r"kvm_mmu_clear_dirty_pt_masked|kvm_mmu_slot_.*|_*rmap_(write_protect|clear_dirty)|"
                 r"clear_dirty_(pt_masked|gfn_range)|kvm_tdp_mmu_.*|tdp_mmu_.*|kvm_reset_dirty_gfn|spte_write_protect|"
                 r"drop_large_spte|slot_rmap_.*|kvm_(stage2|pgtable)_.*|kvm_mmu_wp_memory_region|stage2_wp_range"),
        ("copy", r"_*copy_(to|from)_user.*|copy_user_.*|_*arch_copy_(to|from)_user|rep_(movs|stos)_alternative|"
                 r"raw_copy_(to|from)_user|_*clear_user.*|rep_movs.*"),
    )
)  # fmt: skip


def class_of(stack: Sequence[str]) -> str:
    """The class of one stack, which is given innermost function first; `lock` for spinning."""
    for frame in stack:
        function = frame.split(".")[0].split("+")[0]
        for name, pattern in _RULES:
            if pattern.fullmatch(function):
                return name
    return "other"


def on_cpu(ioctl: Ioctl) -> int:
    """Time that the call worked on the CPU, in ns, without known time off the CPU or spinning for a lock."""
    idle = max(0, ioctl.off_cpu_ns) + max(0, ioctl.spin_ns)
    return max(0, ioctl.end_ns - ioctl.begin_ns - idle)


def by_ioctl(samples: Iterable[Samples]) -> dict[tuple[int, int], list[Samples]]:
    """Samples by (tid, begin) of their ioctl."""
    found: dict[tuple[int, int], list[Samples]] = defaultdict(list)
    for sample in samples:
        if sample.period_ns > 0 and sample.count > 0:
            found[sample.tid, sample.begin_ns].append(sample)
    return found


def split(ioctls: Sequence[Ioctl], samples: dict[tuple[int, int], list[Samples]]) -> Split | None:
    """What these ioctls did on the CPU, in ns by class; None if unknown.

    `samples` comes from `by_ioctl`. An estimated split has errors from Wilson's interval. They are not 0 even for a
    class without samples.
    """
    if not ioctls:
        return None
    if all(i.walk_ns >= 0 and i.flush_ns >= 0 and i.copy_ns >= 0 for i in ioctls):
        worked = sum(on_cpu(ioctl) for ioctl in ioctls)
        walk, flush, copy = (sum(map(attrgetter(name), ioctls)) for name in ("walk_ns", "flush_ns", "copy_ns"))
        return Split(walk=walk, flush=flush, copy=copy, other=max(0, worked - walk - flush - copy), samples="exact")
    found = [sample for i in ioctls for sample in samples.get((i.tid, i.begin_ns), ())] if samples else []
    return _estimate(sum(on_cpu(ioctl) for ioctl in ioctls), found) if found else None


def _estimate(worked: int, found: Iterable[Samples]) -> Split | None:
    """An estimate from samples. Each is weighted with its period, because the rate may have changed."""
    weight: dict[str, int] = dict.fromkeys(CLASSES, 0)
    count = squares = 0
    for sample in found:
        name = class_of(sample.stack)
        if name == _LOCK:
            continue
        weight[name] += sample.count * sample.period_ns
        squares += sample.count * sample.period_ns**2
        count += sample.count
    total = sum(weight.values())
    if not total:
        return None
    parts = {name: worked * weight[name] // total for name in CLASSES[:-1]}
    parts["other"] = worked - sum(parts.values())
    errors = {
        f"{name}_error": math.ceil(worked * _error(weight[name] / total, total * total / squares)) for name in CLASSES
    }
    return Split(**parts, **errors, samples=count)


def _error(share: float, effective: float) -> float:
    """The distance from `share` to the farther end of Wilson's interval, for `effective` equally weighted samples."""
    z2 = _Z * _Z / effective
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / effective + z2 / (4 * effective))
    return max(middle + half - share, share - (middle - half))
