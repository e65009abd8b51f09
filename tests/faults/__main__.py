# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.faults`: kills and stops a tracer, VMs and the exporter's processes while VMs migrate.

In: a seed and a number of rounds, or a time. Out: a line for each round, a table, exit code 0; or 1, and for each round
that failed what does not hold and how to run it again (`--seed S --first ROUND --rounds 1`). After each round: no BPF
program and no process of ours is left, finished recordings read, a migration whose VMs we did not kill has completed,
exit codes are the documented ones, and no counter of the exporter went back or counted twice. Needs root and /dev/kvm.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from ebpf_mig.collector import analyse
from ebpf_mig.recording.file import read_recording
from tests.faults.kernel import adopt, descendants
from tests.faults.node import BrokenError, Node
from tests.faults.rounds import VICTIMS, Fault, new_pair, play

MUCH = 0.05
"""Share of the window without a phase that is worth a line."""


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100000)
    parser.add_argument("--seconds", type=float, default=1e9, help="no round begins after this time")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--victim", action="append", choices=VICTIMS, help="only this one; can be given several times")
    asked = parser.parse_args()
    seed = asked.seed or time.time_ns() % (1 << 32)
    victims = tuple(asked.victim or VICTIMS)
    endings: Counter[tuple[str, str]] = Counter()
    broken: list[int] = []
    begin = time.monotonic()
    adopt()
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        node = Node(directory)
        pair, settled_at = new_pair()
        number = asked.first
        try:
            while number < asked.first + asked.rounds and time.monotonic() - begin < asked.seconds:
                fault = Fault.of(Random(f"{seed}/{number}"), victims)
                how = "BROKEN"
                try:
                    how = play(fault, node, pair, directory, settled_at)
                    if fault.hit is None:
                        how += ", nobody to hit"
                except BrokenError as error:
                    broken.append(number)
                    print(f"round {number}: BROKEN: {error}; exporter: {_tail(directory)}", flush=True)
                pair.__exit__(None, None, None)
                strangers = _strangers(node)
                if strangers:
                    broken.append(number)
                    print(f"round {number}: BROKEN: left: {strangers}", flush=True)
                pair, settled_at = new_pair()
                endings[(fault.kind, how)] += 1
                print(f"round {number}: {fault.kind} after {fault.after_s:.3f} s: {how}", flush=True)
                if how == "BROKEN":
                    node.process.kill()
                    node.process.wait()
                    node.start()
                number += 1
        finally:
            pair.__exit__(None, None, None)
        _print_unattributed(directory)
        try:
            node.close()
        except BrokenError as error:
            broken.append(number)
            print(f"at the end: BROKEN: {error}")
    for (kind, how), times in sorted(endings.items()):
        print(f"| {kind} | {how} | {times} |")
    rounds, bad = number - asked.first, sorted(set(broken))
    print(f"{rounds} rounds, seed {seed}, {time.monotonic() - begin:.0f} s: {len(bad)} broken {bad or ''}")
    return 1 if broken else 0


def _print_unattributed(directory: Path) -> None:
    """Which of the completed migrations that the exporter kept have much time without a phase, and what it was."""
    number = 0
    for path in sorted((directory / "state").glob("*.rec")):
        found = analyse(read_recording(path)).breakdown
        if found.migration.result != "completed" or not found.window_ns:
            continue
        number += 1
        share = (found.phase_ns("unattributed") or 0) / found.window_ns
        if share > MUCH:
            waits = [wait for wait in found.waits or [] if wait.phase == "unattributed"]
            print(f"{path.name}: {share:.1%} of the window is unattributed, {found.completeness.verdict}: {waits}")
    print(f"looked for unattributed time in the last {number} completed migrations")


def _strangers(node: Node) -> dict[int, str]:
    """Processes below this one that are not the exporter's."""
    ours = {node.process.pid, *descendants(node.process.pid)}
    return {pid: words[:200] for pid, words in descendants(os.getpid()).items() if pid not in ours}


def _tail(directory: Path) -> str:
    return repr((directory / "exporter.log").read_text()[-500:])


if __name__ == "__main__":
    sys.exit(main())
