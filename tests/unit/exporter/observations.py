# SPDX-License-Identifier: Apache-2.0
"""Observations and a status, as the watch reports them."""

from __future__ import annotations

import time
from typing import Any

from ebpf_mig.breakdown import PHASES
from ebpf_mig.exporter.observation import Observation, Status


def observation(**changes: Any) -> Observation:
    """A complete migration of both sides, with every figure set."""
    values: dict[str, Any] = {
        "at": time.time(),
        "recording": "20260101T000000.000Z-1.rec",
        "vmm": "qemu",
        "vm": "vm1",
        "role": "both",
        "result": "completed",
        "trigger": "connect",
        "blackout_ns": 12_345_678,
        "window_ns": 20_000_000,
        "phases": {phase: 1_000_000 for phase, _ in PHASES},
        "fetch": {
            "precopy": {"kernel": 1000, "user": 2000},
            "blackout": {"lock": 1, "off_cpu": 2, "kernel": 3, "user": 4},
        },
        "send": {"copy": 5, "blocked": 6},
        "final_bytes": 4096,
        "verdict": "complete",
        "reasons": [],
        "lost": {},
        "migration": "0123456789abcdef0123456789abcdef",
        "source_ns": 7_000_000,
        "until_state_ns": 6_000_000,
        "destination_ns": 5_000_000,
        "stopped_at_ns": 1_767_268_800_000_000_000,
        "started_at_ns": 1_767_268_800_012_345_678,
    }
    return Observation(**(values | changes))


def status(**changes: Any) -> Status:
    """A watch that is idle, its probes attached."""
    values: dict[str, Any] = {
        "vms": 2,
        "armed": False,
        "armed_seconds": 1.5,
        "triggers": {"born": {"nothing": 2}, "connect": {"migration": 1}},
        "delays": [2, 0, 1, 0, 0, 0, 0, 1],
        "delay_seconds": 1.02,
        "attached": {"task_newtask": True, "inet_sock_set_state": True},
        "trigger": "signs",
        "lost": {"sign": 0},
        "run_seconds": {"on_sys_enter": 0.25},
        "errors": {"vm": 1, "recording": 0},
        "limits": {"traced": 4},
        "recordings": 1,
        "recording_bytes": 1000,
    }
    return Status(**(values | changes))
