# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig bench`: runs the same migration many times, each with new VMs, and summarises its cost.

In: a scenario of the lab, or a command of the user that performs one traced migration. Out: a result file with the
breakdown of every run, and a table on stdout.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

from ebpf_mig import __version__
from ebpf_mig.collector import analyse
from ebpf_mig.commands import run as tracing
from ebpf_mig.commands.child import Child
from ebpf_mig.commands.diff import shown
from ebpf_mig.commands.options import DURATION, examples, format_option, write_result
from ebpf_mig.compare.benchmark import Benchmark, Run, encode
from ebpf_mig.errors import RecordingError, UsageError, VmmError
from ebpf_mig.lab.scenario import Scenario
from ebpf_mig.lab.scenarios import CATALOGUE, named
from ebpf_mig.linux import procfs
from ebpf_mig.linux.capabilities import require_tracing
from ebpf_mig.linux.process import private_directory
from ebpf_mig.recording.file import read_recording
from ebpf_mig.report import compare_rows
from ebpf_mig.vmm import adapter, with_lab
from ebpf_mig.vmm.adapter import Adapter

PLACEHOLDER = "{recording}"
_WARM_UP_S = 0.3
_POLL_S = 0.01

_SCENARIOS = "\b\nScenarios:\n" + "\n".join(f"  {name:14} {what}" for name, (what, _) in CATALOGUE.items())
_EXAMPLES = examples(
    "ebpf-mig bench slow-dirty -n 20 -o before.json",
    "ebpf-mig bench -n 10 -- ./migrate-once.sh {recording}",
)


@click.command("bench", epilog=f"{_SCENARIOS}\n\n{_EXAMPLES}")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="SCENARIO | -- COMMAND...")
@click.option(
    "-n",
    "--runs",
    type=click.IntRange(1, 10_000),
    default=20,
    show_default=True,
    help="Number of migrations to measure.",
)
@click.option(
    "--warm-up", type=click.IntRange(0, 100), default=1, show_default=True, help="Warm-up runs first; not counted."
)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="The result file.  [default: a new name]")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@click.option("--vmm", type=click.Choice(with_lab()), default=with_lab()[0], show_default=True)
@click.option("--vmm-binary", metavar="PATH", help="The VMM's program.  [default: from PATH]")
@click.option(
    "--timeout", type=DURATION, default="60s", show_default=True, help="Stop waiting for a migration after this."
)
@format_option("text", "markdown", "html")
def command(
    words: Sequence[str],
    runs: int,
    warm_up: int,
    output: str | None,
    force: bool,
    vmm: str,
    vmm_binary: str | None,
    timeout: int,
    form: str,
) -> None:
    """Run many migrations, and print median, 95th percentile and confidence interval of every phase.

    SCENARIO is one of those below. COMMAND performs one migration and writes a recording of it, made with
    `ebpf-mig migrate` or `record`, to the file that replaces {recording}.
    """
    about, once = _subject(words, adapter(vmm), vmm_binary, timeout)
    name = output or f"ebpf-mig-bench-{about.scenario}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    if name == "-":
        raise UsageError("the table goes to stdout, so the result cannot", "give it a file name with --output")
    if not force and os.path.lexists(name):
        raise UsageError(f"{name} exists already", "name another file, or overwrite it with --force")
    require_tracing()
    kept: list[Run] = []
    try:
        _repeat(once, runs, warm_up, kept)
    finally:
        if kept:
            result = msgspec.structs.replace(about, warm_up=warm_up, runs=kept)
            write_result(encode(result), name, force=force)
            write_result(shown(compare_rows.of_bench(result), form))
            tracing.say(f"result: {name}; compare it with: ebpf-mig diff OTHER {name}")
    if all(run.breakdown is None for run in kept):
        raise VmmError(f"no run made a recording that can be analysed: {kept[-1].error}")


Settings = dict[str, int | str | bool | None]
Once = Callable[[Path], None]
"""Performs one migration and writes its recording to the path."""


def _subject(words: Sequence[str], vmm: Adapter, vmm_binary: str | None, timeout_ns: int) -> tuple[Benchmark, Once]:
    """What to repeat: an empty result that describes it, and a function that runs it once."""
    if not words:
        raise UsageError("nothing to repeat", f"name a scenario: {', '.join(CATALOGUE)}; or -- COMMAND {PLACEHOLDER}")
    if any(PLACEHOLDER in word for word in words):
        about = _about("command", words)
        return about, functools.partial(_run_command, words, timeout_ns / 10**9)
    if len(words) > 1:
        raise UsageError(
            f"{words[0]} gets no file name for its recording", f"put {PLACEHOLDER} where it expects the file name"
        )
    if words[0] not in CATALOGUE and (os.sep in words[0] or shutil.which(words[0])):
        raise UsageError(
            f"{words[0]} is no scenario, and as a command it gets no file name for its recording",
            f"put {PLACEHOLDER} where it expects the file name",
        )
    scenario = named(words[0])
    about = _about(words[0], settings=dataclasses.asdict(scenario))
    return about, functools.partial(_run_scenario, scenario, vmm, vmm_binary, timeout_ns / 10**9)


def _about(scenario: str, command: Sequence[str] = (), settings: Settings | None = None) -> Benchmark:
    return Benchmark(
        scenario=scenario,
        settings=settings or {},
        command=list(command),
        host=procfs.host_name(),
        kernel=platform.release(),
        tool=f"ebpf-mig {__version__}",
    )


def _repeat(once: Once, runs: int, warm_up: int, kept: list[Run]) -> None:
    """Adds runs to `kept`. A failed run is kept with its error. A failed warm-up run ends the benchmark."""
    with private_directory() as directory:
        for number in range(1 - warm_up, runs + 1):
            label = f"run {number} of {runs}" if number > 0 else "warm-up"
            path = directory / f"{number + warm_up}.rec"
            run = _one(once, path)
            path.unlink(missing_ok=True)
            if number > 0:
                kept.append(run)
            elif run.breakdown is None:
                raise VmmError(f"the warm-up run failed: {run.error}")
            tracing.say(f"{label}: {_outcome(run)}")


def _one(once: Once, path: Path) -> Run:
    error = ""
    try:
        once(path)
    except VmmError as problem:
        error = str(problem)
    try:
        recording = read_recording(path)
    except RecordingError as problem:
        return Run(breakdown=None, error=error or str(problem))
    return Run(
        breakdown=analyse(recording).breakdown,
        error=error,
    )


def _run_scenario(scenario: Scenario, vmm: Adapter, binary: str | None, timeout_s: float, path: Path) -> None:
    with vmm.lab(scenario, binary) as (migration, notes):
        time.sleep(_WARM_UP_S)
        writer = functools.partial(tracing.open_recording, str(path), "bench", force=False)
        outcome, _ = tracing.trace_migration(migration, timeout_s, writer, notes)
    if outcome.remark:
        tracing.say(outcome.remark)
    if outcome.result != "completed":
        raise VmmError(f"the migration {outcome.result}: {outcome.error}")


def _run_command(words: Sequence[str], timeout_s: float, path: Path) -> None:
    command = [word.replace(PLACEHOLDER, str(path)) for word in words]
    begin, late = time.monotonic(), False
    with Child(command, stdout=2) as child:
        while child.code is None and not child.abandoned():
            time.sleep(_POLL_S)
            if not late and time.monotonic() - begin >= timeout_s:
                late = True
                tracing.say(f"{words[0]} takes longer than {timeout_s:.0f} s; waiting for its end")
        child.wait()
    if child.interrupted is not None:
        signal.raise_signal(child.interrupted)
    if late:
        raise VmmError(f"the command took longer than {timeout_s:.0f} s")
    if child.code:
        raise VmmError(f"the command exited with {child.code}")


def _outcome(run: Run) -> str:
    """The result of one run in a few words."""
    if run.error or run.breakdown is None:
        return f"failed: {run.error}"
    blackout, verdict = run.breakdown.blackout_ns, run.breakdown.completeness.verdict
    text = "no blackout measured" if blackout is None else f"blackout {blackout / 1e6:.3f} ms"
    return text if verdict == "complete" else f"{text}, {verdict}"
