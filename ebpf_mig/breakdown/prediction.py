# SPDX-License-Identifier: Apache-2.0
"""The part of the breakdown that is predicted: the blackout under other conditions.

In: nothing. Out: frozen structs. The conventions are those of the package, which exports them all.
"""

from __future__ import annotations

from ebpf_mig.breakdown.vocabulary import Struct


class Change(Struct, frozen=True, kw_only=True):
    """The effect of one `--what-if` change on the blackout."""

    wish: str
    """As the user wrote it: `fetch=0`."""
    change_ns: int | None
    """By how much the blackout would be longer, ns; negative: shorter. Null: cannot be predicted."""
    why: str
    """What the prediction is computed from."""


class WhatIf(Struct, frozen=True, kw_only=True):
    """A prediction for the same migration under other conditions. Never a measurement."""

    blackout_ns: int | None
    """The predicted blackout, ns; null: one of the changes cannot be predicted."""
    changes: list[Change]
    """One row for each change."""
    assumptions: list[str]
    """Assumptions of the prediction, one line each."""
