# SPDX-License-Identifier: Apache-2.0
"""What an adapter's `witness` module brings: the meaning of its marks, and rows of its own. Pure.

In: a migration that was worked out from the kernel's events. Out: rows of the breakdown. No row moves a boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ebpf_mig.analysis.witnesses import MarkNames
from ebpf_mig.breakdown import Wire, Witness

if TYPE_CHECKING:
    from ebpf_mig.analysis.attribution import Attribution
    from ebpf_mig.analysis.migration import TracedMigration


class Reference(NamedTuple):
    """One published figure for the cost of protecting pages anew, to set ours beside."""

    figure: str
    what: str
    source: str
    short: str = ""
    """What a crowded line says of it; empty: not there."""


class VmmWitness:
    """A VMM that makes no marks."""

    marks = MarkNames()
    parts: ClassVar[Mapping[str, int]] = {}
    """Rows that are parts of its downtime, not figures for the blackout: how much a crowded report can spare each."""
    references: tuple[Reference, ...] = ()
    words: frozenset[str] = frozenset()
    """Names of marks that a recording can hold of it. Redaction lets them pass."""

    def rows(
        self,
        traced: TracedMigration,  # noqa: ARG002
        attribution: Attribution,  # noqa: ARG002
        found: Sequence[Witness],
        wires: Sequence[Wire] | None,  # noqa: ARG002
        late_ns: int,  # noqa: ARG002
    ) -> list[Witness]:
        """`found`, what all VMMs have in common, with explanations and rows of its own.

        `late_ns`: how long the thread that kicks had lost the CPU after it had begun to count.
        """
        return list(found)
