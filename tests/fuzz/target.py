# SPDX-License-Identifier: Apache-2.0
"""The definition of a fuzz target.

In: nothing. Out: `Target`, and `corpus`, the committed inputs of a target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz import mutate

CORPUS = Path(__file__).parent / "corpus"


def corpus(name: str) -> list[bytes]:
    """The committed inputs, sorted by name."""
    return [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]


@dataclass(frozen=True)
class Target:
    """A parser of untrusted input."""

    name: str
    seeds: Callable[[], list[bytes]]
    check: Callable[[bytes], object]
    """Handles one input. Catches the documented errors; any other exception is a fault."""
    recording: bool = False
    """Inputs are recordings, and are mutated as such."""

    def change(self, data: bytes, random: Random, seeds: list[bytes]) -> bytes:
        """A mutated input."""
        return mutate.recording(data, random, seeds) if self.recording else mutate.mutated(data, random)
