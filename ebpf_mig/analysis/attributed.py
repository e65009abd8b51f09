# SPDX-License-Identifier: Apache-2.0
"""What is known of the window: its begin and end, and the phase of each instant of it.

Made by `attribution.py` and `through_files.py`, read by everything that describes the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ebpf_mig.analysis.loading import Loading
from ebpf_mig.analysis.management import Managed
from ebpf_mig.analysis.source_work import Work
from ebpf_mig.breakdown import Phase, Span


@dataclass(frozen=True)
class Attribution:
    """The phase of each instant of the window."""

    window: Span | None
    """Absolute, ns; None if no vCPU stop was found."""
    phases: list[Phase]
    """All phases, with spans relative to the window's begin."""
    work: Work | None = None
    """The source's work in the window."""
    managed: Sequence[Managed] = ()
    """When a side waited for its manager, in order."""
    handed: int | None = None
    """When the last byte that the destination needed left the source, absolute; None: the source was not traced, or it
    resumed its guest, or it sent nothing after the stop."""
    load: Loading | None = None
    """When the destination restored the state; None if it was not traced."""
