# SPDX-License-Identifier: Apache-2.0
"""A destination started with `-S`, which its manager resumes long after the load, as libvirt does.

Traced alone, it has the same state.load and resume as when traced with the source. The test makes the wait, so its
length is known.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from ebpf_mig.analysis.wire import DELAYED_ACK_NS
from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import Recording
from ebpf_mig.recording.kinds import pid_of
from ebpf_mig.vmm.base import Migration
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import TRACING, requires
from tests.integration import migrations

pytestmark = requires(*TRACING)

SLACK_NS = 200_000


class WaitingPair(QemuPair):
    """The destination waits for `cont`, and has a second monitor for that."""

    def _command(self, role: str, qmp: Path) -> list[str]:
        more = ["-S", "-qmp", f"unix:{qmp}.second,server=on,wait=off"] if role == "destination" else []
        return super()._command(role, qmp) + more


class Manager:
    """A minimal QMP client, because a witness must not be the product's own adapter."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._lines = self._socket.makefile()
        self._lines.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str) -> Any:
        self._socket.sendall(json.dumps({"execute": command}).encode())
        while "return" not in (answer := json.loads(self._lines.readline())):
            pass
        return answer["return"]

    def wait_for(self, event: str) -> None:
        while json.loads(self._lines.readline()).get("event") != event:
            pass

    def wait_loaded(self) -> None:
        while self.execute("query-migrate").get("status") != "completed":
            time.sleep(0.002)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def alone(recording: Recording, pid: int) -> Breakdown:
    """The breakdown that a recorder of only that process would have made."""
    header = structs.replace(recording.header, targets=[t for t in recording.header.targets if t.pid == pid])
    events = [e for e in recording.events if pid_of(e) in (None, pid) and getattr(e, "pid", pid) == pid]
    return analyse(structs.replace(recording, header=header, events=events)).breakdown


TRIES = 6
"""Migrations, until TCP holds nothing back."""


@pytest.mark.parametrize("wait_s", [0.05, 0.5])
def test_alone_as_beside_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_s: float) -> None:
    def let_go(pair: QemuPair, _: Migration) -> None:
        manager = Manager(f"{pair.destination.qmp}.second")
        manager.wait_loaded()
        time.sleep(wait_s)
        manager.execute("cont")
        time.sleep(0.2)
        manager.close()

    monkeypatch.setattr(migrations, "QemuPair", WaitingPair)
    for number in range(TRIES):
        directory = tmp_path / str(number)
        directory.mkdir()
        run = migrations.migrate(directory, meddle=let_go)
        both = run.breakdown
        assert both.blackout_ns is not None
        one = alone(run.recording, run.recording.header.targets[1].pid)
        if (one.phase_ns("handover") or 0) < DELAYED_ACK_NS:
            break
        # When that data was sent is not known on the destination: docs/concepts.md.
        sys.stdout.write(f"try {number + 1}: TCP held the last data back for a delayed acknowledgement\n")
    load, resume = one.phase_ns("state.load"), one.phase_ns("resume")
    beside = both.phase_ns("state.load"), both.phase_ns("resume")
    assert load is not None and resume is not None and beside[0] is not None and beside[1] is not None
    assert abs(resume - beside[1]) <= max(SLACK_NS, beside[1] // 20)
    assert abs(load - beside[0]) <= max(SLACK_NS, beside[0] // 20)
    waited = one.phase_ns("management"), both.phase_ns("management")
    assert waited[0] is not None and waited[1] is not None
    assert abs(waited[0] - waited[1]) <= SLACK_NS
    assert waited[0] >= wait_s * 1e9 - SLACK_NS
