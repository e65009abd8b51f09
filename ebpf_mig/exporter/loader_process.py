# SPDX-License-Identifier: Apache-2.0
"""Loading apart from running: a short-lived process compiles, loads and tries the programs, hands over what the kernel
gave for them, and is gone, with LLVM and all that it allocated.

In: nothing. Out: a standing `NodeProbe` and an idle `Tracer` that hold file descriptors only. The process runs as
`python -m ebpf_mig.exporter.loader_process FD`, with no capability but the two that loading takes.
"""

from __future__ import annotations

import os
import socket
import sys

import msgspec

from ebpf_mig.errors import PreflightError
from ebpf_mig.exporter.spawn import start
from ebpf_mig.linux import capabilities
from ebpf_mig.probes import attach
from ebpf_mig.probes.hook import Hook
from ebpf_mig.probes.inherited import Description, Handed
from ebpf_mig.probes.tiers import AUTO
from ebpf_mig.probes.tracer import Tracer
from ebpf_mig.probes.trigger import NodeProbe

TIMEOUT_S = 120.0
"""Compiling takes a second or two; a node that is out of memory takes longer."""
_MAX_FDS = 253
"""SCM_MAX_FD of the kernel."""
_MAX_BYTES = 1 << 20


class Parcel(msgspec.Struct, frozen=True, kw_only=True):
    """What the loader says with the descriptors; or `error`, and nothing else."""

    error: str = ""
    remedy: str = ""
    node: Description | None = None
    node_hooks: list[Hook] = []
    trace: attach.Handover | None = None


def load_apart() -> tuple[NodeProbe, Tracer]:
    """Has a process of its own load everything; PreflightError as if it had been done here."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _MAX_BYTES)
    loader = start("ebpf_mig.exporter.loader_process", str(theirs.fileno()), fds=[theirs.fileno()])
    theirs.close()
    try:
        ours.settimeout(TIMEOUT_S)
        data, fds, _, _ = socket.recv_fds(ours, _MAX_BYTES, _MAX_FDS)
    except TimeoutError as error:
        raise PreflightError(f"the BPF programs were not loaded within {TIMEOUT_S:.0f} s", "ebpf-mig doctor") from error
    finally:
        ours.close()
        loader.kill()  # it has done its work, or will not
        loader.wait()
    if not data:
        raise PreflightError(f"the process that loads ended with status {loader.returncode}", "ebpf-mig doctor")
    parcel = msgspec.json.decode(data, type=Parcel)
    if parcel.error or parcel.node is None or parcel.trace is None:
        raise PreflightError(parcel.error, parcel.remedy or None)
    return NodeProbe((Handed(parcel.node, fds), parcel.node_hooks)), Tracer(handed=attach.taken_over(parcel.trace, fds))


def _load(channel: socket.socket) -> None:
    """The short life of the loader."""
    fds: list[int] = []
    try:
        capabilities.keep_only(capabilities.LOADER)
        node, tracer = NodeProbe(), Tracer(tier=os.environ.get("EBPF_MIG_TIER", AUTO))
        tracer.arm()  # what does not attach or never fires is told now
        tracer.disarm()
        parcel = Parcel(node=node.describe(fds), node_hooks=list(node.hooks), trace=tracer.describe(fds))
    except PreflightError as error:
        parcel, fds = Parcel(error=str(error), remedy=error.remedy or ""), []
    socket.send_fds(channel, [msgspec.json.encode(parcel)], fds)


if __name__ == "__main__":
    _load(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # nothing to tidy up: the descriptors live on where they went
