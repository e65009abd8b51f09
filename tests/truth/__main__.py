# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.truth sweep --runs 100` and `python -m tests.truth large`; exit code 1 if a run was not sound."""

from __future__ import annotations

import argparse
import sys

from tests.truth import large, sweep


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def main() -> int:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.truth")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sweep").add_argument("--runs", type=int, default=100)
    commands.add_parser("large")
    arguments = parser.parse_args()
    if arguments.command == "sweep":
        return 0 if sweep.sweep(arguments.runs, _say) else 1
    _say(f"{'64 GiB, no memory behind it':<34}{'ms':>9}{'ms/GiB':>9}  known")
    for what, ms, per_gib, known in large.measure():
        _say(f"{what:<34}{ms:>9.3f}{per_gib:>9.4f}  {known}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
