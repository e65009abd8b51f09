# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.soak`: many demos and, at the same time, many migrations beside one exporter.

In: how many of each, and for how long at most. Out: a table; exit code 0, or 1 and what does not hold: a migration
that is not counted once as completed, a process whose memory or descriptors grow, a demo without a right breakdown,
something that is left over. Needs root and /dev/kvm.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.faults.kernel import adopt, held_by_others, programs
from tests.faults.node import LEFT_S
from tests.soak.demos import Demos
from tests.soak.watched import Watched


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--demos", type=int, default=1000)
    parser.add_argument("--migrations", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=3, help="migrations at the same time")
    parser.add_argument("--seconds", type=float, default=1e9, help="nothing begins after this time")
    asked = parser.parse_args()
    adopt()
    before = programs()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        ends = begin + asked.seconds
        watched = Watched(asked.migrations, asked.workers, Path(place), ends)
        demos = Demos(asked.demos, Path(place), ends)
        parts = [threading.Thread(target=part.run) for part in (watched, demos)]
        for part in parts:
            part.start()
        for part in parts:
            part.join()
    broken = [*watched.broken, *demos.broken]
    time.sleep(LEFT_S)
    if left := programs() - before - held_by_others():
        broken.append(f"BPF programs are left: {sorted(left)}")
    for line in [*watched.table(), *demos.table(), *(f"BROKEN: {line}" for line in broken)]:
        print(line)
    print(f"{time.monotonic() - begin:.0f} s")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
