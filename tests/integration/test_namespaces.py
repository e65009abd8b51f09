# SPDX-License-Identifier: Apache-2.0
"""Tool and VMMs in pid and time namespaces. The witness is the kernel's tracepoint signal_generate, read by tracefs."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebpf_mig.collector import analyse
from ebpf_mig.recording.events import Kick, Thread
from ebpf_mig.recording.file import Recording, read_recording
from ebpf_mig.vmm.qemu.lab import find_binary
from tests.conftest import TRACING, requires
from tests.truth.parts import SLOWNESS
from tests.truth.tracefs import traced

pytestmark = requires(*TRACING)

MS = 1_000_000
TOOL = [sys.executable, "-m", "ebpf_mig"]
PID_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child"]
OWN_PROC = [
    "--mount", "--propagation", "unchanged",
    "sh", "-c", 'mount --make-rprivate /proc && mount -t proc proc /proc && exec "$@"', "sh",
]  # fmt: skip
"""As --mount-proc does. That one also works on the mount at "/", and a chroot has none."""
TIME_NAMESPACE = ["unshare", "--time", "--fork", "--kill-child", "--monotonic", "86400", "--boottime", "86400"]
_SIGNAL = re.compile(r"sig=(\d+) .* pid=(\d+) grp=")
QUICK = ["--memory", "128M", "--working-set", "2M", "--force"]


def demo(*arguments: str, inside: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*(inside or []), *TOOL, "demo", *QUICK, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)


def wrapped(path: Path, line: str) -> str:
    """A script that starts QEMU; `line` is its shell command, with QEMU's arguments in "$@"."""
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor"],
        ["record", "--pid", "1"],
        ["demo"],
        ["migrate", "qemu", "--source", "a", "--destination", "b", "--uri", "tcp:127.0.0.1:1"],
        ["watch"],
        ["exporter", "--web.listen-address", "127.0.0.1:0"],
    ],
    ids=lambda arguments: str(arguments[0]),
)
@pytest.mark.parametrize("mount", [OWN_PROC, []], ids=["own proc", "the host's proc"])
def test_the_tool_in_a_pid_namespace_says_what_to_do(arguments: list[str], mount: list[str], tmp_path: Path) -> None:
    state = ["--state-directory", str(tmp_path / "state")] if arguments[0] in {"watch", "exporter"} else []
    command = [*PID_NAMESPACE, *mount, *TOOL, *arguments, *state]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3, done.stderr
    assert "--pid=host" in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_tool_in_a_time_namespace_stamps_by_the_hosts_clock(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    done = demo("--output", str(path), inside=TIME_NAMESPACE)
    assert done.returncode == 0, done.stderr
    recording = read_recording(path)
    assert abs(recording.header.begin_ns - time.monotonic_ns()) < 120 * 10**9
    marks = {mark.name: mark.at_ns for mark in recording.events if hasattr(mark, "detail")}
    breakdown = analyse(recording).breakdown
    assert breakdown.window_ns is not None
    assert abs(marks["qmp.STOP"] - recording.header.begin_ns) < 60 * 10**9
    stop = next(witness for witness in breakdown.witnesses if witness.name == "qmp.STOP..RESUME")
    assert abs(stop.value_ns) < 60 * 10**9


def signals(lines: list[tuple[int, str]]) -> list[tuple[int, int, int]]:
    """(instant in ns, host's thread id, signal) of each line of signal_generate."""
    return [(at, int(m[2]), int(m[1])) for at, fields in lines if (m := _SIGNAL.search(fields))]


@requires("private mount namespaces")
@pytest.mark.everywhere("tiers")
@pytest.mark.parametrize("tier", ["auto", pytest.param("kprobe", marks=requires("kprobes")), "tracepoint"])
def test_vmms_in_pid_and_time_namespaces_are_measured_like_others(tier: str, tmp_path: Path) -> None:
    """Each QEMU is process 1 of its namespace, with a clock a day ahead. On the host, the ids of its threads there
    belong to kernel threads.
    """
    inside = f'exec {" ".join(PID_NAMESPACE)} {" ".join(TIME_NAMESPACE)} {find_binary(None)} "$@"'
    path = tmp_path / "a.rec"
    with traced("signal/signal_generate") as lines:
        done = demo("--tier", tier, "--vmm-binary", wrapped(tmp_path / "qemu", inside), "--output", str(path))
    assert done.returncode == 0, done.stderr
    recording = read_recording(path)
    assert lines is not None
    _kicks_are_the_kernels(recording, signals(lines))
    breakdown = analyse(recording).breakdown
    assert breakdown.phase_ns("pause") > 0
    assert breakdown.completeness.verdict == "complete", breakdown.completeness.reasons
    stop = next(witness for witness in breakdown.witnesses if witness.name == "qmp.STOP..RESUME")
    assert stop.difference_ns is not None and abs(stop.difference_ns) < 10**9


def _kicks_are_the_kernels(recording: Recording, rows: list[tuple[int, int, int]]) -> None:
    """Each kick has the target that the kernel reports a moment later, and that thread has a name in the recording."""
    kicks = [event for event in recording.events if isinstance(event, Kick)]
    threads = {event.tid: event for event in recording.events if isinstance(event, Thread)}
    assert kicks
    for kick in kicks:
        assert kick.target_tid in threads, "an id of the host"
        hits = [at - kick.at_ns for at, pid, signal in rows if pid == kick.target_tid and signal == kick.signal]
        assert any(-1000 <= after < 5 * MS * SLOWNESS for after in hits), (kick, hits)
    assert {threads[kick.target_tid].vcpu for kick in kicks} <= {0, 1}


def test_vcpus_have_the_vmms_own_index(tmp_path: Path) -> None:
    """With three cores per socket, the second socket's APIC ids begin at 4."""
    inside = 'args=(); for a in "$@"; do [ "$before" = -smp ] && a=6,sockets=2,cores=3; before=$a; args+=("$a"); done\n'
    path = tmp_path / "a.rec"
    wrapper = wrapped(tmp_path / "qemu", f'{inside}exec {find_binary(None)} "${{args[@]}}"')
    done = demo("--vcpus", "6", "--vmm-binary", wrapper, "--output", str(path))
    assert done.returncode == 0, done.stderr
    breakdown = analyse(read_recording(path)).breakdown
    assert {vcpu.vcpu for vcpu in breakdown.vcpus} <= set(range(6))
    assert max(vcpu.vcpu for vcpu in breakdown.vcpus) == 5
