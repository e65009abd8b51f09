# SPDX-License-Identifier: Apache-2.0
"""QEMU's own snapshots, which somebody else triggers, as `record`, `watch` and `exporter` see them.

Witnesses: QEMU's events STOP and RESUME, and the guest's heartbeat.
"""

from __future__ import annotations

import json
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import pytest

from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import TRACING, long_but, requires
from tests.integration.exporters import NAMED, OURS, PROGRAM, SETTLED_S, exporter, running, until, value
from tests.integration.qemu_snapshots import (
    AGREES_NS,
    APART_S,
    BACKGROUND,
    KINDS,
    MS,
    SAVED,
    Kind,
    holds,
    loadvm,
    stop_and_load,
    version,
)
from tests.integration.test_results import Qmp

pytestmark = requires(*TRACING)
FILE, EXEC, SAVEVM, URING, CACHED, NATIVE, DEVICE, NATIVE_DEVICE = (
    next(kind for kind in KINDS if kind.name == name)
    for name in (
        "file", "exec", "savevm", "savevm-uring", "savevm-uring-cached", "savevm-native", "savevm-uring-device",
        "savevm-native-device",
    )
)  # fmt: skip
AGES_S = (SETTLED_S, SETTLED_S, 1.0, 1.0)
"""How old the VM is at each try. One that stops its guest before the probes are armed can be missed (docs/exporter.md).
For a VM that has just been found, they are armed."""
PATIENCE_S = 8.0
LATE_S = 1.2
"""QEMU has switched logging on by then, also where the command that writes the file starts slowly."""


def offset_ns() -> int:
    return time.time_ns() - time.monotonic_ns()


@pytest.mark.parametrize("kind", long_but(KINDS, FILE, EXEC, SAVEVM, CACHED, DEVICE), ids=lambda kind: kind.name)
def test_record(kind: Kind, tmp_path: Path) -> None:
    kind.needed()
    with QemuPair(SAVED, extra=kind.extra) as pair:
        q, offset = Qmp(pair.source.qmp), offset_ns()
        command = [sys.executable, "-m", "ebpf_mig", "record", "--pid", str(pair.source.pid), "-o", "x.rec"]
        with running(*command, stderr=PIPE, cwd=tmp_path) as process:
            assert process.stderr is not None and "tracing" in process.stderr.readline()
            kind.run(q, tmp_path)
            said = process.communicate(timeout=30)[1]
        assert process.returncode == 0, said
        analysis = analyse(read_recording(tmp_path / "x.rec"))
        holds(analysis.breakdown, analysis.origin_ns, kind, q, pair.source, offset)
    if kind.capabilities == BACKGROUND:
        assert analysis.breakdown.dirty_log.mode == "none"


@pytest.mark.parametrize("kind", long_but(KINDS, EXEC), ids=lambda kind: kind.name)
def test_watch(kind: Kind, tmp_path: Path) -> None:
    kind.needed()
    state = tmp_path / "state.d"
    command = [*PROGRAM, "watch", "--format", "json", "--count", "1", "--vm", f"{OURS}*"]
    with running(*command, "--state-directory", str(state), stdout=PIPE, stderr=PIPE) as watch:
        assert watch.stderr is not None and watch.stdout is not None and "watching" in watch.stderr.readline()
        for number, age_s in enumerate(AGES_S):
            directory = tmp_path / str(number)
            directory.mkdir()
            with QemuPair(SAVED, extra=[*NAMED, *kind.extra]) as pair:
                time.sleep(age_s)
                q, offset = Qmp(pair.source.qmp), offset_ns()
                kind.run(q, directory)
                if not select.select([watch.stdout], [], [], PATIENCE_S)[0]:
                    continue
                said = json.loads(watch.stdout.readline())
                analysis = analyse(read_recording(state / said["recording"]))
                holds(analysis.breakdown, analysis.origin_ns, kind, q, pair.source, offset, late=True)
                break
        else:
            pytest.fail(f"{kind.name} was missed {len(AGES_S)} times")
    assert (said["mode"], said["result"], said["role"]) == ("snapshot", "saved", "source")
    assert said["blackout_ns"] == analysis.breakdown.blackout_ns


def test_a_watch_that_is_armed_late_awaits_a_slow_stream(tmp_path: Path) -> None:
    """Logging was switched on before, and the next fetch comes after 4 s: longer than a sign alone counts."""
    kind = replace(EXEC, parameters={**EXEC.parameters, "max-bandwidth": 256 << 10})
    state = tmp_path / "state.d"
    command = [*PROGRAM, "watch", "--format", "json", "--vm", f"{OURS}*", "--state-directory", str(state)]
    with running(*command, stdout=PIPE, stderr=PIPE) as watch, QemuPair(SAVED, extra=NAMED) as pair:
        assert watch.stderr is not None and "watching" in watch.stderr.readline()
        time.sleep(SETTLED_S)
        q, offset = Qmp(pair.source.qmp), offset_ns()
        watch.send_signal(signal.SIGSTOP)
        later = threading.Timer(LATE_S, watch.send_signal, (signal.SIGCONT,))
        later.start()
        try:
            kind.run(q, tmp_path)
        finally:
            later.join()
        assert watch.stdout is not None
        assert select.select([watch.stdout], [], [], PATIENCE_S)[0], "it was missed"
        analysis = analyse(read_recording(state / json.loads(watch.stdout.readline())["recording"]))
        assert analysis.breakdown.migration.total_ns is None, "logging was seen to be switched on"
        holds(analysis.breakdown, analysis.origin_ns, kind, q, pair.source, offset, late=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.uri], ids=lambda kind: kind.name)
def test_record_of_the_vm_that_loads_it(kind: Kind, tmp_path: Path) -> None:
    """The guest was saved before. Witnesses: when it was asked to load, RESUME, and the guest's first beat."""
    kind.needed()
    with QemuPair(SAVED, extra=kind.extra) as pair:
        source, q, offset = Qmp(pair.source.qmp), Qmp(pair.destination.qmp), offset_ns()
        kind.run(source, tmp_path)
        command = [sys.executable, "-m", "ebpf_mig", "record", "--pid", str(pair.destination.pid), "-o", "x.rec"]
        with running(*command, stderr=PIPE, cwd=tmp_path) as process:
            assert process.stderr is not None
            while "tracing" not in (line := process.stderr.readline()):
                assert line
            q.capability(*set(kind.capabilities) - set(BACKGROUND))
            if kind.parameters:
                q("migrate-set-parameters", **kind.parameters)
            asked = time.monotonic_ns()
            state = f"{tmp_path}/state"
            q("migrate-incoming", uri=f"exec:cat {state}" if kind.transport == "pipe" else f"file:{state}")
            until(lambda: pair.destination.heartbeat.beats)
            said = process.communicate(timeout=30)[1]
        assert process.returncode == 0, said
        analysis = analyse(read_recording(tmp_path / "x.rec"))
        b, beats = analysis.breakdown, [at for at, _ in pair.destination.heartbeat.beats]
        resumed = q.at("RESUME") - offset
    assert b.migration.result == "completed" and b.blackout_ns is None
    assert b.window_ns and sum(p.duration_ns or 0 for p in b.phases) == b.window_ns
    assert b.phase_ns("unattributed") <= 0.02 * b.window_ns
    start = analysis.origin_ns + min(v.start for v in b.vcpus if v.start is not None)
    assert asked <= analysis.origin_ns <= start <= min(beats)
    assert abs(resumed - start) <= AGREES_NS
    if kind.transport == "file":
        assert (b.migration.mode, b.migration.transport) == ("restore", "file")
        assert (b.completeness.verdict, b.completeness.reasons) == ("complete", [])
        assert analysis.origin_ns - asked <= AGREES_NS, "it begins with the request"


@pytest.mark.parametrize(
    "kind", long_but((SAVEVM, URING, CACHED, NATIVE, DEVICE, NATIVE_DEVICE), SAVEVM, CACHED), ids=lambda kind: kind.name
)
@pytest.mark.parametrize(
    ("load", "waits"), [(loadvm, 0), pytest.param(stop_and_load, 2, marks=pytest.mark.long)], ids=["loadvm", "stopped"]
)
def test_record_of_a_guest_that_is_loaded_again(
    load: Callable[[Qmp], None], waits: int, kind: Kind, tmp_path: Path
) -> None:
    """Witnesses: STOP, RESUME, the guest's heartbeat, and how long the script waited."""
    kind.needed()
    with QemuPair(SAVED) as pair:
        q, offset = Qmp(pair.source.qmp), offset_ns()
        kind.run(q, tmp_path)
        command = [sys.executable, "-m", "ebpf_mig", "record", "--pid", str(pair.source.pid), "-o", "x.rec"]
        with running(*command, stderr=PIPE, cwd=tmp_path) as process:
            assert process.stderr is not None and "tracing" in process.stderr.readline()
            load(q)
            said = process.communicate(timeout=30)[1]
        assert (process.returncode, q.runs()) == (0, True), said
        assert said.startswith("migrated"), said
        analysis = analyse(read_recording(tmp_path / "x.rec"))
        beats = [at for at, _ in pair.source.heartbeat.beats]
        stopped, resumed = (q.at(event) - offset for event in ("STOP", "RESUME"))
    b, m = analysis.breakdown, analysis.breakdown.migration
    assert (m.mode, m.result, m.transport, m.paused_after) == ("restore", "completed", "file", False)
    assert (b.completeness.verdict, b.completeness.reasons) == ("complete", [])
    assert b.window_ns and b.blackout and sum(p.duration_ns or 0 for p in b.phases) == b.window_ns
    assert b.phase_ns("unattributed") <= 0.02 * b.window_ns
    stop, start = (analysis.origin_ns + at for at in b.blackout)
    assert abs(stopped - stop) <= AGREES_NS and abs(resumed - start) <= AGREES_NS, (stopped - stop, resumed - start)
    assert not [at for at in beats if stop + MS < at < start], "a beat in the blackout"
    assert any(at <= stop + MS for at in beats) and any(at >= start for at in beats)
    assert b.phase_ns("memory.load") and b.phase_ns("state.load")
    waited = b.phase_ns("management") or 0
    assert 0.95 * waits * APART_S * 1e9 <= waited <= waits * (APART_S * 1e9 + AGREES_NS)


def test_a_reset_is_no_restore(tmp_path: Path) -> None:
    """It stops the guest and writes the registers, too. The memory stays."""
    with QemuPair(SAVED) as pair:
        command = [sys.executable, "-m", "ebpf_mig", "record", "--pid", str(pair.source.pid), "-o", "x.rec"]
        with running(*command, stderr=PIPE, cwd=tmp_path) as process:
            assert process.stderr is not None and "tracing" in process.stderr.readline()
            Qmp(pair.source.qmp)("system_reset")
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
        m = analyse(read_recording(tmp_path / "x.rec")).breakdown.migration
    assert (m.mode, m.result) == ("unknown", "unknown")


def counted(kind: Kind, directory: Path, port: int, before: int, age_s: float) -> bool:
    """Whether one of them, of a VM that is so old, is counted."""
    directory.mkdir()
    with QemuPair(SAVED, extra=[*NAMED, *kind.extra]) as pair:
        time.sleep(age_s)
        kind.run(Qmp(pair.source.qmp), directory)
        deadline = time.monotonic() + PATIENCE_S
        while value(port, "ebpf_mig_migrations_total") == before and time.monotonic() < deadline:
            time.sleep(0.1)
    return value(port, "ebpf_mig_migrations_total") == before + 1


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_exporter_counts_them_under_their_mode(tmp_path: Path) -> None:
    """What is counted is counted once, and never as failed."""
    kinds = [kind for kind in KINDS if kind.since <= version()]
    with exporter(tmp_path / "state.d") as (_, port):
        for turn, kind in enumerate(kinds):
            tries = enumerate(AGES_S)
            assert any(counted(kind, tmp_path / f"{kind.name}{n}", port, turn, age) for n, age in tries), kind.name
            assert value(port, "ebpf_mig_modes_total", mode="snapshot") == turn + 1, kind.name
            assert value(port, "ebpf_mig_migrations_total", result="saved") == turn + 1, kind.name
        assert value(port, "ebpf_mig_snapshot_seconds_count", mode="snapshot") == len(kinds)
        assert value(port, "ebpf_mig_blackout_seconds_count") == 0
        assert value(port, "ebpf_mig_migrations_incomplete_total") == 0
