# SPDX-License-Identifier: Apache-2.0
"""What the watch and the process that analyses say to each other.

In: nothing. Out: `Task`, sent with the descriptor of a recording, and its `Answer`.
"""

from __future__ import annotations

import msgspec

from ebpf_mig.exporter.discovery import Vm
from ebpf_mig.exporter.observation import Observation
from ebpf_mig.exporter.otel_spans import Trace


class Task(msgspec.Struct, frozen=True):
    """One recording to be analysed; its descriptor comes with it."""

    recording: str
    """Its name in the store; empty if it is not kept there."""
    vms: list[Vm]
    trigger: str
    at: float
    """Wall clock at the migration's end, seconds since the epoch."""


class Answer(msgspec.Struct, frozen=True):
    """What became of a `Task`: an observation, or an error."""

    observation: Observation | None = None
    trace: Trace | None = None
    error: str = ""
