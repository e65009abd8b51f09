# SPDX-License-Identifier: Apache-2.0
"""Entry point. Handles Ctrl-C even during imports.

In: the command line. Out: an exit code. Before anything else is imported, the current directory leaves the module and
the program search path, since it may belong to somebody else.
"""

from __future__ import annotations

import os
import sys

_INTERRUPTED = 130
"""As in `errors.py`, which is not imported yet."""


def main() -> int:
    """Runs the command line and returns the exit code."""
    try:
        settle()
        from ebpf_mig.cli import main as run
    except KeyboardInterrupt:
        return _INTERRUPTED
    return run()


def settle() -> None:
    """Makes the process safe if it was started in another user's directory."""
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 - pathlib imports much
    here = _current_directory()
    elsewhere = [path for path in sys.path if os.path.isabs(path) and path not in (here, own)]  # noqa: PTH117
    sys.path[:] = [*elsewhere, own] if own in sys.path else elsewhere
    if "PATH" in os.environ:
        ways = os.environ["PATH"].split(os.pathsep)
        os.environ["PATH"] = os.pathsep.join(way for way in ways if os.path.isabs(way))  # noqa: PTH117


def _current_directory() -> str:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:
        return ""  # the directory was removed


if __name__ == "__main__":
    sys.exit(main())
