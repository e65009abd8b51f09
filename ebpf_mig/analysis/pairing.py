# SPDX-License-Identifier: Apache-2.0
"""How the two sides of a migration are known to belong together.

In: a `TracedMigration`. Out: a `Pairing` for the breakdown. It rests on the recording alone, and not on how the
two processes were chosen.
"""

from __future__ import annotations

from ebpf_mig.analysis import flow, sockets
from ebpf_mig.analysis.migration import TracedMigration
from ebpf_mig.breakdown import PairedBy, Pairing, Transport
from ebpf_mig.recording.events import RECEIVE, SEND


def observe(traced: TracedMigration) -> Pairing | None:
    """None unless both sides were traced, and where no socket was used."""
    source, destination = traced.source, traced.destination
    if source is None or destination is None or traced.channels.transport == Transport.NONE:
        return None
    mirrors = sockets.mirrors(source, destination)
    common = [mirrors[key] for key in traced.channels.source if key in mirrors]
    if common and traced.material.header.remote is None:
        return Pairing(by=PairedBy.CONNECTION)
    if common:
        return _joined(traced, common)
    fit = flow.best(flow.flows(traced.source_transfers, SEND), flow.flows(traced.destination_transfers, RECEIVE))
    if fit is None:
        return Pairing(by=PairedBy.REQUEST)
    return Pairing(by=PairedBy.STREAM if fit[2].whole else PairedBy.FLOW, bytes=fit[2].bytes)


def _joined(traced: TracedMigration, common: list[int]) -> Pairing:
    """Of two recordings: by addresses, or by the number of bytes, which `join` then requires to be equal."""
    assert traced.source is not None and traced.destination is not None  # noqa: S101 - `observe` asked
    ends = {(sockets.normal(s.remote), sockets.normal(s.local)) for s in traced.source.sockets.values() if s.local}
    known = (traced.destination.sockets[key] for key in common)
    if any((sockets.normal(s.local), sockets.normal(s.remote)) in ends for s in known):
        return Pairing(by=PairedBy.CONNECTION)
    moved = sum(t.bytes for t in traced.destination_transfers if t.direction == RECEIVE)
    return Pairing(by=PairedBy.STREAM, bytes=moved)
