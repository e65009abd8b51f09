# SPDX-License-Identifier: Apache-2.0
"""What the terminal supports. Only this module knows about colour, width and encoding.

In: a stream, the `--color` choice, the environment. Out: a `Canvas`. Without a terminal the answer is always
the same 80 columns without colour, so that the same recording gives the same report byte for byte.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TextIO

from ebpf_mig.report.canvas import Canvas


def canvas_for(stream: TextIO | None, choice: str = "auto", environ: Mapping[str, str] = os.environ) -> Canvas:
    """The canvas of `stream`; None is a file that we create, in UTF-8."""
    if stream is None:
        return Canvas(colour=choice == "always")
    return Canvas(
        width=_width(stream),
        colour=use_colour(stream, choice, environ),
        unicode=(stream.encoding or "ascii").lower().replace("-", "").replace("_", "") in {"utf8", "utf8sig"},
    )


def use_colour(stream: TextIO, choice: str, environ: Mapping[str, str]) -> bool:
    """The `--color` option; with `auto`: NO_COLOR, FORCE_COLOR and TERM=dumb in this order, then the terminal."""
    if choice != "auto":
        return choice == "always"
    if environ.get("NO_COLOR"):
        return False
    if environ.get("FORCE_COLOR", "0") not in {"", "0"}:
        return True
    return environ.get("TERM") != "dumb" and stream.isatty()


def _width(stream: TextIO) -> int:
    if not stream.isatty():
        return Canvas().width
    try:
        # A serial line without a known size reports 0.
        return os.get_terminal_size(stream.fileno()).columns or Canvas().width
    except (OSError, ValueError):
        return Canvas().width
