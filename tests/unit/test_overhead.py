# SPDX-License-Identifier: Apache-2.0
"""`bench.overhead` on a machine that lacks tools: each row without figures says why, and the others are measured.

The observers are real processes; calls and blackouts are numbers, since they need a VM.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest

from bench import observers
from bench.observers import BPFTRACE, OURS, Observer, ObserverError, Watched
from bench.overhead import COLUMNS, in_turn, measure_blackouts, print_blackouts, print_calls


def tool(name: str, script: str, *, ready: str = "ready", needs: str = "sh") -> Observer:
    """An observer that runs a shell script."""
    return Observer(name, needs, lambda *_: ["sh", "-c", script], ready, lambda _: Watched(seen=9000))


WATCHES = "echo ready; exec sleep 60"
WORKS = tool(OURS.name, WATCHES)
MISSING = tool("bpftrace, missing", "", needs="no-such-tool-anywhere")
REFUSES = tool("strace, refused", "echo 'ptrace: Operation | not permitted'; exit 1")
ENDS = tool("ends", "echo ready and gone")
MUTE = tool("says nothing and fails", "echo no permission; exit 1", ready="")
NO_FILE = replace(tool("no file", WATCHES), seen=lambda path: Watched(seen=len(path.read_bytes())))
ALL = [MISSING, WORKS, REFUSES, ENDS, MUTE, NO_FILE]
REASONS = {
    MISSING.name: "no-such-tool-anywhere is not installed",
    REFUSES.name: "does not watch: ptrace: Operation | not permitted",
    ENDS.name: "ended while it was needed: ready and gone",
    MUTE.name: "does not watch: no permission",
    NO_FILE.name: "its output cannot be read: ready",
}


def calls() -> dict[str, float]:
    return dict.fromkeys(COLUMNS, 7.0)


def test_a_tool_that_fails_is_named_and_the_others_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    alone, results = in_turn(ALL, 2, [os.getpid()], calls)
    assert {name: result.failed for name, result in results.items() if result.failed} == REASONS
    assert len(results[WORKS.name].runs) == 2
    assert print_calls(alone, results)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 3 + len(ALL)
    assert {row.count("|") for row in rows} == {8}
    assert f"| {WORKS.name} | +0 | +0 | +0 | +0 | +0 | 100.0 % |" in rows
    assert any(row.startswith(f"| {REFUSES.name} | not measured: does not watch: ptrace: Operation / ") for row in rows)


def test_if_all_fail_a_call_alone_is_still_measured(capsys: pytest.CaptureFixture[str]) -> None:
    ours = tool(OURS.name, "echo needs root; exit 3")
    alone, results = in_turn([ours, MISSING], 1, [os.getpid()], calls)
    assert alone == calls()
    assert not print_calls(alone, results)
    assert "MISSED: nothing lost by us (does not watch: needs root)" in capsys.readouterr().out


def test_blackouts_leave_out_a_tool_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def blackout(observer: Observer | None) -> int:
        if observer in (None, WORKS):
            return 2_000_000
        raise ObserverError(REASONS[observer.name] if observer else "")

    found = measure_blackouts(ALL, 3, blackout)
    assert {name: result.failed for name, result in found.items() if result.failed} == REASONS
    assert print_blackouts(found)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert f"| {WORKS.name} | 3 | 2.000 | 2.000 | +0.000 | +0.000 to +0.000 |" in rows
    assert {row.count("|") for row in rows} == {7}


def test_without_tracefs_bpftrace_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "_TRACEFS", (observers.Path("/nonexistent"),))
    installed = replace(BPFTRACE, needs=shutil.which("true") or "true")
    assert installed.obstacle() == "tracefs is not mounted; mount -t tracefs none /nonexistent"
    assert replace(installed, tracefs=False).obstacle() == ""
