# SPDX-License-Identifier: Apache-2.0
"""A VMM with a thread that is always busy, beside a vCPU: `python -m tests.truth.beside GUEST`.

In: what the guest does: `spins`, `halts`, or `paused`, if nothing calls KVM_RUN. Out: on stdout the ids of the busy
thread and of the vCPU's, if there is one. It ends with its stdin.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from tests.companion import Companion
from tests.truth import kvm
from tests.truth.parts import say

SPINS, HALTS, PAUSED = "spins", "halts", "paused"
VCPU_ID = 3
"""As a VMM with an APIC id of its own choice gives it to KVM_CREATE_VCPU."""
_CODE = {SPINS: kvm.CPU.spin, HALTS: kvm.CPU.halt, PAUSED: kvm.CPU.halt}


@contextlib.contextmanager
def vmm(guest: str) -> Iterator[tuple[int, list[int]]]:
    """(pid, thread ids) of such a VMM, once both threads are at work."""
    command = [sys.executable, "-m", "tests.truth.beside", guest]
    with Companion(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        tids = [int(word) for word in process.stdout.readline().split()]
        time.sleep(0.2)
        yield process.pid, tids
        process.kill()


def _work() -> None:
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)


def main(guest: str) -> None:
    """Runs the VMM."""
    vm = kvm.Vm()
    vm.set_slot(0, 0, 1 << 20)
    vcpu = kvm.Vcpu(vm, VCPU_ID)
    kvm.write(vm, kvm.CODE, _CODE[guest])
    vcpu.prepare(0)
    tasks = [_work] if guest == PAUSED else [_work, vcpu.run]
    threads = [threading.Thread(target=task, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    say(" ".join(str(thread.native_id) for thread in threads))
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
