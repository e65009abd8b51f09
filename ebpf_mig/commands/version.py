# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig --version`: prints the versions that a bug report needs, on one line.

In: nothing. Out: text. bcc is looked up but not loaded, since that takes a second and loads LLVM.
"""

from __future__ import annotations

import importlib.util
import platform
import re
from pathlib import Path

from ebpf_mig import __version__


def version_line() -> str:
    """`ebpf-mig 0.2.0 (Python 3.11.2, Linux 6.12.9, bcc 0.26.0)`."""
    system = f"{platform.system()} {platform.release()}"
    return f"ebpf-mig {__version__} (Python {platform.python_version()}, {system}, {bcc_version()})"


def bcc_version() -> str:
    """`bcc 0.26.0`, or what is installed instead. PyPI's package called bcc has nothing to do with BPF."""
    spec = importlib.util.find_spec("bcc")
    if spec is None or spec.origin is None:
        return "no bcc"
    home = Path(spec.origin).parent
    if not (home / "libbcc.py").exists():
        return "an unrelated package called bcc"
    try:
        found = re.search(r"__version__ = ['\"]([\w.+~-]+)", (home / "version.py").read_text())
    except OSError:
        found = None
    return f"bcc {found[1]}" if found else "bcc of unknown version"
