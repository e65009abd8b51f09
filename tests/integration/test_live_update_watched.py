# SPDX-License-Identifier: Apache-2.0
"""`watch` and `exporter` beside live updates that somebody else triggers. The witness is the guest's heartbeat.

EBPF_MIG_UPDATES is the number of rounds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import read_recording
from tests.conftest import TRACING, requires
from tests.integration.exporters import OURS, PROGRAM, SETTLED_S, exporter, running, until, value
from tests.integration.live_updates import Vm, require_live_update, vm

pytestmark = requires(*TRACING)

ROUNDS = int(os.environ.get("EBPF_MIG_UPDATES", "2"))


def by_transfer(guest: Vm) -> None:
    guest.await_transfer()
    time.sleep(0.5)
    guest.transfer()
    guest.until(lambda: guest.beats["destination"].beats)


def whole(path: Path, beats: list[int]) -> Breakdown:
    analysis = analyse(read_recording(path))
    b = analysis.breakdown
    assert (b.migration.mode, b.migration.result) == ("cpr", "completed")
    assert sum(p.duration_ns or 0 for p in b.phases) == (b.window_ns or 0)
    assert next(p.duration_ns or 0 for p in b.phases if p.phase == "unattributed") <= 0.02 * (b.window_ns or 0)
    if b.blackout_ns is None:
        return b
    begin = analysis.origin_ns + max(v.stop for v in b.vcpus if v.stop is not None)
    assert not [at for at in beats if begin + 1_000_000 < at < begin + b.blackout_ns], "a beat in the blackout"
    return b


@pytest.mark.parametrize("act", [by_transfer, Vm.replace], ids=["transfer", "exec"])
def test_watch(act: Callable[[Vm], None], tmp_path: Path) -> None:
    require_live_update()
    state = tmp_path / "state"
    command = [*PROGRAM, "watch", "--format", "json", "--vm", f"{OURS}*", "--state-directory", str(state)]
    log = (tmp_path / "log").open("w")
    with log, running(*command, "--count", str(ROUNDS), stdout=PIPE, stderr=log) as watch:
        assert watch.stdout is not None
        until(lambda: "watching" in (tmp_path / "log").read_text())
        for turn in range(ROUNDS):
            (tmp_path / str(turn)).mkdir()
            with vm(tmp_path / str(turn), name=f"{OURS}{turn}") as guest:
                time.sleep(SETTLED_S)
                act(guest)
                said = json.loads(watch.stdout.readline())
            assert (said["mode"], said["result"]) == ("cpr", "completed")
            # A VM that replaces itself is stopped before the first sign, as docs/exporter.md says.
            assert act is Vm.replace or (said["role"] == "both" and said["blackout_ns"])
            beats = [at for one in guest.beats.values() for at, _ in one.beats]
            assert said["blackout_ns"] == whole(state / said["recording"], beats).blackout_ns


def test_the_exporter_counts_them_under_their_mode(tmp_path: Path) -> None:
    require_live_update()
    with exporter(tmp_path / "state") as (_, port):
        for turn, act in enumerate((by_transfer, Vm.replace)):
            (tmp_path / str(turn)).mkdir()
            with vm(tmp_path / str(turn), name=f"{OURS}{turn}") as guest:
                time.sleep(SETTLED_S)
                act(guest)
                until(lambda turn=turn: value(port, "ebpf_mig_modes_total", mode="cpr") == turn + 1)
        assert value(port, "ebpf_mig_migrations_total") == value(port, "ebpf_mig_migrations_total", result="completed")
        assert value(port, "ebpf_mig_migrations_total", result="completed") == 2
        assert value(port, "ebpf_mig_modes_total") == 2
