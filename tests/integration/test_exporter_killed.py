# SPDX-License-Identifier: Apache-2.0
"""Each of the exporter's processes is killed or stopped: it is replaced within seconds, and the counts stay right."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TRACING, requires
from tests.integration.exporters import (
    OURS,
    PROGRAM,
    children,
    exporter,
    free_port,
    gone,
    is_ready,
    migrate,
    running,
    until,
    value,
)
from tests.integration.migrations import LASTING
from tests.integration.test_exporter_life import bpf_objects, in_kernel

pytestmark = requires(*TRACING)
REPLACED_S = 15.0
"""Two seconds until a stopped process is killed, half a second of delay, and loading the programs."""
MODULES = {"watch": "watch_process", "listener": "serve"}


def expect(port: int, wanted: int, name: str, **labels: str) -> None:
    """Waits until a metric has this value. The listener may be away for a while."""

    def reached() -> bool:
        with contextlib.suppress(OSError):
            return value(port, name, **labels) == wanted
        return False

    until(reached, REPLACED_S)


def why_not_ready(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=10) as answer:
            assert answer.read() == b"ready\n"
            return ""
    except urllib.error.HTTPError as error:
        assert error.code == 503
        return str(error.read().decode())


@pytest.mark.long
@pytest.mark.parametrize("victim", ["watch", "listener"])
def test_one_that_is_killed_or_stopped_is_replaced_and_counts_go_on(victim: str, tmp_path: Path) -> None:
    with exporter(tmp_path / "state") as (process, port):
        migrate(LASTING)
        until(lambda: value(port, "ebpf_mig_migrations_total") == 1, 15)
        first = children(process.pid)
        for number, signum in enumerate((signal.SIGKILL, signal.SIGSTOP), 1):
            before = children(process.pid)
            armed, signs = value(port, "ebpf_mig_armed_seconds_total"), value(port, "ebpf_mig_triggers_total")
            objects = bpf_objects(before["watch_process"])
            os.kill(before[MODULES[victim]], signum)
            expect(port, number, "ebpf_mig_exporter_restarts_total", process=victim)
            until(lambda: is_ready(port), REPLACED_S)
            now = children(process.pid)
            assert gone(before[MODULES[victim]]) and now[MODULES[victim]] != before[MODULES[victim]]
            others = {name for name in MODULES.values() if name != MODULES[victim]}
            assert all(now[name] == first[name] for name in others), "the others went on"
            if victim == "watch":
                assert not any(in_kernel(kind, n) for kind, numbers in objects.items() for n in numbers)
            assert value(port, "ebpf_mig_armed_seconds_total") >= armed > 0
            assert value(port, "ebpf_mig_triggers_total") >= signs > 0
            assert value(port, "ebpf_mig_blackout_seconds_count") == number
            migrate(LASTING)
            expect(port, number + 1, "ebpf_mig_migrations_total")
        assert value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 3
        assert len(list((tmp_path / "state").iterdir())) == 3
        assert value(port, "ebpf_mig_errors_total") == 0 and process.poll() is None


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_an_analysis_is_done_again_when_the_analyst_is_killed_or_stopped(signum: int, tmp_path: Path) -> None:
    hit: list[int] = []

    def strike(pid: int) -> None:
        """Hits the first analyst that shows up, while it starts or works."""
        until(lambda: "analysis_worker" in children(pid), 60)
        hit.append(children(pid)["analysis_worker"])
        os.kill(hit[0], signum)

    with exporter(tmp_path / "state") as (process, port):
        striker = threading.Thread(target=strike, args=(process.pid,))
        striker.start()
        migrate(LASTING)
        striker.join()
        until(lambda: value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 1, REPLACED_S)
        assert gone(hit[0]) and value(port, "ebpf_mig_exporter_restarts_total", process="analyst") == 1
        until(lambda: is_ready(port), REPLACED_S)
        until(lambda: "analysis_worker" not in children(process.pid), 20)  # it ends when there is no work
        assert is_ready(port) and value(port, "ebpf_mig_errors_total") == 0
        assert value(port, "ebpf_mig_migrations_total") == 1


def test_children_that_are_stopped_do_not_outlive_the_supervisor(tmp_path: Path) -> None:
    with exporter(tmp_path / "state") as (process, port):
        others = children(process.pid)
        process.send_signal(signal.SIGSTOP)
        for pid in others.values():
            os.kill(pid, signal.SIGSTOP)
        process.kill()
        until(lambda: all(map(gone, others.values())), 5)
        socket.create_server(("127.0.0.1", port)).close()


def test_a_watch_that_is_stopped_is_down_even_if_nobody_can_replace_it(tmp_path: Path) -> None:
    with exporter(tmp_path / "state") as (process, port):
        watch = children(process.pid)["watch_process"]
        until(lambda: value(port, "ebpf_mig_up") == 1)
        process.send_signal(signal.SIGSTOP)
        os.kill(watch, signal.SIGSTOP)
        try:
            until(lambda: value(port, "ebpf_mig_up") == 0, 8)
            assert "silent" in why_not_ready(port)
        finally:
            os.kill(watch, signal.SIGCONT)
            process.send_signal(signal.SIGCONT)
        until(lambda: value(port, "ebpf_mig_up") == 1, REPLACED_S)
        assert is_ready(port) and process.poll() is None


@contextlib.contextmanager
def closed(*redirections: str, state: Path) -> Iterator[int]:
    """An exporter that was started without some of its standard streams; its port."""
    port = free_port()
    options = ["--web.listen-address", f"127.0.0.1:{port}", "--state-directory", str(state), "--vm", f"{OURS}*"]
    shell = ["sh", "-c", f'exec "$@" {" ".join(redirections)}', "sh"]
    with running(*shell, *PROGRAM, "exporter", *options) as process:
        until(lambda: is_ready(port) or process.poll() is not None)
        assert process.poll() is None
        yield port
        process.terminate()
        assert process.wait(20) == 0


@pytest.mark.long
@pytest.mark.parametrize("streams", [("<&-", ">&-", "2>&-"), ("2>&-",), (">/dev/full", "2>/dev/full")])
def test_closed_and_full_standard_streams_change_nothing(streams: tuple[str, ...], tmp_path: Path) -> None:
    with closed(*streams, state=tmp_path / "state") as port:
        migrate(LASTING)
        until(lambda: value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 1, 15)
        assert value(port, "ebpf_mig_errors_total") == 0
