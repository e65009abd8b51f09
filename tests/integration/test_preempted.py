# SPDX-License-Identifier: Apache-2.0
"""How long a vCPU thread was preempted inside KVM_RUN. Witness: the run delay that the scheduler counts.

A guest that spins shares its CPU with a process that spins. Then a signal ends its KVM_RUN.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ebpf_mig.recording.events import VcpuExit
from ebpf_mig.recording.file import read_recording
from tests.companion import Companion
from tests.conftest import requires
from tests.integration.exporters import PROGRAM

pytestmark = requires("root", "/dev/kvm", "bcc", "kernel BTF")

MS = 1_000_000
GUEST = """
import json, os, signal, sys, threading, time
from tests.truth import kvm
vm = kvm.Vm(); vm.set_slot(0, 0, 2 << 20); kvm.write(vm, kvm.CODE, kvm.CPU.spin)
vcpu = kvm.Vcpu(vm, 0); vcpu.prepare(0)
signal.signal(signal.SIGUSR1, lambda *_: None); kvm.pin(0)
tid = threading.main_thread().native_id
def end():
    time.sleep(0.4); signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
print("ready", flush=True); sys.stdin.readline()
threading.Thread(target=end).start()
before = kvm.run_delay_ns(); began = time.monotonic_ns()
assert vcpu.run() < 0
took = time.monotonic_ns() - began
print(json.dumps({"waited": kvm.run_delay_ns() - before, "took": took}), flush=True)
sys.stdin.readline()
"""
SPINNER = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass"


@pytest.mark.parametrize("beside", [0, 1])
def test_the_time_without_a_cpu_is_that_of_the_scheduler(beside: int, tmp_path: Path) -> None:
    path = tmp_path / "x.rec"
    with Companion([sys.executable, "-c", GUEST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as guest:
        assert guest.stdin is not None and guest.stdout is not None and guest.stdout.readline() == "ready\n"
        spinners = [subprocess.Popen([sys.executable, "-c", SPINNER]) for _ in range(beside)]
        command = [*PROGRAM, "record", "--pid", str(guest.pid), "-o", str(path)]
        with Companion(command, stderr=subprocess.PIPE, text=True) as recorder:
            assert recorder.stderr is not None
            while "tracing" not in (line := recorder.stderr.readline()):
                assert line, "the recorder ended"
            print(file=guest.stdin, flush=True)
            said = json.loads(guest.stdout.readline())
            recorder.send_signal(signal.SIGINT)
            recorder.communicate(timeout=30)
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
        print(file=guest.stdin, flush=True)
    (ended,) = [e for e in read_recording(str(path)).events if isinstance(e, VcpuExit)]
    # The guest's process can lose its CPU between its own readings and the call, too, for a slice or two.
    assert abs(ended.preempted_ns - said["waited"]) <= max(said["waited"] // 20, 10 * MS), (said, ended)
    assert ended.ret == -4 and ended.on_cpu_ns + ended.preempted_ns <= said["took"]
    assert not beside or ended.preempted_ns >= 100 * MS
