# SPDX-License-Identifier: Apache-2.0
"""The result of one check of this machine, as `ebpf-mig doctor` prints it.

In: the findings. Out: a `Check`. Checks of the machine are in commands/, those of a VMM in its folder.
"""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, MISSING = "ok", "warn", "missing"


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    state: str
    """`ok`, `warn` (some figures will be missing) or `missing`."""
    fact: str
    remedy: str = ""
    required: bool = False
    """Whether tracing is impossible if the check fails."""
