# SPDX-License-Identifier: Apache-2.0
"""Finds the program of a VMM.

In: what the user named, the variable that can name it, its usual name. Out: its path, or what to install.
"""

from __future__ import annotations

import os
import shutil

from ebpf_mig.errors import PreflightError


def find_program(wanted: str | None, variable: str, usual: str, remedy: str) -> str:
    """The program to use: the one `wanted`, else that of the environment's `variable`, else `usual`, looked up in PATH.

    PreflightError with the `remedy` if there is none.
    """
    name = wanted or os.environ.get(variable) or usual
    path = shutil.which(name)
    if path is None:
        raise PreflightError(f"no {name} found", f"{remedy} with --vmm-binary or {variable}")
    return path
