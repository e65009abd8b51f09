# SPDX-License-Identifier: Apache-2.0
"""What a target is.

In: nothing. Out: `Target`; `corpus`, the committed inputs of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz import mutate

CORPUS = Path(__file__).parent / "corpus"


def corpus(name: str) -> list[bytes]:
    """The committed inputs, in the order of their names."""
    return [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]


@dataclass(frozen=True)
class Target:
    """Something that takes input from others."""

    name: str
    seeds: Callable[[], list[bytes]]
    check: Callable[[bytes], object]
    """Raises whatever is not to be; documented errors are caught in there."""
    recording: bool = False
    """Inputs are recordings, and are changed as such."""

    def change(self, data: bytes, random: Random, seeds: list[bytes]) -> bytes:
        """Another input."""
        return mutate.recording(data, random, seeds) if self.recording else mutate.mutated(data, random)
