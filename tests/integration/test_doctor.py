# SPDX-License-Identifier: Apache-2.0
"""`doctor` on a machine that can trace, and without the privilege."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ebpf_mig.vmm.cloud_hypervisor.lab import lacks_nested_state
from tests.conftest import requires

DOCTOR = [sys.executable, "-m", "ebpf_mig.cli", "doctor"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)


@pytest.mark.everywhere("doctor")
@requires("root", "/dev/kvm", "bcc", "kernel BTF")
def test_all_that_is_required_is_there() -> None:
    done = run(*DOCTOR, "--json")
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert all(check["state"] == "ok" for check in checks.values() if check["required"])
    assert checks["/dev/kvm"]["fact"] == "API version 12"
    assert "load, attach and fire" in checks["probes"]["fact"]
    lines = run(*DOCTOR).stdout.splitlines()
    assert sum(line.startswith(("ok ", "warning ", "MISSING ")) for line in lines) == len(checks)


@requires("root")
def test_what_is_missing_comes_with_its_remedy() -> None:
    done = run("setpriv", "--bounding-set=-all", "--inh-caps=-all", *DOCTOR)
    assert done.returncode == 3
    assert "MISSING  privilege" in done.stdout and "remedy: run as root" in done.stdout
    assert "tracing cannot work here: privilege" in done.stderr


@requires("/dev/kvm")
def test_what_cloud_hypervisor_needs_of_kvm() -> None:
    checks = {check["name"]: check for check in json.loads(run(*DOCTOR, "--json").stdout)}
    nested = checks["nested state"]
    assert (nested["state"] == "ok") is not lacks_nested_state()
    assert nested["state"] == "ok" or ("preloads a library" in nested["fact"] and nested["remedy"])
    assert checks["Cloud Hypervisor"]["state"] == "ok" or "demo --vmm" in checks["Cloud Hypervisor"]["fact"]
