# SPDX-License-Identifier: Apache-2.0
"""What a tenant can do to excess: many VMs at once, many ports, VMs that disappear while they are examined."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TRACING, requires
from tests.integration.exporters import OURS, exporter, migrate, running, until, value
from tests.integration.migrations import LASTING

pytestmark = requires(*TRACING)


@contextlib.contextmanager
def crowd(number: int, ports: int = 0) -> Iterator[None]:
    """Number of VMs at the same time."""
    command = [sys.executable, "-m", "tests.integration.crowd", str(number), str(ports), "--name", f"{OURS}crowd"]
    here = Path(__file__).parents[2]
    with running(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=here) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        process.stdin.close()
        process.wait(30)


@pytest.mark.long
def test_more_new_vms_than_can_be_traced_at_once_hide_no_migration(tmp_path: Path) -> None:
    with exporter(tmp_path / "state") as (process, port):
        with crowd(300):
            until(lambda: value(port, "ebpf_mig_vms") == 300, 60)
            until(lambda: value(port, "ebpf_mig_limit_exceeded_total", limit="traced") > 0)
            migrate(LASTING)
            until(lambda: value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 1, 20)
            assert process.poll() is None and value(port, "ebpf_mig_up") == 1
        until(lambda: value(port, "ebpf_mig_vms") == 0, 20)  # 300 processes disappear while they are examined
        assert process.poll() is None and value(port, "ebpf_mig_up") == 1


@pytest.mark.long
@pytest.mark.parametrize("first", [True, False], ids=["found", "born"])
def test_a_vm_that_listens_on_thousands_of_ports_costs_no_other_vm_its_sign(first: bool, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(crowd(1, 4300))
        process, port = stack.enter_context(exporter(tmp_path / "state"))
        if not first:
            stack.enter_context(crowd(1, 4300))
        until(lambda: value(port, "ebpf_mig_vms") == 1)
        migrate(LASTING)
        until(lambda: value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 1, 20)
        assert process.poll() is None and value(port, "ebpf_mig_up") == 1
