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
from typing import Any

import click
import msgspec

from ebpf_mig import __version__
from ebpf_mig.breakdown import Verdict
from ebpf_mig.collector import analyse
from ebpf_mig.commands import lab as labs
from ebpf_mig.commands import run as tracing
from ebpf_mig.commands import sweeps
from ebpf_mig.commands import versus as two
from ebpf_mig.commands.child import Child
from ebpf_mig.commands.options import examples, format_option, strict_option, write_result
from ebpf_mig.commands.results import fail_if_option, shown
from ebpf_mig.commands.two_hosts import ROLES
from ebpf_mig.compare.benchmark import Benchmark, Run, encode
from ebpf_mig.compare.diff import parse_condition
from ebpf_mig.errors import IncompleteError, RecordingError, UsageError, VmmError
from ebpf_mig.joining.match import JoinError
from ebpf_mig.joining.merge import joined
from ebpf_mig.lab.scenario import Scenario
from ebpf_mig.lab.scenarios import CATALOGUE, named
from ebpf_mig.linux import procfs
from ebpf_mig.linux.capabilities import require_tracing
from ebpf_mig.linux.process import is_private, private_directory
from ebpf_mig.recording.file import RecordingWriter, read_recording
from ebpf_mig.report import compare_rows
from ebpf_mig.vmm.base import Outcome

PLACEHOLDER = "{recording}"
_POLL_S = 0.01

_SCENARIOS = "\b\nScenarios:\n" + "\n".join(f"  {name:14} {what}" for name, (what, _) in CATALOGUE.items())
_EXAMPLES = examples(
    "ebpf-mig bench slow-dirty -n 20 -o before.json",
    "ebpf-mig bench idle -n 5 --sweep memory=1GiB,2GiB,4GiB -o memory.json",
    "ebpf-mig bench idle --versus transport=unix --fail-if 'blackout.p50>+5%'",
    "ebpf-mig bench slow-dirty --vcpus 4 --keep recordings -o four.json",
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
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@click.option("--keep", metavar="DIR", type=click.Path(file_okay=False), help="Keep the recordings in this folder.")
@click.option(
    "--sweep",
    metavar="OPTION=VALUES",
    help="Repeat it for each value of an option, e.g. memory=1GiB,4GiB; print fetch and blackout with their slope.",
)
@click.option(
    "--versus",
    multiple=True,
    metavar="OPTION=VALUE",
    help="Run a second series, B, with this option changed, in turn with the first, A; print both and the difference,"
    " e.g. vmm-binary=./new. Can be repeated.",
)
@fail_if_option
@labs.lab_options(of_scenario=True)
@tracing.tier_option
@format_option("text", "markdown", "html")
@strict_option
@click.pass_context
def command(
    context: click.Context,
    /,
    words: Sequence[str],
    runs: int,
    warm_up: int,
    output: str | None,
    force: bool,
    keep: str | None,
    sweep: str | None,
    versus: Sequence[str],
    conditions: Sequence[str],
    tier: str,
    form: str,
    strict: bool,
    **lab: Any,
) -> None:
    """Run many migrations, and print median, 95th percentile and confidence interval of every phase.

    SCENARIO is one of those below; the options of `demo` change it. COMMAND performs one migration and writes a
    recording of it, made with `ebpf-mig migrate` or `record`, to the file that replaces {recording}.
    """
    if output == "-":
        raise UsageError("the table goes to stdout, so the result cannot", "give it a file name with --output")
    if sweep and versus:
        raise UsageError("--sweep and --versus exclude each other", "give one of them")
    if versus and any(PLACEHOLDER in word for word in words):
        raise UsageError("--versus changes a scenario, not a command", "run bench for each command, then ebpf-mig diff")
    if conditions and not versus:
        raise UsageError("--fail-if compares two series, and there is one", "give --versus, or use ebpf-mig diff")
    swept = sweeps.parse(sweep, context) if sweep else None
    gate = [parse_condition(text) for text in conditions]
    steps = swept.steps if swept else [sweeps.NONE]
    if versus:
        steps = [sweeps.Step("a"), sweeps.Step("b", two.parse(versus, list(lab), context))]
    cases = [_case(words, {**lab, **step.change}, tier, step.text) for step in steps]
    stem = output or f"ebpf-mig-bench-{cases[0].about.scenario}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    for case in cases:
        case.place(stem, keep, swept.axis.name if swept else "", alone=not versus)
        _check_new([case.name, *(case.kept(n) for n in range(1, runs + 1) if keep)], force)
    require_tracing()
    try:
        _repeat(cases, runs, warm_up, force)
    finally:
        if any(case.runs for case in cases):
            _conclude(cases, swept, warm_up, form, force, in_turn=bool(versus))
    done = [run for case in cases for run in case.runs]
    if versus:
        a, b = cases
        texts = "as given", ", ".join(versus)
        two.conclude((a.name, b.name), texts, (a.result(warm_up), b.result(warm_up)), gate, form)
    if all(run.breakdown is None for run in done):
        raise VmmError(f"no run made a recording that can be analysed: {done[-1].error}")
    doubtful = [run for run in done if run.breakdown and run.breakdown.completeness.verdict == Verdict.INCOMPLETE]
    remarks = [remark for case in cases for remark in case.remarks]
    if strict and (doubtful or remarks):
        raise IncompleteError(remarks[0] if remarks else f"events were lost in {len(doubtful)} of {len(done)} runs")


def _check_new(names: Sequence[str], force: bool) -> None:
    for name in names:
        if not force and os.path.lexists(name):
            raise UsageError(f"{name} exists already", "name another file, or overwrite it with --force")


@dataclasses.dataclass
class _Case:
    """One setting of the migration, which is repeated."""

    about: Benchmark
    once: Once
    text: str = ""
    """The step of a sweep."""
    name: str = ""
    """The result file."""
    folder: str = ""
    """Where recordings are kept; empty if they are not."""
    runs: list[Run] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)
    """What was not as asked for, although the migration completed."""

    def place(self, stem: str, keep: str | None, option: str, *, alone: bool = True) -> None:
        """Sets the names of files; those of a sweep have the step in them, and those of two series `a` and `b`."""
        step = f"{option}-{self.text}" if option else "" if alone else self.text
        path, step = Path(stem), step.replace(os.sep, "_")
        self.name = str(path.with_name(f"{path.stem}.{step}{path.suffix}")) if step else stem
        self.folder = str(Path(keep, step)) if keep else ""

    def kept(self, number: int) -> str:
        """The file of the recording of a run."""
        return str(Path(self.folder, f"run-{number:03}.rec"))

    def result(self, warm_up: int) -> Benchmark:
        return msgspec.structs.replace(self.about, warm_up=warm_up, runs=self.runs)


def _conclude(
    cases: Sequence[_Case], swept: sweeps.Sweep | None, warm_up: int, form: str, force: bool, *, in_turn: bool
) -> None:
    """Writes the result files, and prints the figures, but for two series in turn: `versus` prints those."""
    for case in cases:
        write_result(encode(case.result(warm_up)), case.name, force=force)
    if swept:
        results = [(s.text, s.number, c.result(warm_up)) for s, c in zip(swept.steps, cases, strict=True)]
        write_result(shown(compare_rows.of_sweep(swept.axis, results), form))
    elif not in_turn:
        write_result(shown(compare_rows.of_bench(cases[0].result(warm_up)), form))
    for case in cases:
        if case.folder:
            tracing.say(f"result: {case.name}; show a run with: ebpf-mig report {case.name} --run 1")
        else:
            tracing.say(f"result: {case.name}; compare it with: ebpf-mig diff OTHER {case.name}")


Settings = dict[str, int | str | bool | None]
Once = Callable[[Path], str]
"""Performs one migration and writes its recording to the path. Returns a remark; empty if all was as asked for."""


def _case(words: Sequence[str], lab: labs.Lab, tier: str, text: str) -> _Case:
    """What to repeat: an empty result that describes it, and a function that runs it once."""
    if not words:
        raise UsageError("nothing to repeat", f"name a scenario: {', '.join(CATALOGUE)}; or -- COMMAND {PLACEHOLDER}")
    if any(PLACEHOLDER in word for word in words):
        if extra := labs.given(lab):
            raise UsageError(f"{extra[0]} changes a scenario, not a command", "give it to the command itself")
        return _Case(_about("command", words), functools.partial(_run_command, words, lab["timeout"] / 10**9))
    if len(words) > 1:
        raise UsageError(
            f"{words[0]} gets no file name for its recording", f"put {PLACEHOLDER} where it expects the file name"
        )
    if words[0] not in CATALOGUE and (os.sep in words[0] or shutil.which(words[0])):
        raise UsageError(
            f"{words[0]} is no scenario, and as a command it gets no file name for its recording",
            f"put {PLACEHOLDER} where it expects the file name",
        )
    scenario = labs.scenario_of(lab, named(words[0]))
    settings = {**dataclasses.asdict(scenario), **{name: lab[name] for name in ("vmm", "local", "two_hosts")}}
    about = _about(words[0], settings=settings)
    run = _run_on_two_hosts if lab["two_hosts"] else _run_scenario
    return _Case(about, functools.partial(run, scenario, lab, tier), text)


def _about(scenario: str, command: Sequence[str] = (), settings: Settings | None = None) -> Benchmark:
    return Benchmark(
        scenario=scenario,
        settings=settings or {},
        command=list(command),
        host=procfs.host_name(),
        kernel=platform.release(),
        tool=f"ebpf-mig {__version__}",
    )


def _repeat(cases: Sequence[_Case], runs: int, warm_up: int, force: bool) -> None:
    """Adds runs to the cases, which take turns: what slows the machine down for a while slows down all of them.

    A failed run is kept with its error. A failed warm-up run ends the benchmark.
    """
    with private_directory() as directory:
        for number in range(1 - warm_up, runs + 1):
            for case in cases if number % 2 else cases[::-1]:  # none is always the one after another
                label = f"run {number} of {runs}" if number > 0 else "warm-up"
                kept = case.folder if number > 0 else ""
                if kept:
                    Path(kept).mkdir(parents=True, exist_ok=True)
                path = Path(case.kept(number)) if kept else directory / f"{number + warm_up}.rec"
                if kept and force:
                    path.unlink(missing_ok=True)
                run = _one(case, path)
                if not kept:
                    path.unlink(missing_ok=True)
                if number > 0:
                    case.runs.append(run)
                elif run.breakdown is None:
                    raise VmmError(f"the warm-up run failed: {run.error}")
                tracing.say(f"{case.text + ', ' if case.text else ''}{label}: {_outcome(run)}")


def _one(case: _Case, path: Path) -> Run:
    error = ""
    try:
        if remark := case.once(path):
            tracing.say(remark)
            case.remarks.append(remark)
    except VmmError as problem:
        error = str(problem)
    try:
        recording = read_recording(path)
    except RecordingError as problem:
        # the file is gone soon, or there is none: no message names it
        return Run(breakdown=None, error=error or str(problem).replace(str(path), "its recording"))
    where = os.path.relpath(path, Path(case.name).parent) if not is_private(str(path)) else ""
    return Run(breakdown=analyse(recording).breakdown, error=error, recording=where)


def _run_scenario(scenario: Scenario, lab: labs.Lab, tier: str, path: Path) -> str:
    writer = functools.partial(tracing.open_recording, str(path), "bench", force=False)
    outcome, _ = labs.on_one_host(scenario, lab, writer, tier)
    return _remark(outcome)


def _run_on_two_hosts(scenario: Scenario, lab: labs.Lab, tier: str, path: Path) -> str:
    outcome, halves = labs.on_two_hosts(scenario, lab, tier)
    whole = next(iter(halves.values()))
    if len(halves) == len(ROLES):
        try:
            whole = joined(halves["source"], halves["destination"], ROLES)
        except JoinError as problem:
            raise VmmError(f"the two recordings cannot be joined: {problem}") from problem
    with RecordingWriter(str(path), whole.header) as writer:
        writer.write_many(whole.events)
    return _remark(outcome)


def _remark(outcome: Outcome) -> str:
    if outcome.result != "completed":
        raise VmmError(f"the migration {outcome.result}: {outcome.error}")
    return outcome.remark


def _run_command(words: Sequence[str], timeout_s: float, path: Path) -> str:
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
    return ""


def _outcome(run: Run) -> str:
    """The result of one run in a few words."""
    if run.error or run.breakdown is None:
        return f"failed: {run.error}"
    blackout, verdict = run.breakdown.blackout_ns, run.breakdown.completeness.verdict
    text = "no blackout measured" if blackout is None else f"blackout {blackout / 1e6:.3f} ms"
    return text if verdict == "complete" else f"{text}, {verdict}"
