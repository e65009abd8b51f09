# SPDX-License-Identifier: Apache-2.0
"""The watch's own accounts."""

from __future__ import annotations

import pytest

from ebpf_mig.exporter.accounts import Accounts
from ebpf_mig.exporter.observation import DELAYS_S


def test_time_armed_is_added_up() -> None:
    accounts = Accounts()
    assert (accounts.armed, accounts.armed_s(5.0)) == (False, 0.0)
    accounts.arm(10.0)
    assert (accounts.armed, accounts.armed_s(12.5)) == (True, 2.5)
    accounts.disarm(13.0)
    accounts.arm(20.0)
    assert accounts.armed_s(21.0) == 4.0
    accounts.disarm(21.0)
    assert (accounts.armed, accounts.armed_s(99.0)) == (False, 4.0)


def test_each_migration_gets_what_came_since_the_one_before() -> None:
    accounts = Accounts()
    assert accounts.since_last(({"ioctl": 2}, {"send": 1}), {"on_ioctl": 700}) == (
        {"ioctl": 2},
        {"send": 1},
        {"on_ioctl": 700},
    )
    assert accounts.since_last(({"ioctl": 2, "send": 3}, {"send": 1}), {"on_ioctl": 900}) == (
        {"send": 3},
        {},
        {"on_ioctl": 200},
    )
    assert (accounts.lost, accounts.run_ns) == ({"ioctl": 2, "send": 3}, {"on_ioctl": 900})


def test_delays_are_counted_in_their_buckets() -> None:
    accounts = Accounts()
    for seconds in (DELAYS_S[0], DELAYS_S[0] + 0.001, 60.0):
        accounts.delayed(seconds)
    assert accounts.delays[:2] == [1, 1] and accounts.delays[-1] == 1 and sum(accounts.delays) == 3
    assert accounts.delay_s == pytest.approx(2 * DELAYS_S[0] + 60.001)
