# SPDX-License-Identifier: Apache-2.0
"""The JSON report: names and order of the public schema, and text that is safe to print."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.report.json import render
from tests.unit import breakdowns


def shape(value: Any) -> Any:
    """The keys of a JSON value, in order; of a list, those of its first element."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [shape(value[0])]
    return None


def test_names_and_order_of_the_schema() -> None:
    assert json.dumps(shape(json.loads(render(breakdowns.precopy())))) == json.dumps(
        {
            "schema": None,
            "migration": {
                "vmm": None,
                "vmm_version": None,
                "mode": None,
                "transport": None,
                "connections": None,
                "result": None,
                "source": {"host": None, "pid": None},
                "destination": {"host": None, "pid": None},
                "total_ns": None,
                "paused_before": None,
                "paused_after": None,
                "stopped_early": None,
                "through": None,
                "pairing": None,
            },
            "window_ns": None,
            "blackout_ns": None,
            "blackout": None,
            "phases": [{"phase": None, "side": None, "duration_ns": None, "spans": None, "bound_ns": None}],
            "vcpus": [
                {"vcpu": None, "kick_ns": None, "stop": None, "start": None, "blackout_ns": None, "bound_ns": None}
            ],
            "dirty_log": {
                "mode": None,
                "slots": [{"slot": None, "base": None, "size_bytes": None}],
                "passes": [
                    {
                        "begin": None,
                        "kernel_ns": None,
                        "user_ns": None,
                        "pages": None,
                        "bytes": None,
                        "send_ns": None,
                        "blocked_ns": None,
                        "dirty_pages_per_s": None,
                        "pages_at_most": None,
                        "user_off_cpu_ns": None,
                        "split": None,
                        "brownout": None,
                        "baseline": None,
                        "tcp_info": None,
                    }
                ],
                "final": {
                    "kernel_ns": None,
                    "user_ns": None,
                    "pages": None,
                    "bytes": None,
                    "send_ns": None,
                    "user_off_cpu_ns": None,
                    "split": None,
                    "rearm": None,
                },
                "fetches": [
                    {
                        "begin": None,
                        "end": None,
                        "kernel_ns": None,
                        "ioctls": [
                            {
                                "ioctl": None,
                                "slot": None,
                                "begin": None,
                                "duration_ns": None,
                                "lock_wait_ns": None,
                                "off_cpu_ns": None,
                                "split": None,
                            }
                        ],
                        "split": None,
                    }
                ],
                "logging": None,
            },
            "sockets": [
                {
                    "role": None,
                    "bytes": None,
                    "calls": None,
                    "copy_ns": None,
                    "blocked_ns": None,
                    "between_ns": None,
                    "in_call_ns": None,
                    "local": None,
                    "remote": None,
                    "tcp_info": None,
                }
            ],
            "wire": None,
            "waits": None,
            "witnesses": [
                {
                    "name": None,
                    "value_ns": None,
                    "difference_ns": None,
                    "explanation": None,
                    "span": None,
                    "doubt_ns": None,
                }
            ],
            "completeness": {
                "verdict": None,
                "lost": {},
                "unpaired": {"ioctl": None},
                "attach": {"dirty_log": None, "vcpu": None, "socket": None},
                "observer_ns": None,
                "reasons": None,
                "observer_window_ns": None,
                "observer_window_least_ns": None,
                "observer_window_estimate_ns": None,
                "observer_phases_ns": None,
                "tracing": None,
            },
            "clock": {
                "offset_ns": None,
                "bound_ns": None,
                "open": None,
                "drift_ppb": None,
                "pairs_there": None,
                "pairs_back": None,
            },
            "notes": None,
            "window_bound_ns": None,
            "what_if": None,
            "pausing": None,
            "postcopy": None,
            "page_faults": None,
            "live_update": None,
            "throttled": None,
            "management": None,
            "diagnosis": None,
            "stolen": None,
            "hops": None,
        }
    )


def test_first_lines_and_exact_integers() -> None:
    text = render(breakdowns.precopy())
    assert text.startswith('{\n  "schema": "ebpf-mig/breakdown/1",\n  "migration": {\n    "vmm": "QEMU",\n')
    assert text.endswith("}\n")
    value = json.loads(text)
    assert value["blackout_ns"] == 42_700_000
    assert value["phases"][2] == {
        "phase": "fetch.kernel",
        "side": "source",
        "duration_ns": 1_200_000,
        "spans": [[722_000, 1_622_000], [1_722_000, 2_022_000]],
        "bound_ns": 0,
    }
    assert sum(phase["duration_ns"] for phase in value["phases"]) == value["window_ns"]


def test_what_was_not_measured_is_present_and_null() -> None:
    value = json.loads(render(breakdowns.cancelled_early()))
    assert value["window_ns"] is value["blackout_ns"] is value["blackout"] is None
    assert value["wire"] is value["waits"] is value["dirty_log"]["final"] is None
    assert len(value["phases"]) == 14


def test_it_reads_back_as_the_same_breakdown() -> None:
    for make in (breakdowns.precopy, breakdowns.many_vcpus, breakdowns.cancelled_early, breakdowns.aborted):
        assert msgspec.json.decode(render(make()), type=Breakdown) == make()


def test_no_escape_reaches_a_terminal() -> None:
    evil = "\x1b[2J\x9b31m\u202e\x7f東"
    text = render(msgspec.structs.replace(breakdowns.precopy(), notes=[evil]))
    assert text.replace("\n", "").replace("\x7f", "").isprintable()
    assert text.isascii()
    assert json.loads(text)["notes"] == [evil]
