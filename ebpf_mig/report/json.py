# SPDX-License-Identifier: Apache-2.0
"""The JSON report: the breakdown as the public schema `ebpf-mig/breakdown/1`.

In: a breakdown. Out: one JSON object, indented, pure ASCII (so no string in it can reach a terminal as an
escape sequence), keys in the order of `breakdown/`. A field that was not measured is present and null.
"""

from __future__ import annotations

import json

import msgspec

from ebpf_mig.breakdown import Breakdown


def render(breakdown: Breakdown) -> str:
    """`breakdown` as JSON text with a final newline; the same breakdown gives the same bytes."""
    return json.dumps(msgspec.to_builtins(breakdown), indent=2) + "\n"
