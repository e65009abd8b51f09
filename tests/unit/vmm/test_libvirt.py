# SPDX-License-Identifier: Apache-2.0
"""The parts of libvirt's adapter that can be tested without a libvirtd."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ebpf_mig.errors import VmmError
from ebpf_mig.vmm.libvirt.client import CancelledError, Virsh, error_of, mib
from tests.conftest import requires
from tests.unit.commands.test_cli import ROOT, run

HIDE = """
import importlib.util as u, sys
real = u.find_spec
u.find_spec = lambda name, *more: None if name == "libvirt" else real(name, *more)
from ebpf_mig.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line where the binding is not installed."""


def without_binding(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDE, *arguments], capture_output=True, text=True, check=False, cwd=ROOT,
        env={"PATH": path},
    )  # fmt: skip


def test_without_libvirt_one_line_says_what_to_install() -> None:
    done = without_binding("migrate", "libvirt", "vm1", "qemu+ssh://b/system", path="/nowhere")
    assert done.returncode == 3
    assert done.stderr.strip().splitlines() == [
        "ebpf-mig: libvirt cannot be asked: neither its Python binding nor virsh is installed; "
        "apt-get install python3-libvirt"
    ]


def test_without_libvirtd_the_demo_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import shutil, sys; shutil.which = lambda *a, **k: None\n"
         "from ebpf_mig.cli import main; sys.exit(main(['demo', '--vmm', 'libvirt']))"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 3
    assert "apt-get install libvirt-clients libvirt-daemon-system qemu-system-x86" in done.stderr


@pytest.mark.parametrize(
    "option", [("--direct",), ("--parallel", "2"), ("--tls",), ("--migrate-uri", "tcp://10.0.0.2")]
)
def test_a_tunnel_excludes(option: tuple[str, ...]) -> None:
    done = run("migrate", "libvirt", "vm1", "qemu+ssh://b/system", "--tunnelled", *option)
    assert (done.returncode, "a tunnel has one connection" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("option", [("--two-hosts",), ("--local",), ("--transport", "unix")])
def test_what_its_lab_cannot(option: tuple[str, ...]) -> None:
    done = run("demo", "--vmm", "libvirt", *option)
    assert (done.returncode == 2 and f"leave {option[0]} out" in done.stderr) or "use --transport tcp" in done.stderr


@requires("libvirtd and virsh", "python3-libvirt")
def test_a_libvirt_that_does_not_answer_is_named() -> None:
    done = run("migrate", "libvirt", "vm1", "qemu+ssh://b/system", "--connect", "qemu:///system?socket=/nowhere/sock")
    assert done.returncode == 4
    assert "cannot connect to libvirt at qemu:///system?socket=/nowhere/sock: " in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@requires("libvirtd and virsh")
def test_virsh_may_answer_with_any_bytes() -> None:
    """It repeats the name as it is."""
    with pytest.raises(VmmError, match="failed to get domain 'vm\N{REPLACEMENT CHARACTER}'"):
        Virsh("test:///default").domain("vm\udcff")


def test_errors_are_one_line_and_a_cancellation_is_told_apart() -> None:
    text = "error: operation aborted: migration out job: canceled by client\n"
    assert isinstance(error_of(text), CancelledError)
    assert isinstance(error_of("whatever", 78), CancelledError)
    plain = error_of("error: internal error:\n  no route\n")
    assert not isinstance(plain, CancelledError) and "\n" not in str(plain)
    assert str(error_of("")) == "libvirt gives no reason"


def test_bandwidths_are_mib_and_never_nothing() -> None:
    assert [mib(1), mib(1 << 20), mib((10 << 20) + 1), mib(125_000_000)] == [1, 1, 10, 119]
