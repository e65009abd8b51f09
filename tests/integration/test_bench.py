# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig bench` with real VMs: a lab scenario, and a user's command that writes a recording."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ebpf_mig.compare.benchmark import decode
from tests.conftest import TRACING, requires
from tests.unit.commands.test_cli import run

pytestmark = requires(*TRACING)
DATA = Path(__file__).parent.parent / "data"


def test_scenario_with_fresh_vms_each_time(tmp_path: Path) -> None:
    file = tmp_path / "idle.json"
    done = run("bench", "idle", "-n", "2", "-o", str(file))
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines()[:3]] == ["warm-up", "run 1 of 2", "run 2 of 2"]
    result = decode(file.read_bytes(), "idle")
    assert (result.scenario, result.warm_up, result.failed(), len(result.runs)) == ("idle", 1, 0, 2)
    pids = {
        run.breakdown.migration.source.pid for run in result.runs if run.breakdown and run.breakdown.migration.source
    }
    assert len(pids) == 2 and min(result.sample("blackout")) > 0
    assert done.stdout.startswith("idle: 2 runs\n") and re.search(r"^blackout +2 ", done.stdout, re.MULTILINE)
    assert run("bench", "idle", "-n", "1", "-o", str(file)).returncode == 2, "never overwritten without --force"


def test_recordings_are_kept_and_a_run_is_shown(tmp_path: Path) -> None:
    file, kept = tmp_path / "idle.json", tmp_path / "recordings"
    done = run("bench", "idle", "-n", "1", "--warm-up", "0", "--vcpus", "2", "--keep", str(kept), "-o", str(file))
    assert done.returncode == 0, done.stderr
    (one,) = decode(file.read_bytes(), "idle").runs
    assert one.recording == "recordings/run-001.rec" and [p.name for p in kept.iterdir()] == ["run-001.rec"]
    shown = run("report", str(file), "--run", "1", "--format", "json")
    assert shown.stdout == run("report", str(kept / "run-001.rec"), "--format", "json").stdout
    assert len(json.loads(shown.stdout)["vcpus"]) == 2
    again = run("bench", "idle", "-n", "1", "--keep", str(kept), "-o", str(tmp_path / "other.json"))
    assert again.returncode == 2 and "run-001.rec exists already" in again.stderr


@pytest.mark.long
def test_a_sweep_has_a_result_for_each_step(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    done = run("bench", "idle", "-n", "1", "--warm-up", "0", "--sweep", "memory=128MiB,1GiB", "-o", str(file))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^fetch: -?[\d.]+ ms per GiB", done.stdout, re.MULTILINE)
    for step, size in (("128MiB", 1 << 27), ("1GiB", 1 << 30)):
        result = decode((tmp_path / f"s.memory-{step}.json").read_bytes(), step)
        assert result.settings["memory_bytes"] == size and len(result.sample("blackout")) == 1


def test_two_settings_in_turn_are_compared_and_the_gate_says_the_same(tmp_path: Path) -> None:
    file, gate = tmp_path / "v.json", ["--fail-if", "blackout.p50>+5%"]
    done = run("bench", "idle", "-n", "2", "--warm-up", "0", "--versus", "memory=512MiB", "-o", str(file), *gate)
    assert done.returncode == 2 and "too few runs to judge blackout.p50>+5%" in done.stderr
    lines = [line for line in done.stderr.splitlines() if ", run " in line]
    assert [line.partition(":")[0] for line in lines] == [
        "a, run 1 of 2", "b, run 1 of 2", "b, run 2 of 2", "a, run 2 of 2",
    ]  # fmt: skip
    sizes = [decode((tmp_path / f"v.{side}.json").read_bytes(), side).settings["memory_bytes"] for side in "ab"]
    assert sizes[1] == 1 << 29 != sizes[0]
    assert done.stdout.startswith("A (as given), idle: 2 runs\n") and "\nB (memory=512MiB), idle: 2 runs" in done.stdout
    assert re.search(r"^blackout .* cannot tell \(n = 4\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^cannot tell +blackout.p50>\+5%", done.stdout, re.MULTILINE)


@pytest.mark.long
def test_a_link_between_two_hosts(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    done = run("bench", "idle", "-n", "1", "--warm-up", "0", "--two-hosts", "--bandwidth", "1Gbit", "-o", str(file))
    assert done.returncode == 0, done.stderr
    (one,) = decode(file.read_bytes(), "t").runs
    assert one.breakdown is not None and one.breakdown.migration.destination is not None
    assert one.breakdown.blackout_ns is not None


def test_no_message_names_a_file_that_is_gone(tmp_path: Path) -> None:
    script = tmp_path / "once.sh"
    script.write_text('test -e "$2.x" && cp "$0" "$1"; touch "$2.x"\n')  # no recording, then one that is none
    command = ["--", "sh", str(script), "{recording}", str(tmp_path / "n")]
    done = run("bench", "-n", "2", "--warm-up", "0", "-o", str(tmp_path / "r.json"), *command)
    assert done.returncode == 4 and done.stderr.count("failed: ") == 2
    for name in re.findall(r"/[\w./-]+", done.stderr + done.stdout):
        assert Path(name).exists(), name


def test_command_that_leaves_recordings_or_fails(tmp_path: Path) -> None:
    file, script = tmp_path / "r.json", tmp_path / "once.sh"
    script.write_text(
        f'echo noise; test "$(cat {tmp_path}/n)" = xx && exit 7; printf x >> {tmp_path}/n; cp "$1" "$2"\n'
    )
    (tmp_path / "n").touch()
    recording = str(DATA / "qemu-10.0-tcp.rec")
    known = json.loads(run("report", recording, "--format", "json").stdout)["blackout_ns"]
    done = run("bench", "-n", "2", "-o", str(file), "--", "sh", str(script), recording, "{recording}")
    assert done.returncode == 0, done.stderr
    assert "noise" not in done.stdout and "run 2: the command exited with 7" in done.stdout
    result = decode(file.read_bytes(), "r")
    assert result.sample("blackout") == [known]
    assert result.failed() == 1 and result.command[0] == "sh"


def test_what_cannot_be_repeated(tmp_path: Path) -> None:
    for words in ([], ["nonsense"], ["--", "sh", "-c", "true"]):
        assert run("bench", "-o", str(tmp_path / "x"), *words).returncode == 2
    forgotten = run("bench", "-o", str(tmp_path / "x"), "--", "/bin/true")
    assert forgotten.returncode == 2 and "put {recording}" in forgotten.stderr
    done = run("bench", "-n", "1", "-o", str(tmp_path / "x"), "--", "false", "{recording}")
    assert done.returncode == 4 and "the warm-up run failed: the command exited with 1" in done.stderr
    assert not (tmp_path / "x").exists()
