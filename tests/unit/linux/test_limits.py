# SPDX-License-Identifier: Apache-2.0
"""Descriptors and memory that are limited or used up, in real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ebpf_mig.linux.limits import ADDRESS_SPACE, DESCRIPTORS
from tests.conftest import TRACING, requires

EXHAUSTED = """
import os, resource, sys
from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import descriptors, procfs
import ebpf_mig.tracing.neighbours
pid = os.getpid()
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    pass
try:
    answer = eval(sys.argv[1])
except PreflightError as error:
    answer = f"{error}; {error.remedy}"
for fd in taken:
    os.close(fd)
print(answer)
"""
ASKED = [
    "procfs.is_alive(pid)", "procfs.is_ending(pid)", "procfs.start_time(pid)", "procfs.threads_of(pid)",
    "procfs.processes()", "procfs.comm(pid)", "procfs.command_line(pid)", "procfs.cpu_ticks(pid, pid)",
    "procfs.resident_bytes(pid)", "list(descriptors.links(pid))", "descriptors.carrier_descriptor(pid, 7)",
    "descriptors.holds_kvm(pid)", "descriptors.vcpus_of(pid)", "procfs.in_kvm_run(pid, pid)",
    "procfs.may_run_vcpu(pid, pid)",
    "procfs.read(pid, 'stat')", "list(procfs.lines('stat'))", "procfs.control_groups(pid)",
]  # fmt: skip
"""Everything in `procfs` and `descriptors` that opens something."""


@pytest.mark.parametrize("question", ASKED)
def test_a_process_that_cannot_be_looked_at_is_not_taken_for_gone(question: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXHAUSTED, question], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "this process has no file descriptor left; ulimit -n 1024\n", done.stderr


@requires("root", "bcc", "kernel BTF")
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (f"--nofile={DESCRIPTORS - 1}", "open 319 files only, and tracing takes up to 320; ulimit -n 1024"),
        ("--nofile=24", "open 24 files only"),
        (f"--as={ADDRESS_SPACE - 1}", "511 MiB of address space only"),
        ("--as=100000000", "95 MiB of address space only"),
    ],
)
@pytest.mark.parametrize("words_of", [("record", "--pid", "1"), ("watch",), ("demo",), ("exporter",)], ids=" ".join)
def test_too_low_a_limit_is_one_line_before_anything_is_loaded(
    limit: str, words: str, words_of: tuple[str, ...]
) -> None:
    done = subprocess.run(
        ["prlimit", limit, sys.executable, "-m", "ebpf_mig", *words_of],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1 and words in done.stderr


@requires(*TRACING, "tc with tbf and veth")
@pytest.mark.parametrize(
    "words", [("demo", "-o", "{tmp}/x.rec"), ("demo", "--two-hosts", "-o", "{tmp}/x.rec"), ("bench", "idle", "-n", "1")]
)
def test_where_no_temporary_file_can_be_written(words: tuple[str, ...], tmp_path: Path) -> None:
    """As on a full disk: RLIMIT_FSIZE is 0."""
    command = [sys.executable, "-m", "ebpf_mig", *(word.replace("{tmp}", str(tmp_path)) for word in words)]
    done = subprocess.run(
        ["prlimit", "--fsize=0", *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "set TMPDIR to a writable one" in done.stderr
    assert not list(tmp_path.iterdir())
