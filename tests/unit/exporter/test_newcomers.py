# SPDX-License-Identifier: Apache-2.0
"""When new processes are looked at."""

from __future__ import annotations

from ebpf_mig.exporter.newcomers import CHECKS, RECHECKS_S, Newcomers


def test_a_process_is_looked_at_several_times_each_once() -> None:
    newcomers = Newcomers()
    assert newcomers.wait_ms(100.0, 1000) == 1000
    assert newcomers.add(7, 100.0)
    assert newcomers.due(100.0) == set()
    assert newcomers.due(100.0 + newcomers.wait_ms(100.0, 1000) / 1000 + 0.001) == {7}, "it is waited for the look"
    assert all(newcomers.due(100.0 + wait) == {7} for wait in RECHECKS_S[1:])
    assert newcomers.due(200.0) == set()


def test_a_vm_is_no_longer_looked_at() -> None:
    newcomers = Newcomers()
    assert newcomers.add(7, 100.0) and newcomers.add(8, 100.0)
    newcomers.drop(7)
    assert newcomers.due(200.0) == {8}


def test_pending_looks_are_limited() -> None:
    newcomers = Newcomers()
    added = sum(newcomers.add(pid, 100.0) for pid in range(CHECKS))
    assert CHECKS <= added * len(RECHECKS_S) < CHECKS + len(RECHECKS_S)
    assert newcomers.due(200.0) and newcomers.add(1, 200.0)
