# SPDX-License-Identifier: Apache-2.0
"""A pair of lab VMs on two network namespaces, with a link between them whose bandwidth `tc` limits (tbf).

In: a scenario and a rate. Out: what `QemuPair` gives; the destination listens on the far end of a veth pair. Namespaces
and link are gone on leaving. Needs root and the kernel's veth and sch_tbf.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from pyroute2 import IPRoute, NetNS, netns

from ebpf_mig.lab.qemu import QemuPair, QemuVm
from ebpf_mig.lab.scenario import Scenario

SOURCE, DESTINATION = "10.77.0.1", "10.77.0.2"
_BURST = 64 << 10
_LATENCY = "20ms"


@contextlib.contextmanager
def limited(rate_bytes: int) -> Iterator[dict[str, str]]:
    """Two namespaces, by role, joined by a link of `rate_bytes` a second in either direction."""
    names = {role: f"ebpf-mig-{os.getpid()}-{role}" for role in ("source", "destination")}
    made: list[str] = []
    try:
        for name in names.values():
            netns.create(name)
            made.append(name)
        with IPRoute() as ip:
            near = {"ifname": "src", "net_ns_fd": names["source"]}
            ip.link(
                "add",
                ifname=f"ebm{os.getpid()}",
                kind="veth",
                peer={"ifname": "dst", "net_ns_fd": names["destination"]},
            )
            index = ip.link_lookup(ifname=f"ebm{os.getpid()}")[0]
            ip.link("set", index=index, **near)
        for role, ifname, address in (("source", "src", SOURCE), ("destination", "dst", DESTINATION)):
            with NetNS(names[role]) as ns:
                index = ns.link_lookup(ifname=ifname)[0]
                ns.addr("add", index=index, address=address, prefixlen=24)
                ns.link("set", index=index, state="up")
                ns.tc("add", "tbf", index, handle="1:", rate=rate_bytes, burst=_BURST, latency=_LATENCY)
        yield names
    finally:
        for name in made:
            netns.remove(name)


class LinkedPair(QemuPair):
    """Source and destination, each in its own namespace."""

    def __init__(self, scenario: Scenario, names: dict[str, str], extra: Sequence[str] = ()) -> None:
        super().__init__(scenario, extra=extra)
        self._names = names

    def _start(self, role: str, more: Sequence[str]) -> QemuVm:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            netns.setns(self._names[role])
            return super()._start(role, more)
        finally:
            netns.setns(home)
            os.close(home)

    def _uri(self) -> str:
        return f"tcp:{DESTINATION}:4444"
