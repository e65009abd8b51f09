# SPDX-License-Identifier: Apache-2.0
"""Each of the exporter's processes is killed or stopped, and a scraper sees it within seconds."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.conftest import TRACING, requires
from tests.integration.exporters import children, exporter, gone, is_ready, until, value

pytestmark = requires(*TRACING)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", ["serve", "analysis_worker"])
def test_one_that_is_killed_or_stopped_ends_all(victim: str, signum: int, tmp_path: Path) -> None:
    with exporter(tmp_path / "state") as (process, port):
        others = children(process.pid)
        os.kill(others[victim], signum)
        assert process.wait(20) == 3
        until(lambda: all(map(gone, others.values())), 5)
        socket.create_server(("127.0.0.1", port)).close()


def test_children_that_are_stopped_do_not_outlive_the_watch(tmp_path: Path) -> None:
    with exporter(tmp_path / "state") as (process, port):
        others = children(process.pid)
        process.send_signal(signal.SIGSTOP)
        for pid in others.values():
            os.kill(pid, signal.SIGSTOP)
        process.kill()
        until(lambda: all(map(gone, others.values())), 5)
        socket.create_server(("127.0.0.1", port)).close()


def test_a_watch_that_is_stopped_is_down_until_it_goes_on(tmp_path: Path) -> None:
    with exporter(tmp_path / "state") as (process, port):
        time.sleep(2)
        assert value(port, "ebpf_mig_up") == 1
        process.send_signal(signal.SIGSTOP)
        try:
            until(lambda: value(port, "ebpf_mig_up") == 0, 8)
            assert not is_ready(port)
        finally:
            process.send_signal(signal.SIGCONT)
        until(lambda: value(port, "ebpf_mig_up") == 1, 5)
        assert is_ready(port) and process.poll() is None
