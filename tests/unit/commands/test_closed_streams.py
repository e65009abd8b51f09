# SPDX-License-Identifier: Apache-2.0
"""Commands that start with closed standard streams."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RECORDING = Path(__file__).parents[2] / "data" / "qemu-10.0-ring.rec"


def run(redirected: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-m", "ebpf_mig.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", [["report", str(RECORDING)], ["--version"], ["--help"], ["schema"]])
@pytest.mark.parametrize("redirected", [">&-", "<&- >&-"])
def test_a_closed_stdout_is_an_error_of_the_user(command: list[str], redirected: str) -> None:
    done = run(redirected, *command)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "stdout" in done.stderr


def test_closed_stdin_and_stderr_harm_nothing() -> None:
    open_ones = run("", "report", str(RECORDING))
    closed = run("<&- 2>&-", "report", str(RECORDING))
    assert closed.returncode == open_ones.returncode == 0 and closed.stdout == open_ones.stdout
    assert run("<&- 2>&-", "no-such-command").stdout == "", "a message for stderr in stdout"


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    said = tmp_path / "said"
    program = "import os, sys; from ebpf_mig.linux import standard_streams; standard_streams.reserve();"
    program += "held = open(sys.argv[1]); out = open(sys.argv[2], 'w');"
    program += "print(*(os.readlink(f'/proc/self/fd/{fd}') for fd in (0, 1, 2)), held.fileno() > 2, file=out)"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program, str(RECORDING), str(said)]
    subprocess.run(command, check=True)
    assert said.read_text() == "/dev/null /dev/null /dev/null True\n"
