# SPDX-License-Identifier: Apache-2.0
"""The loader: a short-lived process that compiles, loads and tries the programs. It passes their descriptors on, and
ends. LLVM and its memory are gone with it.

In: nothing. Out: an attached `NodeProbe` and an idle `Tracer`, which hold file descriptors only. The process runs as
`python -m ebpf_mig.exporter.loader_process FD`, with only the capabilities that loading takes.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

import msgspec

from ebpf_mig.errors import PreflightError
from ebpf_mig.exporter.leash import Leash
from ebpf_mig.exporter.spawn import start
from ebpf_mig.linux import capabilities
from ebpf_mig.probes import attach
from ebpf_mig.probes.hook import Hook
from ebpf_mig.probes.inherited import InheritedProgram, ProgramDescription
from ebpf_mig.probes.plan import PlanDescription, receive_plan
from ebpf_mig.probes.run_statistics import BpfStatistics
from ebpf_mig.probes.tiers import AUTO
from ebpf_mig.probes.tracer import Tracer
from ebpf_mig.probes.trigger import NodeProbe
from ebpf_mig.vmm.processes import may_move_plainly

TIMEOUT_S = 120.0
"""Compiling takes a second or two, and longer on a node that is out of memory."""
_MAX_FDS = 253
"""The kernel's SCM_MAX_FD (include/net/scm.h)."""
_MESSAGE_MOST_BYTES = 1 << 20


class LoadedObjects(msgspec.Struct, frozen=True, kw_only=True):
    """What the loader sends with the descriptors, or only `error` and `remedy`."""

    error: str = ""
    remedy: str = ""
    node: ProgramDescription | None = None
    node_hooks: list[Hook] = []
    trace: PlanDescription | None = None


def load_apart(meanwhile: Callable[[], object] = bool) -> tuple[NodeProbe, Tracer]:
    """Loads everything in another process. Raises PreflightError as if it had loaded here.

    `meanwhile`: other preparations, which run here while the compiler runs there.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _MESSAGE_MOST_BYTES)
    leash = Leash()
    given = [theirs.fileno(), leash.theirs]
    loader = start("ebpf_mig.exporter.loader_process", str(theirs.fileno()), fds=given)
    leash.tie(loader.pid)  # it holds BPF programs
    theirs.close()
    try:
        meanwhile()
        ours.settimeout(TIMEOUT_S)
        data, fds, _, _ = socket.recv_fds(ours, _MESSAGE_MOST_BYTES, _MAX_FDS)
    except TimeoutError as error:
        raise PreflightError(f"the BPF programs were not loaded within {TIMEOUT_S:.0f} s", "ebpf-mig doctor") from error
    finally:
        ours.close()
        leash.let_go()  # it has finished, or will not
        loader.wait()
    if not data:
        raise PreflightError(f"the loader process ended with status {loader.returncode}", "ebpf-mig doctor")
    loaded = msgspec.json.decode(data, type=LoadedObjects)
    if loaded.error or loaded.node is None or loaded.trace is None:
        raise PreflightError(loaded.error, loaded.remedy or None)
    node = NodeProbe((InheritedProgram(loaded.node, fds), loaded.node_hooks))
    return node, Tracer(plan=receive_plan(loaded.trace, fds), moves_plainly=may_move_plainly)


def _load(channel: socket.socket) -> None:
    """Main function of the loader."""
    fds: list[int] = []
    try:
        capabilities.keep_only(capabilities.LOADER)
        node, statistics = NodeProbe(), BpfStatistics()
        plan = attach.load((), os.environ.get("EBPF_MIG_TIER", AUTO), statistics)
        # a program that does not attach or fire is an error now
        tiers = attach.arm(plan, statistics, seen=False, by_everybody=True)
        attach.disarm(plan, by_everybody=True)
        trace = attach.describe(plan, tiers, fds)
        loaded = LoadedObjects(node=node.describe(fds), node_hooks=list(node.hooks), trace=trace)
    except PreflightError as error:
        loaded, fds = LoadedObjects(error=str(error), remedy=error.remedy or ""), []
    socket.send_fds(channel, [msgspec.json.encode(loaded)], fds)


if __name__ == "__main__":
    _load(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # nothing to clean up: the watch holds the descriptors now
