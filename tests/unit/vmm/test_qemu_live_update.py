# SPDX-License-Identifier: Apache-2.0
"""Live updates of QEMU: the command of the new program, and where it listens. Real ones are in tests/integration."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ebpf_mig.errors import UsageError, VmmError
from ebpf_mig.linux import procfs
from ebpf_mig.vmm.qemu.live_update import main_channel, own_command, successor_command, who_waits_at


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["qemu", "-m", "1G"], ["qemu", "-m", "1G"]),
        (["qemu", "-S", "-m", "1G", "-daemonize"], ["qemu", "-m", "1G"]),
        (["qemu", "-incoming", "file:old", "-m", "1G"], ["qemu", "-m", "1G"]),
        (
            ["qemu", "-incoming", "unix:main", "--incoming", '{"channel-type":"cpr"}', "-smp", "2"],
            ["qemu", "-smp", "2"],
        ),
        (["qemu", "-name", "S", "-append", "incoming"], ["qemu", "-name", "S", "-append", "incoming"]),
        (["qemu", "-append", "", "-display", "none"], ["qemu", "-append", "", "-display", "none"]),
    ],
)
def test_the_new_program_is_started_as_the_old_one(before: list[str], after: list[str]) -> None:
    assert successor_command(before, "file:new") == [*after, "-incoming", "file:new"]


@pytest.fixture
def started(request: pytest.FixtureRequest) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *request.param])
    while not procfs.command_line(process.pid)[0].endswith(os.path.basename(sys.executable)):  # noqa: PTH119
        pass
    yield process.pid
    process.kill()
    process.wait()


@pytest.mark.parametrize("started", [["-append", "", "ü"]], indirect=True)
def test_its_own_command_with_empty_arguments(started: int) -> None:
    assert own_command(started)[3:] == ["-append", "", "ü"]


@pytest.mark.parametrize("started", [["x" * 70_000], [b"\xff"]], indirect=True, ids=["long", "bytes"])
def test_a_command_that_is_not_read_whole_is_not_used(started: int) -> None:
    with pytest.raises(VmmError, match="cannot be read") as caught:
        own_command(started)
    assert "--exec-command" in str(caught.value.remedy)


def test_a_process_that_is_gone_has_no_command() -> None:
    with pytest.raises(VmmError, match="cannot be read"):
        own_command(1 << 22)


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("unix:/run/a:b", {"transport": "socket", "type": "unix", "path": "/run/a:b"}),
        ("tcp:[::1]:44", {"transport": "socket", "type": "inet", "host": "::1", "port": "44"}),
        ("tcp:host:44", {"transport": "socket", "type": "inet", "host": "host", "port": "44"}),
    ],
)
def test_addresses(uri: str, address: dict[str, str]) -> None:
    assert main_channel(uri) == address


@pytest.mark.parametrize("uri", ["", "unix:", "tcp:host", "tcp::1", "file:x", "exec:cat", "x"])
def test_no_addresses(uri: str) -> None:
    with pytest.raises(UsageError):
        main_channel(uri)


def test_nobody_waits() -> None:
    with pytest.raises(VmmError, match="no QEMU waits for a live update at /nowhere"):
        who_waits_at("/nowhere")
