# SPDX-License-Identifier: Apache-2.0
"""`doctor` on a machine that can trace, and without the privilege."""

from __future__ import annotations

import errno
import json
import platform
import subprocess
import sys

import pytest

from ebpf_mig.linux.bpf import SYS_BPF
from ebpf_mig.linux.perf import SYS_PERF_EVENT_OPEN
from ebpf_mig.vmm.cloud_hypervisor.lab import lacks_nested_state
from tests.conftest import requires
from tests.integration.test_cli import FILTERED

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


def checked(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    """The checks that are not ok, by name."""
    return {check["name"]: check for check in json.loads(done.stdout) if check["state"] != "ok"}


ELSE = {
    "tracefs",
    "BPF statistics",
    "Cloud Hypervisor",
    "Firecracker",
    "nested state",
    "QEMU",
    "libvirt",
    "/dev/kvm",
    "tracepoints",
}
"""Warnings that say something else of this machine."""
USERS = ["unshare", "--user", "--map-root-user"]


@requires("root", "user namespaces")
def test_root_of_a_user_namespace_is_not_the_hosts() -> None:
    """It has every capability, and may not use them for BPF. Each command says so before it starts anything."""
    done = run(*USERS, *DOCTOR, "--json")
    found = checked(done)
    assert done.returncode == 3 and "user namespace, probes missing" in done.stderr
    assert found["user namespace"]["state"] == found["probes"]["state"] == "missing"
    assert "hostUsers" in found["user namespace"]["remedy"] and not found["probes"]["remedy"]
    assert set(found) <= {"user namespace", "probes", *ELSE}
    refused = run(*USERS, *DOCTOR[:-1], "record", "--pid", "1")
    assert refused.returncode == 3 and refused.stderr.count("\n") == 1, refused.stderr
    assert "in a user namespace, where root may not load BPF programs" in refused.stderr


@requires("root", "bcc", "kernel BTF")
@pytest.mark.parametrize(
    ("number", "state", "fact"),
    [
        (SYS_BPF, "missing", "a seccomp filter forbids bpf(2)"),
        (SYS_PERF_EVENT_OPEN, "warn", "a filter forbids perf_event_open(2)"),
        ({}, "ok", "a filter, which allows bpf(2) and perf_event_open(2)"),
    ],
    ids=["bpf", "perf_event_open", "another"],
)
def test_a_seccomp_filter_has_one_line(number: dict[str, int], state: str, fact: str) -> None:
    forbidden = str(number.get(platform.machine(), 10**6))
    done = run(sys.executable, "-c", FILTERED, forbidden, str(errno.EPERM), *DOCTOR[1:], "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert (checks["seccomp"]["state"], state == "missing") == (state, done.returncode == 3)
    assert checks["seccomp"]["fact"].startswith(fact) and (checks["seccomp"]["remedy"] or state == "ok")
    assert [name for name, check in checks.items() if "seccomp" in check["fact"] + check["remedy"]] == (
        [] if state == "ok" else ["seccomp"]
    )


@requires("/dev/kvm")
def test_what_cloud_hypervisor_needs_of_kvm() -> None:
    checks = {check["name"]: check for check in json.loads(run(*DOCTOR, "--json").stdout)}
    nested = checks["nested state"]
    assert (nested["state"] == "ok") is not lacks_nested_state()
    assert nested["state"] == "ok" or ("preloads a library" in nested["fact"] and nested["remedy"])
    assert checks["Cloud Hypervisor"]["state"] == "ok" or "demo --vmm" in checks["Cloud Hypervisor"]["fact"]
