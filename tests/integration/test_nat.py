# SPDX-License-Identifier: Apache-2.0
"""Two hosts with NAT between them: each sees other addresses, so the stream shows what belongs together.

Two network namespaces and nftables. The witness is QEMU's own trace.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_mig.breakdown import Breakdown, PairedBy
from ebpf_mig.lab.netns import ADDRESSES, PORT, Link
from ebpf_mig.vmm.qemu.lab import QemuPair
from tests.conftest import TRACING, requires
from tests.integration.migrations import LASTING
from tests.integration.shapes import OPTIONS, Tool, completed, joined, start, watched, whole
from tests.integration.test_results import Qmp

pytestmark = [requires(*TRACING, "tc with tbf and veth", "nft"), pytest.mark.timeout(120), pytest.mark.long]

BEHIND, SEEN = "10.99.0.2", "10.77.0.9"
"""Where the source finds the destination, and whom the destination sees."""
NAT = f"""
ip address add {SEEN}/24 dev src
ip route add {BEHIND} via {ADDRESSES["destination"]}
nft -f - <<.
table ip nat {{
  chain out {{ type nat hook output priority -100; ip daddr {BEHIND} dnat to {ADDRESSES["destination"]}; }}
  chain post {{ type nat hook postrouting priority 100; ip protocol tcp snat to {SEEN}:1024-1999; }}
}}
.
"""
"""The destination sees another address and another port of the source than the source's own."""


@contextlib.contextmanager
def behind_nat() -> Iterator[QemuPair]:
    with Link() as link, QemuPair(LASTING, None, OPTIONS, link) as pair:
        with link.inside("source"):
            subprocess.run(["sh", "-ec", NAT], check=True)
        yield pair


def through_nat(seen: Breakdown) -> None:
    """Each side sees other addresses."""
    near = next(s for s in seen.sockets if s.role == "source migration")
    far = next(s for s in seen.sockets if s.role == "destination migration")
    assert near.remote.startswith(BEHIND) and far.remote.startswith(f"{SEEN}:1")
    assert seen.migration.transport == "tcp"


@pytest.mark.parametrize("tool", [watched, joined])
def test_both_sides_of_a_nat_are_paired_by_the_stream(tool: Tool, tmp_path: Path) -> None:
    with behind_nat() as pair:
        source, destination = Qmp(pair.source.qmp), Qmp(pair.destination.qmp)
        with tool(pair, tmp_path) as found:
            start(source, destination, pair.uri, f"tcp:{BEHIND}:{PORT}")
            took = completed(pair, source, destination)
            seen = found()
    whole(seen, took)
    through_nat(seen)
    if tool is watched:
        assert seen.migration.pairing is not None and seen.migration.pairing.by in (PairedBy.STREAM, PairedBy.FLOW)
    else:
        assert seen.clock is not None and seen.clock.bound_ns is not None
        assert abs(seen.clock.offset_ns) <= seen.clock.bound_ns, "both hosts have one clock"
