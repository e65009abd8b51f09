# SPDX-License-Identifier: Apache-2.0
"""The stacks of the window for https://www.speedscope.app: a profile of off-CPU time, and one of samples.

In: rows of `analysis.stacks`. Out: JSON in speedscope's file format
(https://www.speedscope.app/file-format-schema.json, version 1.25). Frames are those of the folded lines, but for the
kind: each kind is a profile. Weights are ns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

from ebpf_mig import __version__
from ebpf_mig.analysis.stacks import Kind, Stack
from ebpf_mig.report.folded import path
from ebpf_mig.text import printable

SCHEMA = "https://www.speedscope.app/file-format-schema.json"
_NAMES = {
    Kind.OFF_CPU: "off-CPU time in the window",
    Kind.ON_CPU: "samples of dirty-log calls in the window",
}


def render(stacks: Sequence[Stack], title: str) -> str:
    """One JSON object in pure ASCII. A kind without rows has no profile; without any there is an empty one."""
    frames: dict[str, int] = {}
    kinds = [kind for kind in Kind if any(row.kind == kind for row in stacks)] or [Kind.OFF_CPU]
    profiles = [_profile(kind, [row for row in stacks if row.kind == kind], frames) for kind in kinds]
    whole = {
        "$schema": SCHEMA,
        "name": printable(title),
        "exporter": f"ebpf-mig {__version__}",
        "activeProfileIndex": 0,
        "shared": {"frames": [{"name": name} for name in frames]},
        "profiles": profiles,
    }
    return json.dumps(whole, separators=(",", ":")) + "\n"


def _profile(kind: Kind, rows: Sequence[Stack], frames: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "sampled",
        "name": _NAMES[kind],
        "unit": "nanoseconds",
        "startValue": 0,
        "endValue": sum(row.duration_ns for row in rows),
        "samples": [
            [frames.setdefault(printable(name), len(frames)) for name in islice(path(row), 1, None)] for row in rows
        ],
        "weights": [row.duration_ns for row in rows],
    }
