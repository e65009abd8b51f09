# SPDX-License-Identifier: Apache-2.0
"""The shipped unit with all its hardening, run by a real systemd while real VMs migrate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TRACING, requires
from tests.integration.exporters import OURS, fetch, free_port, is_ready, migrate, report, until, value
from tests.integration.migrations import LASTING
from tests.integration.systemd import manager

pytestmark = requires(*TRACING, "systemd", "private mount namespaces")
ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "ebpf-mig-exporter.service"


@pytest.mark.long
def test_the_shipped_unit_measures_a_migration_reloads_restarts_and_stops(tmp_path: Path) -> None:
    port, variables, file = free_port(), tmp_path / "variables", tmp_path / "exporter.toml"
    variables.write_text(f"EBPF_MIG_EXPORTER_CONFIG_FILE={file}\nEBPF_MIG_EXPORTER_VM={OURS}*\n")
    file.write_text(f'web.listen-address = "127.0.0.1:{port}"\nvm = "none"\n')
    command = f"{Path(sys.executable).parent}/ebpf-mig exporter --state-directory ${{STATE_DIRECTORY}}"
    reload = "".join(f"ExecReload={line}\n" for line in ("", f"{command} --check-config", "kill -HUP $MAINPID"))
    change = f"[Service]\nExecStart=\nExecStart={command}\n{reload}RestartSec=1\nEnvironmentFile={variables}"
    change += f"\nBindReadOnlyPaths={tmp_path} {ROOT} {sys.prefix}"  # PrivateTmp= hides what is below /tmp
    if any(Path(sys.prefix).is_relative_to(home) for home in ("/root", "/home")):
        change += "\nProtectHome=no"  # an installed program is not below these directories, but a clone may be
    with manager(UNIT, change) as systemd:

        def main_pid() -> int:
            return int(systemd.ctl("show", "--value", "--property=MainPID", UNIT.name))

        until(systemd.up)
        systemd.ctl("start", UNIT.name)
        until(lambda: is_ready(port))
        first = main_pid()
        assert "Seccomp:\t2" in Path(f"/proc/{first}/status").read_text()
        migrate(LASTING)
        until(lambda: value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 1, 15)
        (kept,) = systemd.state(UNIT.name).iterdir()
        blackout = report(kept).blackout_ns
        assert blackout is not None and value(port, "ebpf_mig_blackout_seconds_sum") == blackout / 1e9
        assert value(port, "ebpf_mig_errors_total") == 0
        systemd.ctl("reload", UNIT.name)
        file.write_text("keep = 0\n")
        with pytest.raises(subprocess.CalledProcessError):
            systemd.ctl("reload", UNIT.name)
        assert main_pid() == first
        assert fetch(f"http://127.0.0.1:{port}/-/healthy") == "healthy\n"
        file.write_text(f'web.listen-address = "127.0.0.1:{port}"\n')
        os.kill(first, signal.SIGKILL)
        until(lambda: main_pid() not in (0, first) and is_ready(port))
        systemd.ctl("stop", UNIT.name)
        assert systemd.ctl("show", "--value", "--property=Result", UNIT.name) == "success"
        assert not is_ready(port)
