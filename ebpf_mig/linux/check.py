# SPDX-License-Identifier: Apache-2.0
"""The answer to one question about this machine, as `ebpf-mig doctor` prints it.

In: what was found. Out: a `Check`. Questions about the machine are asked in commands/, those about a VMM in its folder.
"""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, MISSING = "ok", "warn", "missing"


@dataclass(frozen=True)
class Check:
    """One question's answer."""

    name: str
    state: str
    """`ok`, `warn` (some figures will be missing) or `missing`."""
    fact: str
    remedy: str = ""
    required: bool = False
    """Whether tracing is impossible without it."""
