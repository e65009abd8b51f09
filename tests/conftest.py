# SPDX-License-Identifier: Apache-2.0
"""Features of the machine that tests need. Each is probed once. A test without its feature is skipped, and the skip
names it.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.linux import btf
from ebpf_mig.probes import uring
from ebpf_mig.vmm.qemu.adapter import DEFAULT_BINARY
from ebpf_mig.vmm.qemu.lab import ENVIRONMENT as OTHER_QEMU
from tests.truth.kvm import CPU

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background jobs ignore SIGINT. Children inherit that, and then Ctrl-C cannot be tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # Under nohup, SIGHUP is ignored, and children inherit that.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


_LIMIT_A_LINK = """
from pyroute2 import IPRoute
with IPRoute() as ip:
    ip.link("add", ifname="va", kind="veth", peer="vb")
    index = ip.link_lookup(ifname="va")[0]
    ip.tc("add", "tbf", index, handle="1:", rate=125000, burst=65536, latency="20ms")
"""
"""The same as `tc qdisc add dev va root tbf`; run in its own network namespace."""


_FIRES = """
import sys
from ebpf_mig.probes import run_statistics, tiers
counting = run_statistics.BpfStatistics()
sys.exit(not {"kvm", "socket", "split"} <= tiers.Chooser(sys.argv[1]).choose().groups)
"""


def _tier_works(tier: str) -> bool:
    """Whether functions can be traced by that tier. Runs the product's own check in a separate process."""
    return os.geteuid() == 0 and Path("/dev/kvm").exists() and _succeeds(sys.executable, "-c", _FIRES, tier)


def _has_tracepoint(name: str) -> bool:
    return Path(btf.VMLINUX).exists() and name in btf.tracepoints(btf.VMLINUX, [name])


def _dirty_ring() -> bool:
    """KVM_CHECK_EXTENSION of the dirty ring: Linux 5.11 on x86-64, 6.3 on arm64."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR)
    except OSError:
        return False
    try:
        return fcntl.ioctl(fd, 0xAE03, CPU.dirty_ring) > 0
    finally:
        os.close(fd)


def _has_control_groups(controller: str, *files: str) -> bool:
    """Groups that we may make, of version 1 or of version 2 with its controllers passed on. `files`: of version 1."""
    top = Path("/sys/fs/cgroup")
    enabled = top / "cgroup.subtree_control"
    return os.access(top, os.W_OK) and (
        all((top / file).exists() for file in files) or (enabled.exists() and controller in enabled.read_text().split())
    )


_CID_LOCAL = 1
"""VMADDR_CID_LOCAL of include/uapi/linux/vm_sockets.h."""


def _vsock_loopback() -> bool:
    """Whether one process of this host reaches another by vsock. The kernel loads the modules with the first socket."""
    try:
        with (
            socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listens,
            socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as connects,
        ):
            listens.bind((_CID_LOCAL, socket.VMADDR_PORT_ANY))
            listens.listen()
            connects.connect(listens.getsockname())
    except OSError:
        return False
    return True


_LOSE_A_SEGMENT = (
    "ip link set lo up && iptables -A INPUT -p tcp -m length --length 1000 "
    "-m statistic --mode nth --every 2 --packet 0 -j DROP"
)


def npm_package(name: str) -> Path | None:
    """The folder of a package that npm has installed globally."""
    if shutil.which("npm") is None:
        return None
    root = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, check=False).stdout.strip()
    folder = Path(root) / name
    return folder if folder.is_dir() else None


def _names_requests() -> bool:
    return Path(btf.VMLINUX).exists() and uring.arguments() is not None


RINGS = "io_uring that names its requests (Linux 5.18)"
FEATURES: dict[str, Callable[[], bool]] = {
    "root": lambda: os.geteuid() == 0,
    "a clone": (Path(__file__).parents[1] / ".git").exists,
    "/dev/kvm": lambda: os.access("/dev/kvm", os.R_OK | os.W_OK),
    "KVM's dirty ring": _dirty_ring,
    "tracepoints of lock waits": lambda: _has_tracepoint("contention_begin"),
    "bcc": lambda: importlib.util.find_spec("bcc") is not None,
    "kernel BTF": lambda: Path("/sys/kernel/btf/vmlinux").exists(),
    "user namespaces": lambda: _succeeds("unshare", "--user", "--map-root-user", "true"),
    "gcc": lambda: shutil.which("gcc") is not None,
    "llvm-mc": lambda: shutil.which("llvm-mc") is not None,
    "private mount namespaces": lambda: _succeeds("unshare", "--mount", "true"),
    "fentry on every function": functools.cache(lambda: _tier_works("fentry")),
    "kprobes": functools.cache(lambda: _tier_works("kprobe")),
    "bpftrace": lambda: shutil.which("bpftrace") is not None,
    "x86-64": lambda: platform.machine() == "x86_64",
    "chromium and chromedriver": lambda: all(map(shutil.which, ("chromium", "chromedriver"))),
    "QEMU": lambda: shutil.which(os.environ.get(OTHER_QEMU) or DEFAULT_BINARY) is not None,
    "qemu-system-x86_64": lambda: shutil.which(os.environ.get(OTHER_QEMU) or "qemu-system-x86_64") is not None,
    "tc with tbf and veth": lambda: _succeeds("unshare", "--net", sys.executable, "-c", _LIMIT_A_LINK),
    "iptables with length and statistic": lambda: _succeeds("unshare", "--net", "sh", "-c", _LOSE_A_SEGMENT),
    "nft": lambda: _succeeds(
        "unshare", "--net", "nft", "add table ip nat; add chain ip nat c { type nat hook output priority 0; }"
    ),
    "control groups with cpu and freezer": lambda: _has_control_groups(
        "cpu", "cpu/cpu.cfs_quota_us", "freezer/cgroup.procs"
    ),
    "control groups that limit memory": lambda: _has_control_groups("memory", "memory/cgroup.procs"),
    "fish": lambda: shutil.which("fish") is not None,
    "trace_processor_shell": lambda: shutil.which("trace_processor_shell") is not None,
    "promtool": lambda: shutil.which("promtool") is not None,
    "prometheus": lambda: shutil.which("prometheus") is not None,
    "libseccomp": lambda: _succeeds(sys.executable, "-c", "import ctypes; ctypes.CDLL('libseccomp.so.2')"),
    "podman": lambda: shutil.which("podman") is not None,
    "setpriv": lambda: shutil.which("setpriv") is not None,
    "systemd-analyze": lambda: shutil.which("systemd-analyze") is not None,
    "systemd": lambda: all(map(shutil.which, ("/lib/systemd/systemd", "systemctl", "unshare", "nsenter"))),
    "bcrypt": lambda: importlib.util.find_spec("bcrypt") is not None,
    "PyYAML": lambda: importlib.util.find_spec("yaml") is not None,
    "OpenTelemetry": lambda: importlib.util.find_spec("opentelemetry") is not None,
    "kubernetes-validate": lambda: importlib.util.find_spec("kubernetes_validate") is not None,
    "kustomize": lambda: shutil.which("kustomize") is not None,
    "Grafana's schema (tools/grafana_dashboard)": lambda: shutil.which("grafana-dashboard") is not None,
    "otelcol": lambda: shutil.which("otelcol") is not None,
    "socat": lambda: shutil.which("socat") is not None,
    "sshd": lambda: shutil.which("sshd", path=f"{os.environ.get('PATH')}:/usr/sbin") is not None,
    "helm": lambda: shutil.which("helm") is not None,
    "kubeconform": lambda: shutil.which("kubeconform") is not None,
    "libvirtd and virsh": lambda: all(
        shutil.which(name, path=f"{os.environ.get('PATH')}:/usr/sbin") for name in ("libvirtd", "virsh")
    ),
    "python3-libvirt": lambda: importlib.util.find_spec("libvirt") is not None,
    "go": lambda: shutil.which("go") is not None,
    "speedscope (npm -g)": lambda: npm_package("speedscope") is not None,
    "axe-core (npm -g)": lambda: npm_package("axe-core") is not None,
    "vsock loopback": functools.cache(_vsock_loopback),
    "BTF of vsock": lambda: FEATURES["vsock loopback"]() and Path(btf.VSOCK_MODULE).exists(),
    RINGS: _names_requests,
    "openssl": lambda: shutil.which("openssl") is not None,
}
DISTURBED = Path(__file__).parent / "integration"
"""Tests with real VMs and clocks. Another process of the machine can take the CPU from a witness at any instant."""
PARTS = "EBPF_MIG_PARTS"
"""A directory in which the parts of `./check`, each a process, count together: one line for each long test that was
left out, and one for each test that ran again.
"""
MOST_RERUNS = 6
TRACING = ("root", "/dev/kvm", "bcc", "kernel BTF", "qemu-system-x86_64")
LAB = (*TRACING[:-1], "QEMU")
"""What the lab's own VMs need, on x86-64 or arm64."""


def requires(*features: str) -> pytest.MarkDecorator:
    """Skips the test, naming what is missing."""
    missing = [name for name in features if not FEATURES[name]()]
    return pytest.mark.skipif(bool(missing), reason=f"missing feature: {', '.join(missing)}")


def long_but(values: Iterable[Any], *short: Any) -> list[Any]:
    """Parameters of which only those in `short` are not long."""
    return [value if value in short else pytest.param(value, marks=pytest.mark.long) for value in values]


def pytest_configure(config: pytest.Config) -> None:
    """Declares the markers."""
    text = "everywhere(subject): also run in other kernels and user lands, by `python -m tests.vm`"
    config.addinivalue_line("markers", text)
    text = "times: checks durations; in emulated kernels it runs in the machine that has a CPU to itself"
    config.addinivalue_line("markers", text)
    text = "long: takes long, and is far from most changes or repeats on a larger scale; only `./check --all` runs it"
    config.addinivalue_line("markers", text)


def _count(what: str, more: int) -> int:
    """Adds to a count of all parts of `./check`, and returns their sum."""
    if PARTS not in os.environ:
        return more
    with (Path(os.environ[PARTS]) / what).open("a+") as file:
        file.write(f"{what}\n" * more)
        file.seek(0)
        return len(file.readlines())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The marker's subject goes into JUnit files, as a property. A failed test of `DISTURBED` runs once more."""
    reruns = config.pluginmanager.hasplugin("rerunfailures")
    for item in items:
        marker = item.get_closest_marker("everywhere")
        if marker is not None:
            item.user_properties.append(("subject", marker.args[0]))
        if reruns and item.path.is_relative_to(DISTURBED):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Counts the long ones."""
    _count("long", sum(item.get_closest_marker("long") is not None for item in items))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows the first failure of each test that ran again. It may be a rare fault of ours."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.write_sep("_", f"{report.nodeid}, ran again after")
        report.toterminal(terminalreporter._tw)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run with more than `MOST_RERUNS` reruns fails: so many are not the machine's doing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    rerun = _count("reruns", len(reporter.stats.get("rerun", [])) if reporter is not None else 0)
    if rerun > MOST_RERUNS and session.exitstatus == pytest.ExitCode.OK:
        text = f"{rerun} tests failed and passed when run again; at most {MOST_RERUNS} are accepted"
        reporter.write_line(f"\n{text}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
