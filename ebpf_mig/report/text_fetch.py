# SPDX-License-Identifier: Apache-2.0
"""Lines of the terminal report on where a fetch spent its time, and on what the passes cost the guest.

In: parts of a breakdown. Out: rows, only for what is significant; the other formats have everything.
"""

from __future__ import annotations

from collections.abc import Iterator

from ebpf_mig.breakdown import Breakdown, Pass, VcpuShare
from ebpf_mig.report.reference import REARM
from ebpf_mig.report.rows import Row, figure, ms

_REPORTED_SHARE = 100
"""Parts that take less than this share of the window are only in the other formats."""


def inside(breakdown: Breakdown) -> Iterator[Row]:
    """What the final fetch did inside its ioctls, and which part was avoidable."""
    final = breakdown.dirty_log.final
    if final is None:
        return
    if (split := final.split) is not None:
        parts = split.parts
        total = sum(parts.values()) or 1
        shares = ", ".join(f"{name} {100 * ns / total:.0f}%" for name, ns in parts.items() if 200 * ns >= total)
        error = max(error or 0 for error in split.errors.values())
        how = "exact" if split.samples == "exact" else f"±{100 * error / total:.0f}, n={split.samples}"
        yield figure("on CPU in ioctls", sum(parts.values()), f"{shares} ({how})")._replace(spare=2)
    rearm, window = final.rearm, breakdown.window_ns or 0
    if rearm is not None and rearm.ns * _REPORTED_SHARE >= window:
        doubt = f" ±{ms(rearm.error_ns)}" if rearm.error_ns else ""
        rate = f"{rearm.ms_per_gib:.3g} ms/GiB, {rearm.ns_per_page:.3g} ns/page"
        published = "; ".join(f"{r.short} {r.figure}" for r in REARM if r.short)
        yield figure("re-arming", rearm.ns, f"avoidable: {rate}{doubt}")
        yield Row("", f"for comparison: {published}", verbose=True)


def brownout(passes: list[Pass]) -> Iterator[Row]:
    """The pass in which a vCPU lost the largest share of its time, if it was over 1 %; with its share before
    logging.
    """
    worst: tuple[float, VcpuShare, Pass] | None = None
    for one in passes:
        for vcpu in one.brownout.vcpus if one.brownout else ():
            share = vcpu.outside_ns / max(1, one.brownout.duration_ns if one.brownout else 1)
            if worst is None or share > worst[0]:
                worst = share, vcpu, one
    if worst is None or worst[0] < 1 / _REPORTED_SHARE:
        return
    share, vcpu, one = worst
    before = next((v for v in one.baseline.vcpus if v.vcpu == vcpu.vcpu), None) if one.baseline else None
    was = ""
    if before is not None and one.baseline is not None and one.baseline.duration_ns:
        was = f"; before {100 * before.outside_ns / one.baseline.duration_ns:.1f}%"
    text = f"vCPU {vcpu.vcpu} out {100 * share:.1f}%, longest {ms(vcpu.longest_gap_ns)}{was}"
    yield figure("brownout", vcpu.outside_ns, text)._replace(spare=3)


def tcp(info: dict[str, int] | None) -> str:
    """What limited TCP for at least a tenth of its busy time, and retransmissions; empty if neither."""
    if not info:
        return ""
    busy = info.get("busy_us", 0)
    clauses = [
        f"{name}-limited {limited // 1000} of {busy // 1000} ms busy"
        for name in ("rwnd", "sndbuf")
        if (limited := info.get(f"{name}_limited_us", 0)) and limited * 10 >= busy
    ]
    if retransmits := info.get("retransmits", 0):
        clauses.append(f"{retransmits} retransmit{'s' if retransmits > 1 else ''}")
    doubt = f" (± {info.get('resolution_us', 0) // 1000} ms)" if clauses and info.get("resolution_us") else ""
    over = round((info["until"] - info["from"]) / 1e6)
    return f"TCP in {over} ms: {', '.join(clauses)}{doubt}" if clauses else ""
