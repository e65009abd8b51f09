# SPDX-License-Identifier: Apache-2.0
"""Messages to the listener, from the watch and from the supervisor.

In: nothing. Out: the types. They come over one socket that keeps messages apart, and that outlives all three processes.
"""

from __future__ import annotations

import msgspec

from ebpf_mig.exporter.observation import Observation, Status
from ebpf_mig.exporter.otel_spans import Trace

MESSAGE_BYTES = 1 << 20
"""A message is shorter. The kernel may allow less (net.core.wmem_max); a trace has at most 200 spans."""


class Found(msgspec.Struct, frozen=True, kw_only=True, tag="found"):
    """A migration. The listener may read it twice, when it was killed in between; `run` and `number` tell."""

    run: str
    """Which watch found it: each has another one."""
    number: int
    """1 for the first that this watch found."""
    observation: Observation
    trace: Trace | None


class Processes(msgspec.Struct, frozen=True, tag="processes"):
    """What the supervisor says of the exporter's processes."""

    restarts: dict[str, int]
    """By process: how often it was started again because it had ended, was stopped or hung."""
    missing: dict[str, str]
    """By process: why it does not work now."""


class Reload(msgspec.Struct, frozen=True, tag="reload"):
    """Asks the listener to read the web configuration again."""


Message = Found | Status | Processes | Reload
