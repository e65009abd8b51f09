# SPDX-License-Identifier: Apache-2.0
"""All targets, by name."""

from __future__ import annotations

from tests.fuzz import of_inputs, of_recordings

TARGETS = {target.name: target for target in (*of_recordings.TARGETS, *of_inputs.TARGETS)}
