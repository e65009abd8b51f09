# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.truth sweep --runs 100`, `demand`, `exec`, `large` or `sends`.

Exit code 1 if a run was not sound.
"""

from __future__ import annotations

import argparse
import sys

from tests.truth import large, more_sweeps, rate, sweep


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _sends(count: int, rounds: int) -> int:
    rows, exact = rate.measure(count, rounds)
    _say(f"{f'{count} sends of 64 bytes':<50}{'ns a call':>10}{'calls/s':>12}")
    for what, ns, rate_s in rows:
        _say(f"{what:<50}{ns:>10.0f}" + (f"{rate_s:>12.0f}" if rate_s else ""))
    _say(f"nothing lost, every call and byte counted: {'yes' if exact else 'NO'}")
    return 0 if exact else 1


def main() -> int:
    """Runs the command given."""
    parser = argparse.ArgumentParser(prog="python -m tests.truth")
    commands = parser.add_subparsers(dest="command", required=True)
    sweeps = {"sweep": sweep.sweep, "demand": more_sweeps.demand, "exec": more_sweeps.execs}
    for name in sweeps:
        sweeping = commands.add_parser(name)
        sweeping.add_argument("--runs", type=int, default=100)
        sweeping.add_argument(
            "--first", type=int, default=0, help="number of the first run, to continue an earlier one"
        )
    commands.add_parser("large")
    sending = commands.add_parser("sends")
    sending.add_argument("--count", type=int, default=1_000_000)
    sending.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.command in sweeps:
        return 0 if sweeps[arguments.command](arguments.runs, _say, arguments.first) else 1
    if arguments.command == "sends":
        return _sends(arguments.count, arguments.rounds)
    _say(f"{'64 GiB, no memory behind it':<34}{'ms':>9}{'ms/GiB':>9}  known")
    for what, ms, per_gib, known in large.measure():
        _say(f"{what:<34}{ms:>9.3f}{per_gib:>9.4f}  {known}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
