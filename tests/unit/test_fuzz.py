# SPDX-License-Identifier: Apache-2.0
"""Every fuzz target runs briefly from the committed corpus, and the fuzzer finds a planted fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from ebpf_mig.recording.file import read_recording
from tests.conftest import long_but
from tests.fuzz import mutate
from tests.fuzz.target import CORPUS, corpus
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", long_but(TARGETS, "reader", "whole", "qmp", "proc"))
def test_a_moment_of_each_target(name: str) -> None:
    """The inputs are the same each time, so a new failure comes from a change of the code."""
    command = [sys.executable, "-m", "tests.fuzz", "--target", name, "--seconds", "2", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[1]) >= len(TARGETS[name].seeds())


def test_the_corpus_is_small_and_says_something() -> None:
    files = [file for file in CORPUS.rglob("*") if file.is_file()]
    assert files and max(file.stat().st_size for file in files) < 32 << 10
    for data in corpus("whole"):
        assert not read_recording(data).truncated and len(read_recording(data).events) > 8


def test_changes_reach_behind_checksums_and_can_be_repeated() -> None:
    seeds = corpus("whole")
    changed = [mutate.recording(seeds[n % len(seeds)], Random(n), seeds) for n in range(300)]
    assert changed == [mutate.recording(seeds[n % len(seeds)], Random(n), seeds) for n in range(300)]
    readable = 0
    for data in changed:
        try:
            readable += len(read_recording(data).events) > 4
        except Exception:  # noqa: S112 - of whatever kind: it was not readable
            continue
    assert readable > 150 and len(set(changed)) > 250


@pytest.mark.parametrize(
    ("module", "fault", "target"),
    [
        ("ebpf_mig.analysis.pause", "pause.observe = lambda *a: 1 / 0", "whole"),
        ("ebpf_mig.linux.procfs", "procfs.is_alive = lambda pid: int(procfs.text(pid, 'comm'))", "proc"),
    ],
)
def test_a_fault_is_found(module: str, fault: str, target: str, tmp_path: Path) -> None:
    """With a planted fault it ends with 1 and says how to run the input again."""
    name = module.rpartition(".")[2]
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module} as {name}; {fault}\n"
        f"import tests.fuzz.__main__ as m; from pathlib import Path; m.FOUND = Path({str(tmp_path)!r})\n"
        f"sys.argv = ['x', '--target', {target!r}, '--seconds', '10', '--seed', '1', '--child']; sys.exit(m.main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and "--replay" in done.stdout, done.stdout + done.stderr
    assert len(list(tmp_path.iterdir())) == 1
