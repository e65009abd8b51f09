# SPDX-License-Identifier: Apache-2.0
"""Source and destination are identified by what they did."""

from __future__ import annotations

import pytest

from ebpf_mig.analysis.material import split
from ebpf_mig.analysis.roles import assign
from tests.unit import scripts
from tests.unit.script import Script


def pids(script: Script) -> tuple[int | None, int | None]:
    source, destination, _ = assign(split(script.recording).processes.values())
    return source.pid if source else None, destination.pid if destination else None


def unhinted(script: Script) -> Script:
    for vm in script.vms:
        vm.role = "unknown"
    return script


@pytest.mark.parametrize("make", [scripts.qemu_7_2, scripts.cloud_hypervisor_local, scripts.dirty_ring])
def test_one_process_alone(make: type) -> None:
    for keep, expected in ((1000, (1000, None)), (2000, (None, 2000))):
        script = unhinted(make())
        script.vms = [vm for vm in script.vms if vm.pid == keep]
        assert pids(script) == expected


def test_a_source_traced_since_its_boot_fetched_the_log() -> None:
    """Its registers were set before its guest first ran, as a destination's are."""
    script = Script()
    vm = script.vm(1000, "unknown")
    vm.ioctls(scripts.WRITES, -900_000, -899_000, tid=100)
    vm.entered(-898_000)
    vm.last(entered=5000, left=4990, end=9000)
    vm.gets(0)
    assert pids(script) == (1000, None)


def test_a_source_traced_since_its_boot_stopped_in_the_end() -> None:
    """The same without dirty logging: a local migration. The destination goes on running."""
    script = Script()
    source, destination = script.vm(1000, "unknown"), script.vm(2000, "unknown")
    for vm, us in ((source, -900_000), (destination, 1000)):
        vm.ioctls(scripts.WRITES, us, us + 500, tid=100)
        vm.entered(us + 600)
    source.interrupted(0)
    destination.last(entered=5000, left=4990, end=9000)
    assert pids(script) == (1000, 2000)


def test_a_display_on_the_destination_is_fetched_too() -> None:
    script = unhinted(scripts.qemu_7_2())
    script.vms[1].logging(-500_000, [(7, 16 << 20)])
    for us in (-200_000, 0, 20_000):
        script.vms[1].gets(us, [7])
    assert pids(script) == (1000, 2000)


def test_hints_decide_without_events() -> None:
    script = Script()
    script.vm(1, "destination")
    script.vm(2, "source")
    assert pids(script) == (2, 1)


def test_no_hints_and_no_events() -> None:
    script = Script()
    script.vm(1, "unknown")
    assert pids(script) == (None, None)
