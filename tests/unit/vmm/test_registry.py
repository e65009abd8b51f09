# SPDX-License-Identifier: Apache-2.0
"""One folder and one line make a VMM known to every command."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ebpf_mig import vmm
from ebpf_mig.errors import UsageError
from tests.unit.commands.test_cli import ROOT

TOY = "tests.unit.vmm.toy"


def with_toy(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a separate process that has one more VMM."""
    line = f"from ebpf_mig import vmm; vmm.ADAPTERS['toy'] = {TOY!r}\n"
    return subprocess.run(
        [sys.executable, "-c", line + code, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


def typed(*arguments: str) -> subprocess.CompletedProcess[str]:
    return with_toy("import sys; from ebpf_mig.cli import main; sys.exit(main(sys.argv[1:]))", *arguments)


def test_its_options_are_those_of_migrate() -> None:
    values = ["--speed", "8Mbit", "--patience", "2s", "--wheels", "3", "--loud"]
    run = typed("migrate", "toy", "teddy", *values)
    assert run.returncode == 4, run.stderr
    wanted = {"loud": True, "patience": 2 * 10**9, "shape": "round", "speed": 10**6, "vm": "teddy", "wheels": 3}
    assert f"asked for {wanted}" in run.stderr
    assert "not in the range 1<=x<=4" in typed("migrate", "toy", "teddy", "--wheels", "5").stderr
    said = typed("migrate", "toy", "--help").stdout
    assert "Usage: ebpf-mig migrate toy [OPTIONS] VM" in said
    assert "Toys have no manual." in said
    assert "ebpf-mig migrate toy teddy" in said


def test_its_lab_is_that_of_demo_and_bench() -> None:
    run = typed("demo", "--vmm", "toy", "--vcpus", "2", "--local", "--vmm-binary", "/bin/toy")
    assert (run.returncode, "lab of 2 vCPUs, /bin/toy, local True, link False" in run.stderr) == (4, True), run.stderr
    run = typed("bench", "slow-dirty", "--vmm", "toy", "-n", "1", "-o", "/none/x")
    assert "lab of 1 vCPUs, None, local False, link False" in run.stderr
    assert "ebpf-mig demo --vmm toy" in typed("demo", "--help").stdout


def test_its_processes_and_checks_are_known(tmp_path: Path) -> None:
    path = str(tmp_path / "toy.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        code = f"""
import json
from ebpf_mig.commands.doctor_checks import checks
from ebpf_mig.exporter.observation import vmms
from ebpf_mig.vmm.identify import process_behind
named = vmm.vmm_named("toyvmm-1234567"), vmm.vmm_named("teddy")
print(json.dumps([named, vmms(), process_behind({path!r}), [c.name for c in checks()]]))
"""
        run = with_toy(code)
    assert run.returncode == 0, run.stderr
    named, labels, pid, checks = json.loads(run.stdout)
    assert named == ["toy", ""]
    assert "toy" in labels
    assert pid == 4711
    assert "toy box" in checks


def test_its_marks_and_rows_are_in_the_breakdown_and_the_report() -> None:
    code = """
from tests.unit.scripts import cloud_hypervisor_53
script = cloud_hypervisor_53()
script.mark(60_000, 1000, "toy.downtime_ms", 7)
b = script.result().breakdown
print([(w.name, w.explanation) for w in b.witnesses if w.name.startswith("toy.")])
from ebpf_mig.report.text_vmm import witnesses
print([row.verbose for row in witnesses(b.witnesses) if "toy.wound" in row.text])
"""
    run = with_toy(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["[('toy.downtime_ms', 'as toys count'), ('toy.wound', 'by hand')]", "[True]"]


def test_names_are_those_of_the_adapters() -> None:
    assert [one.name for one in vmm.adapters()] == list(vmm.ADAPTERS)
    with pytest.raises(UsageError, match="no VMM is called 'bochs'"):
        vmm.adapter("bochs")


@pytest.mark.parametrize(
    ("comm", "name"),
    [
        ("qemu-system-x86", "qemu"),
        ("kvm", "qemu"),
        (".qemu-system-x8", "qemu"),
        ("cloud-hyperviso", "cloud-hypervisor"),
        ("bash", ""),
    ],
)
def test_a_process_is_recognised_by_its_name(comm: str, name: str) -> None:
    assert vmm.vmm_named(comm) == name
