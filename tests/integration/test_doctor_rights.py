# SPDX-License-Identifier: Apache-2.0
"""`doctor` with subsets of the capabilities: exit code 0 or 3, one line per feature, and no internal error."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import requires

SUBSETS = ["", "bpf", "perfmon", "bpf,perfmon", "bpf,perfmon,syslog", "sys_admin", "sys_ptrace,dac_read_search"]


@requires("root", "setpriv")
@pytest.mark.parametrize("held", SUBSETS, ids=lambda held: held or "none")
@pytest.mark.parametrize("user", [0, 65534], ids=["root", "nobody"])
def test_doctor_answers_with_any_rights(held: str, user: int) -> None:
    """User nobody cannot enter tracefs (mode 0700) without CAP_DAC_OVERRIDE."""
    keep = ",".join(["-all", *(f"+{name}" for name in held.split(",") if name)])
    rights = [f"--bounding-set={keep}", f"--inh-caps={keep}", f"--ambient-caps={keep}"]
    command = ["setpriv", f"--reuid={user}", "--clear-groups", *rights, sys.executable, "-m", "ebpf_mig", "doctor"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode in {0, 3}, done.stderr
    assert "Traceback" not in done.stdout + done.stderr and "internal error" not in done.stderr
    assert len(done.stderr.splitlines()) == (1 if done.returncode else 0), done.stderr
    found = json.loads(done.stdout)
    assert {"privilege", "bcc", "probes", "tracefs", "pid namespace"} <= {check["name"] for check in found}
    assert all(check["fact"] and "\n" not in check["fact"] for check in found)
