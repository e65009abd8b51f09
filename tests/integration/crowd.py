# SPDX-License-Identifier: Apache-2.0
"""Many idle VMs at once: `python -m tests.integration.crowd N PORTS --name NAME`.

In: the number of VMs, and of TCP ports on which each listens. Out: `ready` on stdout once all exist; they end at EOF on
stdin. Each VM is a forked process with a real KVM VM and one more thread.
"""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import sys
import threading

_KVM_CREATE_VM = 0xAE01


def _live(ready: int, over: int, ports: int) -> None:
    """One VM, which exists until EOF on `over`."""
    vm = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC), _KVM_CREATE_VM, 0)
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(ports)]
    thread = threading.Thread(target=os.read, args=(over, 1))
    thread.start()
    os.write(ready, b"r")
    thread.join()
    assert vm >= 0 and len(listening) == ports


def main(number: int, ports: int) -> None:
    """See the module."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    ready, ready_end = os.pipe()
    over, ended = os.pipe()
    for _ in range(number):
        if os.fork() == 0:
            os.close(ended)
            _live(ready_end, over, ports)
            os._exit(0)
    for _ in range(number):
        assert os.read(ready, 1) == b"r"
    print("ready", flush=True)  # noqa: T201
    sys.stdin.read()
    os.close(ended)
    for _ in range(number):
        os.wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
