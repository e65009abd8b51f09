# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one machine: two network namespaces, and a link between them whose bandwidth `tc` limits (tbf).

In: a rate. Out: a `Link`. A process started in one of its sides sees the network of that side only. The namespaces
have no name: they exist while we hold them or something runs in them, so nothing is left, however we end. Needs
root and the kernel's veth, and sch_tbf for a rate.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

from pyroute2 import IPRoute

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import procfs

ADDRESSES = {"source": "10.77.0.1", "destination": "10.77.0.2"}
PORT = 4444
_CLONE_NEWNET = 0x40000000
_BURST = 64 << 10
_LATENCY = "20ms"
_OWN = procfs.path("thread-self", "ns/net")
_libc = ctypes.CDLL(None, use_errno=True)


class Link:
    """Two sides, `source` and `destination`; use as a context manager. `rate_bytes` per second each way; 0:
    unlimited.
    """

    def __init__(self, rate_bytes: int = 0) -> None:
        self.rate_bytes = rate_bytes
        self._sides: dict[str, int] = {}

    def __enter__(self) -> Link:
        try:
            for role in ADDRESSES:
                self._sides[role] = _new_namespace()
            self._connect()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, Exception) and not isinstance(error, PreflightError):
                text = str(error).strip() or type(error).__name__
                raise PreflightError(f"no link between two network namespaces: {text}", "run as root") from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._sides.values():
            os.close(descriptor)
        self._sides.clear()

    @contextlib.contextmanager
    def inside(self, role: str) -> Iterator[None]:
        """Moves the calling thread, and what it starts meanwhile, to that side."""
        home = os.open(_OWN, os.O_RDONLY)
        try:
            _enter(self._sides[role])
            yield
        finally:
            _enter(home)
            os.close(home)

    def _connect(self) -> None:
        names = {"source": "src", "destination": "dst"}
        with self.inside("source"), IPRoute() as ip:
            far = {"ifname": names["destination"], "net_ns_fd": self._sides["destination"]}
            ip.link("add", ifname=names["source"], kind="veth", peer=far)
        for role, address in ADDRESSES.items():
            with self.inside(role), IPRoute() as ip:
                for ifname in ("lo", names[role]):
                    ip.link("set", index=ip.link_lookup(ifname=ifname)[0], state="up")
                index = ip.link_lookup(ifname=names[role])[0]
                ip.addr("add", index=index, address=address, prefixlen=24)
                if self.rate_bytes:
                    ip.tc("add", "tbf", index, handle="1:", rate=self.rate_bytes, burst=_BURST, latency=_LATENCY)


def _enter(descriptor: int) -> None:
    """setns(2) of the calling thread."""
    if _libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _new_namespace() -> int:
    """A descriptor of a new network namespace, made by a thread that ends."""
    made: list[int] = []
    errors: list[int] = []

    def make() -> None:
        if _libc.unshare(_CLONE_NEWNET):
            errors.append(ctypes.get_errno())
        else:
            made.append(os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=make, name="namespace")
    thread.start()
    thread.join()
    if errors:
        raise PreflightError(f"no new network namespace: {os.strerror(errors[0])}", "run as root")
    return made[0]
