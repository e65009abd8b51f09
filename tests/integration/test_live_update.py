# SPDX-License-Identifier: Apache-2.0
"""`migrate qemu --mode cpr-transfer` and `cpr-exec` with real QEMUs. The witness is the guest's heartbeat."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import TRACING, requires
from tests.integration.live_updates import Vm, require_live_update, vm
from tests.integration.migrations import QUICK
from tests.integration.test_results import Qmp

pytestmark = requires(*TRACING)

TWO = replace(QUICK, vcpus=2)


def migrate(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ebpf_mig", "migrate", "qemu", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory, timeout=120)


def transfer(guest: Vm, *more: str) -> subprocess.CompletedProcess[str]:
    ends = ["--source", str(guest.qmp("source")), "--destination", str(guest.qmp("destination"))]
    channels = ["--uri", f"unix:{guest.directory}/main", "--cpr-uri", f"unix:{guest.directory}/cpr"]
    return migrate(guest.directory, *ends, *channels, "--mode", "cpr-transfer", "-o", "x.rec", *more)


def by_exec(guest: Vm, *more: str) -> subprocess.CompletedProcess[str]:
    ends = ["--source", str(guest.qmp("source")), "--uri", f"file:{guest.directory}/state"]
    return migrate(guest.directory, *ends, "--mode", "cpr-exec", "-o", "x.rec", *more)


def whole(guest: Vm, result: subprocess.CompletedProcess[str]) -> Breakdown:
    """The breakdown of a live update that completed: one blackout, an exact partition, and no beat in it."""
    assert result.returncode == 0, result.stderr
    analysis = analyse(read_recording(guest.directory / "x.rec"))
    b = analysis.breakdown
    assert (b.migration.mode, b.migration.result) == ("cpr", "completed")
    assert b.completeness.verdict == "complete", b.completeness
    assert b.blackout_ns and b.window_ns
    assert sum(p.duration_ns or 0 for p in b.phases) == b.window_ns
    assert next(p.duration_ns or 0 for p in b.phases if p.phase == "unattributed") <= 0.02 * b.window_ns
    assert [v.vcpu for v in b.vcpus] == list(range(guest.scenario.vcpus))
    begin = analysis.origin_ns + max(v.stop for v in b.vcpus if v.stop is not None)
    end = begin + b.blackout_ns
    beats = [at for one in guest.beats.values() for at, _ in one.beats]
    assert not [at for at in beats if begin + 1_000_000 < at < end], "a beat in the blackout"
    assert min(at for at in beats if at >= end) and max(at for at in beats if at <= begin + 1_000_000)
    return b


@pytest.mark.parametrize("listening", ["at once", "defer"])
def test_cpr_transfer(listening: str, tmp_path: Path) -> None:
    require_live_update()
    with vm(tmp_path, scenario=TWO) as guest:
        pid = guest.await_transfer("defer" if listening == "defer" else "")
        result = transfer(guest)
        guest.until(lambda: guest.beats["destination"].letters() == {"A", "B"})
    b = whole(guest, result)
    assert b.migration.destination is not None and b.migration.destination.pid == pid
    assert b.live_update is not None and b.live_update.descriptors and b.live_update.descriptors >= 4
    own = [w for w in b.witnesses if w.name == "qmp.STOP..RESUME"]
    assert len(own) == (listening == "defer"), "the new monitor is free before the stop, or not used until the end"


def test_cpr_exec(tmp_path: Path) -> None:
    require_live_update()
    with vm(tmp_path, scenario=TWO) as guest:
        before = len(guest.beats["source"].beats)
        result = by_exec(guest)
        guest.until(lambda: len(guest.beats["source"].beats) > before + 8)
        assert Qmp(str(guest.qmp("source"))).runs()
    b = whole(guest, result)
    phases = {p.phase: p.duration_ns for p in b.phases}
    assert phases["exec"] and phases["startup"] and b.live_update is not None and b.live_update.setup_ns


def test_a_qemu_without_the_mode(tmp_path: Path) -> None:
    """QEMU in PATH, if it is older; its guest stays."""
    with QemuPair(QUICK) as pair:
        if "cpr-exec" in str(Qmp(pair.source.qmp)("query-qmp-schema")):
            pytest.skip("missing feature: a QEMU without cpr-exec")
        refused = migrate(tmp_path, "--source", pair.source.qmp, "--uri", "file:x", "--mode", "cpr-exec")
        assert Qmp(pair.source.qmp).runs()
    assert refused.returncode == 4 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert "cannot do cpr-exec" in refused.stderr and "QEMU 10.2" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_update_that_fails_leaves_the_guest_and_the_mode(tmp_path: Path) -> None:
    require_live_update()
    with vm(tmp_path) as guest:
        lost = transfer(guest)
        assert lost.returncode == 4 and "no QEMU waits for a live update" in lost.stderr, lost.stderr
        failed = by_exec(guest, "--exec-command", f"/nonexistent/qemu -incoming file:{tmp_path}/state")
        source = Qmp(str(guest.qmp("source")))
        assert source.runs()
        assert source("query-migrate-parameters")["mode"] == "normal"
        assert failed.returncode == 4 and "/nonexistent/qemu" in failed.stderr, failed.stderr
        b = analyse(read_recording(tmp_path / "x.rec")).breakdown
    assert b.migration.result == "failed"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mode", "cpr-transfer", "--destination", "b", "--uri", "unix:m"], "--cpr-uri"),
        (["--mode", "cpr-transfer", "--destination", "b", "--uri", "file:m", "--cpr-uri", "unix:c"], "file:m"),
        (["--mode", "cpr-transfer", "--destination", "b", "--uri", "unix:m", "--cpr-uri", "tcp:c:1"], "unix:PATH"),
        (["--mode", "cpr-exec", "--uri", "unix:m"], "file:PATH"),
        (["--mode", "cpr-exec", "--uri", "file:m", "--destination", "b"], "--destination"),
        (["--mode", "cpr-exec", "--uri", "file:m", "--postcopy"], "--postcopy"),
        (["--mode", "cpr-exec", "--uri", "file:m", "--exec-command", "qemu -S"], "-incoming"),
        (["--mode", "cpr-exec", "--uri", "file:m", "--exec-command", "'"], "--exec-command"),
        (["--mode", "cpr-exec", "--uri", "file:m", "--destination-host", "h"], "one host"),
        (["--uri", "tcp:a:1"], "--destination"),
        (["--uri", "tcp:a:1", "--destination", "b", "--cpr-uri", "unix:c"], "--cpr-uri"),
    ],
)
def test_options_that_do_not_fit(options: list[str], said: str, tmp_path: Path) -> None:
    refused = migrate(tmp_path, "--source", "a", *options)
    assert refused.returncode == 2 and said in refused.stderr, refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []
