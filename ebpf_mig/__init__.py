# SPDX-License-Identifier: Apache-2.0
"""ebpf-mig: where the downtime of a live migration goes, as the kernel saw it.

    import ebpf_mig as em
    run = em.load("vm1.rec")

docs/library.md describes the library. Public is what `__all__` lists; everything else may change in any version.
Importing this package imports nothing else: each name is fetched when it is first used.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

__version__ = "0.2.0"

_BUNDLED = os.path.join(os.path.dirname(__file__), "bundled")  # noqa: PTH118, PTH120 - pathlib imports much
"""A distribution's package puts those libraries here that the distribution lacks, or has in a version too old."""
if os.path.isdir(_BUNDLED) and _BUNDLED not in sys.path:  # noqa: PTH112
    _own = os.path.dirname(os.path.dirname(__file__))  # noqa: PTH120
    sys.path.insert(sys.path.index(_own) if _own in sys.path else 0, _BUNDLED)

if TYPE_CHECKING:
    from ebpf_mig.breakdown import Breakdown
    from ebpf_mig.errors import EbpfMigError
    from ebpf_mig.library.bench import Bench, load_bench
    from ebpf_mig.library.run import Run, join, load
    from ebpf_mig.library.table import Table

__all__ = ["Bench", "Breakdown", "EbpfMigError", "Run", "Table", "join", "load", "load_bench"]

_HOMES = {
    "Bench": "ebpf_mig.library.bench",
    "Breakdown": "ebpf_mig.breakdown",
    "EbpfMigError": "ebpf_mig.errors",
    "Run": "ebpf_mig.library.run",
    "Table": "ebpf_mig.library.table",
    "join": "ebpf_mig.library.run",
    "load": "ebpf_mig.library.run",
    "load_bench": "ebpf_mig.library.bench",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
