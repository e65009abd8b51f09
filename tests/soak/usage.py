# SPDX-License-Identifier: Apache-2.0
"""What processes hold while they run for long: memory and descriptors, as the kernel counts them.

In: pids. Out: samples, and whether they stay flat.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GROWTH, SLACK_BYTES = 1.05, 2 << 20
"""From its second quarter to its last, memory may grow by this factor, and by this much besides."""
SLACK_DESCRIPTORS = 2
"""A scrape or a migration that is under way when a sample is taken holds some."""


@dataclass(frozen=True)
class Usage:
    """One sample."""

    resident: int
    """Bytes."""
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Raises OSError if the process is gone."""
        status = Path(f"/proc/{pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        return cls(int(found[1]) << 10 if found else 0, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))


def growth(samples: Sequence[Usage]) -> str:
    """Empty if the last quarter holds no more than the second one; else what grew."""
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    if not quarter:
        return ""
    told = []
    before, after = (max(one.resident for one in part) for part in (early, late))
    if after > GROWTH * before + SLACK_BYTES:
        told.append(f"memory {before >> 10} to {after >> 10} KiB")
    before, after = (max(one.descriptors for one in part) for part in (early, late))
    if after > before + SLACK_DESCRIPTORS:
        told.append(f"descriptors {before} to {after}")
    return ", ".join(told)
