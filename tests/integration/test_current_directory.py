# SPDX-License-Identifier: Apache-2.0
"""Commands run by root load no file from the current directory, nor do their child processes or LLVM."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.conftest import TRACING, requires
from tests.integration.exporters import free_port, running, until
from tests.unit.commands.planted import environment, plant, program

pytestmark = requires(*TRACING, "tc with tbf and veth")

GUEST = ("--memory", "128MiB", "--working-set", "2MiB", "--dirty-rate", "20000")


def test_two_hosts_and_what_they_start(tmp_path: Path) -> None:
    mark = plant(tmp_path)
    command = [program(), "demo", "--two-hosts", *GUEST]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=150
    )
    assert not mark.exists(), mark.read_text()
    assert done.returncode == 0, done.stderr


def test_exporter_and_its_processes(tmp_path: Path) -> None:
    mark = plant(tmp_path)
    port = free_port()
    command = [program(), "exporter", "--web.listen-address", f"127.0.0.1:{port}"]
    with running(*command, cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE) as exporter:
        ready = ["python3", "-Ic", f"import urllib.request as r; r.urlopen('http://127.0.0.1:{port}/-/ready')"]
        until(lambda: subprocess.run(ready, check=False, capture_output=True).returncode == 0, 60)
        assert exporter.poll() is None
    assert not mark.exists(), mark.read_text()
