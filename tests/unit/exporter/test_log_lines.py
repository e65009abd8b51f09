# SPDX-License-Identifier: Apache-2.0
"""A line for each migration that a log collector can take apart, whatever a tenant named the VM."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from ebpf_mig.exporter.log_lines import log_line
from ebpf_mig.exporter.metrics import vm_label
from tests.unit.exporter.observations import observation
from tests.unit.exporter.test_metrics import HOSTILE


def taken_apart(line: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in shlex.split(line))


def test_logfmt_and_json_say_the_same() -> None:
    seen = observation(at=1_767_268_800.25, phases={"memory.send": 3_000_000, "handover": 9_000_400, "resume": 0})
    line = log_line(seen, "vm1", "logfmt")
    assert line.startswith("time=2026-01-01T12:00:00.250Z level=info msg=migration vm=vm1 ")
    found = json.loads(log_line(seen, "vm1", "json"))
    assert {name: str(value) for name, value in found.items()} == taken_apart(line)
    assert (found["downtime_ms"], found["source_ms"], found["destination_ms"]) == (12.346, 7.0, 5.0)
    assert (found["mostly"], found["mostly_ms"]) == ("handover", 9.0)
    assert (found["result"], found["role"], found["recording"]) == ("completed", "both", seen.recording)


def test_what_was_not_measured_has_no_field() -> None:
    seen = observation(blackout_ns=None, destination_ns=None, phases={}, recording="", migration="")
    found = taken_apart(log_line(seen, "", "logfmt"))
    assert not found.keys() & {"downtime_ms", "destination_ms", "mostly", "recording", "migration", "vm"}
    assert found["source_ms"] == "7.0"


@pytest.mark.parametrize("change", [{"result": "failed"}, {"result": "unknown"}, {"verdict": "incomplete"}])
def test_what_went_wrong_is_a_warning(change: dict[str, str]) -> None:
    assert json.loads(log_line(observation(**change), "vm", "json"))["level"] == "warning"
    assert json.loads(log_line(observation(verdict="bounded"), "vm", "json"))["level"] == "info"


@pytest.mark.parametrize("name", [*HOSTILE, "a level=error", "x\nlevel=error msg=forged", "vm one"])
def test_a_name_cannot_forge_a_line_or_a_field(name: str) -> None:
    shown = vm_label(name, "name")
    for form in ("logfmt", "json"):
        line = log_line(observation(), shown, form)
        assert "\n" not in line and line.isprintable()
    assert json.loads(line)["level"] == "info" and json.loads(line).get("vm", "") == shown
    keys = re.findall(r'(\w+)=(?:"(?:[^"\\]|\\.)*"|\S+)', log_line(observation(), shown, "logfmt"))
    assert keys.count("level") == keys.count("msg") == keys.count("vm") == 1


def test_the_diagnosis_stands_on_the_line() -> None:
    seen = observation(diagnosis="mostly handover (84 %): x")
    assert ' diagnosis="mostly handover (84 %): x" ' in log_line(seen, "vm", "logfmt")
