# SPDX-License-Identifier: Apache-2.0
"""The interface of an adapter's `witness` module: the meaning of its marks, and its own rows. Pure.

In: a migration reconstructed from the kernel's events. Out: rows of the breakdown. No row moves a boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ebpf_mig.analysis.witnesses import MarkNames
from ebpf_mig.breakdown import Wire, Witness

if TYPE_CHECKING:
    from ebpf_mig.analysis.attributed import Attribution
    from ebpf_mig.analysis.migration import TracedMigration


NAMED_NS, NAMED_SHARE = 10_000, 50
"""Shares shorter than this, or than a fiftieth of the whole, are left out of the explanations."""


class Reference(NamedTuple):
    """One published figure for the cost of write-protecting pages again, to compare with ours."""

    figure: str
    what: str
    source: str
    short: str = ""
    """Short form for a crowded line; empty: left out of it."""


class VmmWitness:
    """A VMM that makes no marks."""

    marks = MarkNames()
    parts: ClassVar[Mapping[str, int]] = {}
    """Rows that are parts of its downtime, not figures for the blackout. The higher the value, the earlier a crowded
    report leaves the row out.
    """
    references: tuple[Reference, ...] = ()
    words: frozenset[str] = frozenset()
    """Names of its marks in a recording. Redaction keeps them."""

    def rows(
        self,
        traced: TracedMigration,  # noqa: ARG002
        attribution: Attribution,  # noqa: ARG002
        found: Sequence[Witness],
        wires: Sequence[Wire] | None,  # noqa: ARG002
        late_ns: int,  # noqa: ARG002
    ) -> list[Witness]:
        """`found`, the rows of all VMMs, with this VMM's explanations and rows added.

        `late_ns`: how long the kicking thread was off CPU after the VMM began to count.
        """
        return list(found)
