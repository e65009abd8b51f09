# SPDX-License-Identifier: Apache-2.0
"""Time and memory to join two long recordings: `python -m bench.joining_long`.

In: a real recording, split into its two sides. Its pre-copy is repeated until each side has the wanted number of events
(the side with more events gets its calls coalesced). Out: a table row for docs/clock.md; exit code 1 if two recordings
of a million events take more than 3 s or 600 MB. Measured are reading, joining and analysing, in a separate process;
the best of several tries counts. Seconds are CPU time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec.structs import replace

from bench.joining import side_of
from bench.reading import MILLION, SEED, begin_of, peak_bytes, precopy_of, stretched, switchover_of
from ebpf_mig.analysis.material import split
from ebpf_mig.analysis.sockets import mirrors
from ebpf_mig.collector import analyse
from ebpf_mig.joining.merge import read_both
from ebpf_mig.recording.coalesce import run_of
from ebpf_mig.recording.events import AnyEvent, Ioctl, Segment, Transfer
from ebpf_mig.recording.file import Recording, RecordingWriter, read_recording

FETCH_EVERY = 10
"""The seed's pre-copy lasts 20 ms; only every tenth repetition keeps its dirty-log fetch."""
MOST_S, MOST_BYTES = 3.0, 600 * 10**6


def long_sides(seed: Recording, count: int) -> Iterator[tuple[Recording, list[AnyEvent]]]:
    """Both sides with `count` events each, from the same number of repetitions."""
    sides = [side_of(seed, role) for role in ("source", "destination")]
    begin, end = precopy_of(seed.header, seed.events)
    share = min(sum(begin < begin_of(e) < end for e in side.events if not isinstance(e, Ioctl)) for side in sides)
    of_both = sum(begin < begin_of(e) < end for e in seed.events)
    near, far = (split(side).processes[side.header.targets[0].pid] for side in sides)
    mirrored = {there: here for here, there in mirrors(near, far).items()}
    whole = Recording(
        header=seed.header,
        events=list(stretched(seed.header, seed.events, count * of_both // share, mirrored)),
        truncated=False,
        reason="",
        unknown=0,
    )
    last = max(e.begin_ns for e in whole.events if isinstance(e, Ioctl)) - 10**9
    for side in sides:
        pid = side.header.targets[0].pid
        events = [e for e in whole.events if getattr(e, "pid", pid) == pid and not between_fetches(e, begin, end, last)]
        events = without_holes(events)
        parts = round(len(events) / count)
        yield side, list(coalesced(events, parts)) if parts > 1 else events


def between_fetches(event: AnyEvent, begin: int, end: int, last: int) -> bool:
    """Whether the event belongs to a fetch that is left out."""
    number = (begin_of(event) - begin) // (end - begin)
    return isinstance(event, Ioctl) and begin < event.begin_ns < last and number % FETCH_EVERY > 0


def without_holes(events: list[AnyEvent]) -> list[AnyEvent]:
    """Adds bytes received across the cut between two repetitions to the call before: a TCP stream has no gaps."""
    following: dict[tuple[int, int], int] = {}
    for at in reversed(range(len(events))):
        event = events[at]
        if isinstance(event, Transfer):
            way = event.socket, event.direction
            hole = following.get(way, 0) - event.position - event.bytes
            following[way] = event.position
            if hole > 0:
                events[at] = replace(event, bytes=event.bytes + hole)
    return events


def coalesced(events: list[AnyEvent], parts: int) -> Iterator[AnyEvent]:
    """Coalesces calls of one thread in one direction into batches, as the BPF programs do."""
    calls: list[Transfer] = []
    for event in events:
        if not isinstance(event, Transfer):
            yield event
            continue
        last = calls[-1] if calls else event
        key = (event.tid, event.socket, event.direction, event.position, event.begin_ns >= last.end_ns)
        if calls and (
            len(calls) == parts or key != (last.tid, last.socket, last.direction, last.position + last.bytes, True)
        ):
            yield run_of(calls)
            calls = []
        calls.append(event)
    yield from (run_of(calls),) if calls else ()


def measure_here(paths: list[str]) -> None:
    """Reads, joins and analyses. Prints the figures as JSON."""
    wall, begin = time.perf_counter(), time.process_time()
    whole = read_both(paths[0], paths[1])
    joined = time.process_time()
    breakdown = analyse(whole).breakdown
    said = {
        "join_s": joined - begin,
        "analyse_s": time.process_time() - joined,
        "wall_s": time.perf_counter() - wall,
        "peak": peak_bytes(),
        "blackout": switchover_of(breakdown)[0],
        "bound": breakdown.clock.bound_ns,
    }
    print(json.dumps(said))


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=MILLION)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--measure", metavar="FILE", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure_here(options.measure)
        return 0
    seed = read_recording(SEED)
    seed = replace(seed, events=[e for e in seed.events if not isinstance(e, Segment)])  # none outside a blackout
    with tempfile.TemporaryDirectory() as directory:
        paths = []
        for number, (side, events) in enumerate(long_sides(seed, options.events)):
            paths.append(f"{directory}/{number}.rec")
            with RecordingWriter(paths[-1], side.header) as writer:
                writer.write_many(events)
            print(f"{len(events)} events, {Path(paths[-1]).stat().st_size / 1e6:.1f} MB", file=sys.stderr)
        del events
        command = [sys.executable, "-m", "bench.joining_long", "--measure", *paths]
        runs = [
            msgspec.json.decode(subprocess.run(command, check=True, capture_output=True).stdout)
            for _ in range(options.tries)
        ]
    best = min(runs, key=lambda run: run["join_s"] + run["analyse_s"])
    one_clock = analyse(seed).breakdown.blackout_ns
    if one_clock is None or abs(best["blackout"] - one_clock) > best["bound"]:
        raise ValueError(f"the blackout is not the real one: {best['blackout']}, {one_clock}")
    both = best["join_s"] + best["analyse_s"]
    print("| events each | read and join s | analyse s | both s | wall clock s | peak MB |\n|--:|--:|--:|--:|--:|--:|")
    figures = f"{best['join_s']:.2f} | {best['analyse_s']:.2f} | {both:.2f} | {best['wall_s']:.2f}"
    print(f"| {options.events} | {figures} | {best['peak'] / 1e6:.0f} |")
    good = both <= MOST_S and best["peak"] <= MOST_BYTES
    print(f"\nat most {MOST_S:.0f} s and {MOST_BYTES / 1e6:.0f} MB: {'yes' if good else 'NO'}")
    return 0 if good or options.events != MILLION else 1


if __name__ == "__main__":
    sys.exit(main())
