# SPDX-License-Identifier: Apache-2.0
"""Checks of this machine: feature tests, never version tests.

In: nothing. Out: a `Check` for each feature, with what was found and the exact remedy. bcc is checked in a separate
process, so that LLVM is not loaded here and a broken installation cannot end this process.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ebpf_mig.commands import confinement
from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import btf
from ebpf_mig.linux.capabilities import capabilities, require_capabilities, require_privilege
from ebpf_mig.linux.check import MISSING, OK, WARN, Check
from ebpf_mig.linux.namespaces import require_host_pids
from ebpf_mig.linux.process import python_environment
from ebpf_mig.probes import uring
from ebpf_mig.probes.hook_points import EXTRAS
from ebpf_mig.vmm import adapters

_KVM_GET_API_VERSION = 0xAE00
_PROBE_BCC = "import bcc; from bcc import libbcc; print(getattr(bcc, '__version__', '?'), bcc.__file__)"


def checks() -> Iterator[Check]:
    """All checks, the required ones first."""
    questions: list[tuple[str, bool, Callable[[], Check]]] = [
        ("privilege", True, _privilege), ("user namespace", True, confinement.user_namespace),
        ("seccomp", True, confinement.seccomp), ("AppArmor", False, confinement.apparmor),
        ("lockdown", False, confinement.lockdown), ("bcc", True, _bcc), ("kernel BTF", True, _kernel_btf),
        ("/dev/kvm", False, _kvm), ("probes", True, _loads), ("tracepoints", False, _extras),
        ("tracefs", False, _tracefs), ("BPF statistics", False, _statistics), ("clocksource", False, _clock),
    ]  # fmt: skip
    for name, required, question in questions:
        yield from _answers(name, required, lambda ask=question: [ask()])  # type: ignore[misc]
    for adapter in adapters():
        yield from _answers(adapter.name, False, adapter.checks)
    yield from _answers("pid namespace", True, lambda: [_namespace()])


def _answers(name: str, required: bool, ask: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The result of one check. An error in it becomes its result, so that doctor itself cannot fail."""
    try:
        yield from ask()
    except subprocess.TimeoutExpired as error:
        yield Check(name, MISSING if required else WARN, f"no answer within {error.timeout:.0f} s", required=required)
    except Exception as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        yield Check(name, MISSING if required else WARN, f"the check failed: {why}", "run as root", required)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _privilege() -> Check:
    try:
        require_capabilities()
    except PreflightError as error:
        return Check("privilege", MISSING, str(error), error.remedy or "", required=True)
    return Check("privilege", OK, f"uid {os.geteuid()} with {', '.join(sorted(capabilities()))}", required=True)


def _bcc() -> Check:
    run = subprocess.run(
        [sys.executable, "-Pc", _PROBE_BCC],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=60,
        cwd="/",
    )
    if run.returncode == 0:
        version, _, where = run.stdout.strip().partition(" ")
        return Check("bcc", OK, f"{version} ({where})", required=True)
    why = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
    remedy = "apt-get install python3-bpfcc, and use /usr/bin/python3 or a venv of it with --system-site-packages"
    return Check("bcc", MISSING, f"{sys.executable} cannot import it: {why}", remedy, required=True)


def _kernel_btf() -> Check:
    try:
        found = btf.offsets(btf.VMLINUX, [("task_struct", "files"), ("file", "f_inode")])
    except PreflightError as error:
        return Check("kernel BTF", MISSING, str(error), error.remedy or "", required=True)
    absent = [".".join(member) for member, offset in found.items() if offset is None]
    if absent:
        return Check("kernel BTF", MISSING, f"lacks {', '.join(absent)}", "use a distribution kernel", required=True)
    return Check("kernel BTF", OK, f"{btf.VMLINUX} of {platform.release()}", required=True)


def _kvm() -> Check:
    remedy = "modprobe kvm_intel (or kvm_amd); inside a VM: enable nested virtualisation for it"
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return Check("/dev/kvm", WARN, "permission denied", "usermod -aG kvm $USER, or run as root")
    except OSError as error:
        return Check("/dev/kvm", WARN, f"{error.strerror}; demo will not run here", remedy)
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION, 0)
    except OSError as error:
        return Check("/dev/kvm", WARN, f"opens, but is no KVM: {error.strerror}", remedy)
    finally:
        os.close(fd)
    return Check("/dev/kvm", OK, f"API version {version}")


def _loads() -> Check:
    """Compiles, loads and fires the best probes that work, in a separate process."""
    try:
        require_host_pids()
        require_privilege()
    except PreflightError:
        return Check("probes", MISSING, "not tried, because of what else is MISSING", required=True)
    script = (
        "import json, os, ebpf_mig.probes.tracer as t\n"
        "tracer = t.Tracer([os.getpid()]); tracer.arm(); print(json.dumps(tracer.attached))"
    )
    run = subprocess.run(
        [sys.executable, "-Pc", script],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=120,
        env=python_environment(),
    )
    if run.returncode == 0:
        tiers: dict[str, list[str]] = {}
        for signal, tier in sorted(json.loads(run.stdout).items()):
            tiers.setdefault(tier, []).append(signal)
        by_tier = "; ".join(f"{tier}: {', '.join(signals)}" for tier, signals in sorted(tiers.items()))
        return Check("probes", OK, f"load, attach and fire ({by_tier})", required=True)
    why = (run.stderr.strip().splitlines() or ["no reason given"])[-1].rpartition("PreflightError: ")[2]
    remedy = "see the lines above; kernel 5.8 or newer with CONFIG_BPF_SYSCALL is needed"
    return Check("probes", MISSING, why, remedy, required=True)


def _extras() -> Check:
    wanted = {name: extra.signal for extra in EXTRAS for name, _ in extra.hooks}
    try:
        absent = set(wanted) - uring.usable(btf.tracepoints(btf.VMLINUX, set(wanted)))
    except PreflightError as error:
        return Check("tracepoints", WARN, str(error))
    if absent:
        signals = ", ".join(sorted({wanted[name] for name in absent}))
        fact = f"no {', '.join(sorted(absent))}: not seen: {signals}"
        return Check("tracepoints", WARN, fact, "Linux 5.19 or newer has those of locks, 6.10 or newer has all")
    return Check("tracepoints", OK, ", ".join(sorted(wanted)))


def _tracefs() -> Check:
    for path in ("/sys/kernel/tracing/events", "/sys/kernel/debug/tracing/events"):
        try:
            if stat.S_ISDIR(os.stat(path).st_mode):  # noqa: PTH116 - is_dir hides a refusal, or raises it, by version
                return Check("tracefs", OK, path)
        except PermissionError:
            return Check("tracefs", OK, f"{path} belongs to root")
        except OSError:
            continue
    return Check(
        "tracefs",
        WARN,
        "not mounted; from Linux 7 on, events of system calls can be missed",
        "mount -t tracefs nodev /sys/kernel/tracing",
    )


def _statistics() -> Check:
    from ebpf_mig.probes.run_statistics import BpfStatistics

    statistics = BpfStatistics()
    try:
        if statistics.enabled:
            return Check("BPF statistics", OK, "our overhead can be measured")
        fact = "refused: overhead and silent probes stay unknown"
        return Check("BPF statistics", WARN, fact, "run as root on Linux 5.8 or newer")
    finally:
        statistics.close()


def _clock() -> Check:
    source = _read("/sys/devices/system/clocksource/clocksource0/current_clocksource") or "unknown"
    if source in {"tsc", "kvm-clock", "arch_sys_counter"}:
        return Check("clocksource", OK, source)
    return Check("clocksource", WARN, f"{source}: each timestamp is slow", "boot with tsc=reliable if the TSC is")


def _namespace() -> Check:
    try:
        require_host_pids()
    except PreflightError as error:
        return Check("pid namespace", MISSING, str(error), error.remedy or "", required=True)
    return Check("pid namespace", OK, "the host's", required=True)
