# SPDX-License-Identifier: Apache-2.0
"""Firecracker's own times of its calls: what lies in each, what lies in none, and what is left out if one is missing.

The kernel's events are those of another VMM: the guest stops at 0.040 ms and runs at 52.400 ms.
"""

from __future__ import annotations

import pytest

from ebpf_mig.breakdown import Witness
from ebpf_mig.vmm.firecracker.witness import SUM
from tests.unit.scripts import cloud_hypervisor_53

LOGGED = {"pause_vm": 900, "full_create_snapshot": 20_000, "load_snapshot": 8_000, "vmm_full_create_snapshot": 19_000}
CALLS = {"pause": (-1000, 100), "create": (200, 20_300), "load": (45_000, 53_000)}


def rows(logged: dict[str, int], calls: dict[str, tuple[int, int]]) -> dict[str, Witness]:
    script = cloud_hypervisor_53()
    for call, (begin, end) in calls.items():
        script.mark(begin, 1000, f"firecracker.API.{call}.begin")
        script.mark(end, 1000, f"firecracker.API.{call}.end")
    for name, us in logged.items():
        script.mark(60_000, 1000, f"firecracker.{name}_us", us)
    return {w.name: w for w in script.result().breakdown.witnesses if w.name.startswith("firecracker.")}


def test_each_call_beside_the_callers_time() -> None:
    found = rows(LOGGED, CALLS)
    create = found["firecracker.full_create_snapshot_us"]
    assert (create.value_ns, create.difference_ns) == (20_000_000, -100_000)
    assert create.span is not None and create.span[1] - create.span[0] == 20_100_000
    assert create.explanation.endswith("its main thread counts 19.000")
    assert "state.save" in create.explanation and "state.load" not in create.explanation
    pause = found["firecracker.pause_vm_us"]
    assert pause.difference_ns == 900_000 - 1_100_000
    assert "1.000 before the kick or after the start" in pause.explanation
    load = found["firecracker.load_snapshot_us"]
    assert "0.600 before the kick or after the start" in load.explanation and "state.load" in load.explanation


def test_all_calls_beside_the_blackout() -> None:
    whole = rows(LOGGED, CALLS)[SUM]
    assert whole.value_ns == 28_900_000 and whole.value_ns - whole.difference_ns == 52_360_000
    assert whole.explanation.startswith("its calls together; 24.800 of the blackout lies in none of them: ")
    assert "handover 24.700" in whole.explanation


@pytest.mark.parametrize("missing", ["pause_vm", "full_create_snapshot", "load_snapshot"])
def test_no_sum_of_some_of_the_calls(missing: str) -> None:
    found = rows({name: us for name, us in LOGGED.items() if name != missing}, CALLS)
    assert SUM not in found and f"firecracker.{missing}_us" not in found and len(found) == 2


def test_a_diff_and_what_has_no_span() -> None:
    found = rows({"diff_create_snapshot": 20_000, "resume_vm": 5}, CALLS)
    assert list(found) == ["firecracker.diff_create_snapshot_us"]
    assert rows(LOGGED, {}) == {} and rows({}, CALLS) == {}
