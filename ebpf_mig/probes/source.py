# SPDX-License-Identifier: Apache-2.0
"""The C source of a BPF program as one text, which bcc requires.

In: the name of a `.bpf.c` file and its contract with Python. Out: its text, with headers and assertions.
"""

from __future__ import annotations

import re
from pathlib import Path

from ebpf_mig.probes.contract import Contract

BPF_DIR = Path(__file__).resolve().parent.parent / "bpf"
HEADERS = BPF_DIR / "headers"
"""Used in place of a kernel source tree, so that no kernel headers are needed."""
_INCLUDE = re.compile(r'^#include "([a-z_.]+)"$', re.MULTILINE)


def source_text(name: str, contract: Contract = Contract(())) -> str:  # noqa: B008 - it is frozen
    """The C source of one program family: each of our files inlined once, and the assertions of its contract.

    bcc rewrites map calls in the main file only, so files with such calls must be inlined into it.
    """
    seen: set[str] = set()

    def inline(file: str) -> str:
        text = (BPF_DIR / file).read_text()

        def replace(match: re.Match[str]) -> str:
            header = match.group(1)
            if header in seen:
                return ""
            seen.add(header)
            return inline(header)

        return _INCLUDE.sub(replace, text.replace("#pragma once\n", ""))

    return inline(name) + contract.assertions()
