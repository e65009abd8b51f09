# SPDX-License-Identifier: Apache-2.0
"""One log line for each migration, as logfmt or JSON.

In: an observation, and the VM's name as it may be shown. Out: a line of text without its end. A figure that was not
measured has no field.
"""

from __future__ import annotations

import re
import time

import msgspec

from ebpf_mig.breakdown import Mode, Result, Verdict
from ebpf_mig.exporter.observation import Observation

FORMATS = ("logfmt", "json", "none")
_BARE = re.compile(r"[^\s\"=\\\x00-\x1f\x7f]+")
"""A logfmt value that needs no quotes."""

Value = str | float


def log_line(seen: Observation, vm: str, form: str) -> str:
    """`form`: `logfmt` or `json`."""
    found = fields(seen, vm)
    if form == "json":
        return msgspec.json.encode(found).decode()
    return " ".join(f"{name}={_quoted(value)}" for name, value in found.items())


def fields(seen: Observation, vm: str) -> dict[str, Value]:
    """The fields, in order. Times of day are UTC, durations ms. `level` is `warning` if the guest did not move, or if
    events were lost."""
    whole = seen.result == Result.COMPLETED and seen.verdict != Verdict.INCOMPLETE
    found: dict[str, Value | None] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seen.at)) + f".{int(seen.at * 1000) % 1000:03}Z",
        "level": "info" if whole else "warning",
        "msg": "migration",
        "vm": vm or None,
        "vmm": seen.vmm,
        "role": seen.role,
        "mode": seen.mode if seen.mode != Mode.UNKNOWN else None,
        "result": seen.result,
        "verdict": seen.verdict,
        "downtime_ms": _ms(seen.blackout_ns),
        "source_ms": _ms(seen.source_ns),
        "destination_ms": _ms(seen.destination_ns),
    }
    phase, ns = max(seen.phases.items(), key=lambda item: item[1], default=("", 0))
    if ns:
        found |= {"mostly": phase, "mostly_ms": _ms(ns)}
    found |= {"diagnosis": seen.diagnosis or None}
    found |= {"migration": seen.migration or None, "recording": seen.recording or None}
    return {name: value for name, value in found.items() if value is not None}


def _ms(ns: int | None) -> float | None:
    return None if ns is None else round(ns / 1e6, 3)


def _quoted(value: Value) -> str:
    text = str(value)
    return text if _BARE.fullmatch(text) else msgspec.json.encode(text).decode()
