# SPDX-License-Identifier: Apache-2.0
"""Messages between the watch and the analyst.

In: nothing. Out: `Task`, sent with the descriptor of a recording, and its `Answer`.
"""

from __future__ import annotations

import msgspec

from ebpf_mig.exporter.discovery import Vm
from ebpf_mig.exporter.observation import Observation
from ebpf_mig.exporter.otel_spans import Trace

TASK_BYTES = 1 << 20
"""Largest message."""


class Task(msgspec.Struct, frozen=True):
    """A recording to analyse. Its descriptor is sent with the message."""

    id: str
    """Unique, also among those of another watch."""
    recording: str
    """Its name in the store; empty if it is not in the store."""
    vms: list[Vm]
    trigger: str
    at: float
    """Wall clock at the migration's end, seconds since the epoch."""


class Answer(msgspec.Struct, frozen=True):
    """The result of a `Task`: an observation, or an error."""

    id: str = ""
    """Of the task."""
    observation: Observation | None = None
    trace: Trace | None = None
    error: str = ""
    gone: bool = False
    """The analyst was killed: the task that it had is lost."""
