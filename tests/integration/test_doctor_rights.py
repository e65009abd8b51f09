# SPDX-License-Identifier: Apache-2.0
"""`doctor` with subsets of the capabilities: exit code 0 or 3, one line per feature, and no internal error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import requires
from tests.unit.commands.test_cli import ROOT

LARGE = shutil.ignore_patterns("mypy*", "ruff*", "pandas*", "polars*", "pyarrow*", "duckdb*", "numpy*", "kubernetes*")
"""Libraries that `doctor` does not use."""
SUBSETS = ["", "bpf", "perfmon", "bpf,perfmon", "bpf,perfmon,syslog", "sys_admin", "sys_ptrace,dac_read_search"]


@pytest.fixture(scope="module")
def readable() -> Iterator[Path]:
    """Our package and the libraries that it needs, where everybody may read them: the checkout may lie in /root."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # pytest's own directories are for root alone
        directory = Path(name)
        directory.chmod(0o755)
        shutil.copytree(sysconfig.get_path("purelib"), directory, dirs_exist_ok=True, ignore=LARGE)
        shutil.copytree(ROOT / "ebpf_mig", directory / "ebpf_mig")
        subprocess.run(["chmod", "-R", "a+rX", directory], check=True)
        yield directory


@requires("root", "setpriv")
@pytest.mark.parametrize("held", SUBSETS, ids=lambda held: held or "none")
@pytest.mark.parametrize("user", [0, 65534], ids=["root", "nobody"])
def test_doctor_answers_with_any_rights(held: str, user: int, readable: Path) -> None:
    """User nobody cannot enter tracefs (mode 0700) without CAP_DAC_OVERRIDE."""
    keep = ",".join(["-all", *(f"+{name}" for name in held.split(",") if name)])
    rights = [f"--bounding-set={keep}", f"--inh-caps={keep}", f"--ambient-caps={keep}"]
    command = ["setpriv", f"--reuid={user}", "--clear-groups", *rights, sys.executable, "-m", "ebpf_mig", "doctor"]
    # The interpreter's own paths may lead through a directory that only root may enter.
    environment = os.environ | {"PYTHONPATH": str(readable)}
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=False, timeout=200, cwd="/", env=environment
    )
    assert done.returncode in {0, 3}, done.stderr
    assert "Traceback" not in done.stdout + done.stderr and "internal error" not in done.stderr
    assert len(done.stderr.splitlines()) == (1 if done.returncode else 0), done.stderr
    found = json.loads(done.stdout)
    assert {"privilege", "bcc", "probes", "tracefs", "pid namespace"} <= {check["name"] for check in found}
    assert all(check["fact"] and "\n" not in check["fact"] for check in found)
