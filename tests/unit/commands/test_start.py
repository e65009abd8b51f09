# SPDX-License-Identifier: Apache-2.0
"""How the program begins: in a hostile directory, and with standard streams that are closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.commands.planted import environment, plant, program

ROOT = Path(__file__).parents[3]
RECORDING = ROOT / "tests/data/qemu-7.2-tcp.rec"


@pytest.mark.parametrize(
    "arguments",
    [["report", str(RECORDING)], ["report", str(RECORDING), "--format", "html"], ["doctor"], ["version"], ["--version"],
     ["export", str(ROOT / "tests/data/hosts"), "--format", "csv", "-o", "tables"], ["demo", "--vmm", "nonsense"]],
    ids=" ".join,
)  # fmt: skip
def test_nothing_is_taken_from_the_current_directory(arguments: list[str], tmp_path: Path) -> None:
    mark = plant(tmp_path)
    done = subprocess.run(
        [program(), *arguments], cwd=tmp_path, env=environment(tmp_path), capture_output=True, check=False
    )
    assert not mark.exists(), mark.read_text()
    assert b"Traceback" not in done.stderr and b"internal error" not in done.stderr and b"#error" not in done.stderr
    if arguments[0] == "report":
        assert done.returncode == 0 and b"downtime" in done.stdout


def test_the_trap_works(tmp_path: Path) -> None:
    """Without the protection the planted files are used."""
    mark = plant(tmp_path)
    subprocess.run([sys.executable, "-c", "import logging"], cwd=tmp_path, capture_output=True, check=False)
    subprocess.run(["sh", "-c", "tail"], cwd=tmp_path, env=environment(tmp_path), capture_output=True, check=False)
    assert {"imported logging", "ran tail"} <= set(mark.read_text().splitlines())


def test_a_python_of_ours_finds_our_package_and_not_the_current_directory(tmp_path: Path) -> None:
    mark = plant(tmp_path)
    script = (
        "from ebpf_mig.__main__ import settle; settle()\n"
        "from ebpf_mig.linux.process import python_environment\n"
        "import subprocess, sys\n"
        "print(subprocess.run([sys.executable, '-Pm', 'ebpf_mig', '--version'], env=python_environment(), check=True,"
        " capture_output=True, text=True).stdout)"
    )
    for extra in ({}, {"PYTHONPATH": str(ROOT)}):
        done = subprocess.run(
            [sys.executable, "-P", "-c", script], cwd=tmp_path, env=os.environ | extra, capture_output=True, check=True
        )
        assert b"ebpf-mig" in done.stdout and not mark.exists()


@pytest.mark.parametrize("form", ["text", "json", "perfetto"])
def test_closed_streams(form: str, tmp_path: Path) -> None:
    report = f"{program()} report {RECORDING} --format {form}"

    def shell(line: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, check=False, timeout=60)

    done = shell(f"{report} >&-")
    assert (done.returncode, done.stderr) == (2, b"ebpf-mig: cannot write to stdout: Bad file descriptor\n")
    assert (shell(f"{report} >&- 2>&-").returncode, shell(f"{report} 2>&-").returncode) == (2, 0)
    assert shell(f"{report} -o whole <&- >&- 2>&-").returncode == 0
    whole = (tmp_path / "whole").read_bytes()
    assert whole == shell(f"{report} -o other; cat other").stdout
    done = shell(f"{program()} report - <&-")
    assert done.returncode == 2 and b"the file is empty" in done.stderr


@pytest.mark.parametrize("arguments", ["--version", "--help", "report --help", "schema", "completion bash"])
@pytest.mark.parametrize(
    ("stdout", "why"), [(">&-", b"Bad file descriptor"), (">/dev/full", b"No space left on device")]
)
def test_what_cannot_be_printed_is_said_in_a_line(arguments: str, stdout: str, why: bytes) -> None:
    done = subprocess.run(["sh", "-c", f"{program()} {arguments} {stdout}"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (2, b"ebpf-mig: cannot write to stdout: " + why + b"\n")


@pytest.mark.parametrize(
    "words", ["report -vv none", "-vv report none", "migrate qemu -vv", "migrate -vv qemu", "bench -vv none"]
)
def test_verbose_everywhere(words: str) -> None:
    done = subprocess.run([program(), *words.split()], capture_output=True, check=False, text=True)
    assert done.returncode == 2 and "No such option" not in done.stderr
    if "none" in words:
        assert "Traceback" in done.stderr
