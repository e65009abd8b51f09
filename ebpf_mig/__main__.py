# SPDX-License-Identifier: Apache-2.0
"""Where the program begins: an interruption is one before the rest of it has been imported, too.

In: the command line. Out: an exit code.
"""

from __future__ import annotations

import sys

_INTERRUPTED = 130
"""As in `errors.py`, which is part of what is still to be imported."""


def main() -> int:
    """Runs the command line and returns the exit code."""
    try:
        from ebpf_mig.cli import main as run
    except KeyboardInterrupt:
        return _INTERRUPTED
    return run()


if __name__ == "__main__":
    sys.exit(main())
