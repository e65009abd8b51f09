# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.fuzz`: runs mutated inputs through every parser of untrusted input, for a given time.

In: the committed corpus, a seed. Out: one line per target (inputs, inputs per second, the slowest) and exit code 0; or
exit code 1 and the failing input, kept in `tests/fuzz/found/`, which `--replay` runs again. Each target is a separate
process with bounded memory. With atheris installed, `--engine atheris` lets coverage guide the mutation.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path
from random import Random

FOUND = Path(__file__).parent / "found"
MEMORY_BYTES = 3 << 30
"""Address space of a target's process. A fault if an input of some KB needs more."""
SLOW_S = 5.0
SLOW_S_PER_BYTE = 50e-6
"""CPU time for one input. More is a fault: the limit is far above what a busy machine explains."""
KEPT = 200
"""Number of mutated inputs kept for further mutation."""


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="time for all targets together")
    parser.add_argument("--target", action="append", help="only this one; can be given several times")
    parser.add_argument("--seed", type=int, default=0, help="0: a new one each time")
    parser.add_argument("--inputs", type=int, default=0, help="stop a target after that many inputs")
    parser.add_argument("--engine", choices=["own", "atheris"], default="own")
    parser.add_argument("--replay", type=Path, help="run this file through --target")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.engine == "atheris" and asked.child:
        return _atheris(asked.target[0], asked.seconds)
    from tests.fuzz.targets import TARGETS

    names = asked.target or list(TARGETS)
    unknown = set(names) - set(TARGETS)
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    if asked.replay:
        TARGETS[names[0]].check(asked.replay.read_bytes())
        return 0
    if asked.child:
        return _fuzz(names[0], asked.seconds, asked.seed, asked.inputs)
    each = asked.seconds / len(names)
    seed = asked.seed or time.time_ns() % (1 << 32)
    options_given = [
        "--seconds",
        str(each),
        "--seed",
        str(seed),
        "--inputs",
        str(asked.inputs),
        "--engine",
        asked.engine,
        "--child",
    ]
    codes = [
        subprocess.run([sys.executable, "-m", "tests.fuzz", "--target", name, *options_given], check=False).returncode
        for name in names
    ]
    return int(any(codes))


def _fuzz(name: str, seconds: float, seed: int, most: int) -> int:
    from tests.fuzz.targets import TARGETS

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    target, random = TARGETS[name], Random(seed)
    seeds = target.seeds()
    pool = list(seeds)
    done, slowest, begin = 0, 0.0, time.monotonic()
    while time.monotonic() - begin < seconds and not (most and done >= most):
        data = pool[done] if done < len(seeds) else target.change(random.choice(pool), random, seeds)
        before = time.process_time()
        try:
            target.check(data)
            took = time.process_time() - before
            slowest = max(slowest, took)
            assert took < SLOW_S + SLOW_S_PER_BYTE * len(data), f"it took {took:.1f} s"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                return 130
            traceback.print_exc()
            print(f"{name}: after {done} inputs, seed {seed}: {_kept(name, data)}", flush=True)  # noqa: T201
            return 1
        done += 1
        if random.random() < 0.01:
            pool[len(seeds) :] = [data, *pool[len(seeds) : len(seeds) + KEPT]]
    took = time.monotonic() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(  # noqa: T201
        f"{name:10} {done:9} inputs in {took:6.1f} s, {done / took:7.0f}/s; slowest {slowest * 1000:.0f} ms, "
        f"peak {peak:.0f} MiB, seed {seed}",
        flush=True,
    )
    return 0


def _kept(name: str, data: bytes) -> str:
    FOUND.mkdir(exist_ok=True)
    file = FOUND / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    file.write_bytes(data)
    return f"python -m tests.fuzz --target {name} --replay {file}"


def _atheris(name: str, seconds: float) -> int:
    """Coverage guides which inputs are kept; the mutations are the same."""
    import atheris

    with atheris.instrument_imports(include=["ebpf_mig"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    seeds = target.seeds()

    def change(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        return target.change(data if len(data) > 1 else random.choice(seeds), random, seeds)[:most]

    def once(data: bytes) -> None:
        try:
            target.check(data)
        except Exception:
            print(_kept(name, data), flush=True)  # noqa: T201
            raise

    options = [f"-max_total_time={max(1, int(seconds))}", "-max_len=65536", "-rss_limit_mb=3000", "-timeout=60"]
    atheris.Setup([sys.argv[0], *options], once, custom_mutator=change)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
