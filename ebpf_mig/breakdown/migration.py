# SPDX-License-Identifier: Apache-2.0
"""The part of the breakdown that says what was migrated, from where to where, how, and how it ended.

In: nothing. Out: frozen structs. The conventions are those of the package, which exports them all.
"""

from __future__ import annotations

from msgspec import field

from ebpf_mig.breakdown.vocabulary import Mode, PairedBy, Result, Struct, Transport


class Endpoint(Struct, frozen=True, kw_only=True):
    host: str
    """Host name, as the host reports it; a placeholder if it was redacted."""
    pid: int
    """Process id on its host."""


class Pairing(Struct, frozen=True, kw_only=True):
    """How sure it is that the two processes are the two sides of one migration."""

    by: PairedBy
    """What shows it."""
    bytes: int | None = None
    """Number of bytes that both sides counted, where that shows it."""


class Migration(Struct, frozen=True, kw_only=True):
    vmm: str
    """Name of the VMM, as given when tracing started; empty: unknown."""
    vmm_version: str
    """Its version; empty: unknown."""
    mode: Mode
    """When the memory moved."""
    transport: Transport
    """What carried the migration."""
    connections: int | None
    """Number of connections that carried it; null: not known."""
    result: Result
    """How it ended."""
    source: Endpoint | None
    """Null: not traced."""
    destination: Endpoint | None
    """Null: not traced."""
    total_ns: int | None
    """From dirty logging switched on (or the trigger) to the window's end, ns; null: the begin was not seen."""
    paused_before: bool | None = None
    """Whether the guest was paused when the migration began; null: not known."""
    paused_after: bool | None = None
    """Whether no vCPU ran on either side when tracing ended; null: not known, because the other side was not traced."""
    stopped_early: bool | None = None
    """Whether the guest stopped while its memory was copied, and not for the switchover: it shut down, or somebody
    paused it. Then there is no blackout. Null: not known."""
    through: list[str] = field(default_factory=list)
    """Processes between the two on this host, as name and pid, from the source on: who reads the source's pipe or UNIX
    socket, and who feeds the destination's. Empty: none is known."""
    pairing: Pairing | None = None
    """How the two sides were found to belong together; null: one side was traced, or no socket was used."""
