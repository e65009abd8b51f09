# SPDX-License-Identifier: Apache-2.0
"""One place in the kernel to which a program of ours is attached.

In: what `tiers` and `attach` choose. Out: the same words in the process that loads and in the one that attaches.
"""

from __future__ import annotations

from dataclasses import dataclass

TRACEPOINT = "tracepoint"
"""A raw tracepoint; the other ways are named in `linux/bpf.py`."""


@dataclass(frozen=True)
class Hook:
    """One attachment: `how` is `tracepoint`, or a kind of probe on the function `target`."""

    how: str
    target: str
    program: str
    signals: tuple[str, ...] = ()
    btf_id: int = 0
    in_module: bool = False
    provoked: bool = True
    one_of: str = ""
    """Of hooks with the same program and this name, one that fires is enough."""

    @property
    def key(self) -> str:
        """Names the loaded program: an fentry program is loaded for one function."""
        return self.program if self.how == TRACEPOINT else f"{self.program}:{self.target}"
