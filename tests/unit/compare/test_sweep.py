# SPDX-License-Identifier: Apache-2.0
"""Sweeps: the line through the steps, the table, and what the command line makes of `memory=1GiB,4GiB`."""

from __future__ import annotations

import random
from pathlib import Path

import click
import msgspec
import pytest

from ebpf_mig.commands import sweeps
from ebpf_mig.commands.bench import command
from ebpf_mig.compare.benchmark import Benchmark, Run, decode, encode
from ebpf_mig.compare.sweep import fit
from ebpf_mig.errors import UsageError
from ebpf_mig.report import compare_html, compare_markdown
from ebpf_mig.report.compare import render
from ebpf_mig.report.compare_rows import Axis, of_sweep
from tests.unit.commands.test_cli import run
from tests.unit.compare.test_diff import DATA, bench


def noisy(x: float, seed: int, count: int = 20) -> list[int]:
    """8 ms, and 2 ms per unit, with an error of 0.3 ms and an outlier."""
    draw = random.Random(seed)
    return [int(8e6 + 2e6 * x + draw.gauss(0, 3e5)) for _ in range(count - 1)] + [200_000_000]


def test_the_line_is_found_in_spite_of_outliers() -> None:
    found = fit([(x, noisy(x, int(x))) for x in (1, 4, 16)])
    assert found is not None
    assert found.slope == pytest.approx(2e6, rel=0.03) and found.intercept == pytest.approx(8e6, rel=0.05)
    assert found.slope_between is not None and found.intercept_between is not None
    assert found.slope_between[0] <= 2e6 <= found.slope_between[1]
    assert found.intercept_between[0] <= 8e6 <= found.intercept_between[1]
    assert found == fit([(x, noisy(x, int(x))) for x in (1, 4, 16)])


def test_exact_lines_are_exact_and_points_are_none() -> None:
    found = fit([(1.0, [10]), (2.0, [12]), (3.0, [14])])
    assert found is not None and (found.slope, found.intercept) == (2.0, 8.0)
    assert found.slope_between is None, "one run of each says nothing about chance"
    sure = fit([(1.0, [10] * 6), (2.0, [12] * 6)])
    assert sure is not None and sure.slope_between == (2.0, 2.0) and sure.intercept_between == (8.0, 8.0)
    assert fit([(1.0, [10]), (2.0, [])]) is None and fit([(1.0, [1]), (1.0, [2])]) is None and fit([]) is None


def test_every_format_has_steps_slope_and_fixed_part() -> None:
    steps = [(f"{n}GiB", float(n), bench(8, n, by_ms=2.0 * n)) for n in (1, 4, 16)]
    broken = msgspec.structs.replace(steps[2][2], runs=[*steps[2][2].runs, Run(breakdown=None, error="no memory")])
    sheet = of_sweep(Axis("memory", "GiB"), [*steps[:2], ("16GiB", 16.0, broken)])
    text = render(sheet)
    assert text.startswith("test: sweep of memory\n\nmemory  runs  fetch ms ")
    slope = float(text.split("\nblackout: ")[1].split()[0])
    fixed = float(text.split("\nblackout: ")[2].split()[0])
    assert slope == pytest.approx(2.0, rel=0.05) and fixed == pytest.approx(42.7, rel=0.02)
    assert "16GiB: run 9: no memory" in text and max(map(len, text.splitlines())) <= 80
    for page in (compare_markdown.render(sheet), compare_html.render(sheet)):
        assert "16GiB" in page and "ms per GiB" in page and "distribution" not in page


def parsed(text: str) -> sweeps.Sweep:
    return sweeps.parse(text, click.Context(command))


def test_values_are_read_as_the_option_reads_them() -> None:
    found = parsed("memory=512MiB,1GiB")
    assert [(s.change, s.number) for s in found.steps] == [({"memory": 1 << 29}, 0.5), ({"memory": 1 << 30}, 1.0)]
    found = parsed("--working-set=16MiB,1GiB")
    assert found.steps[1].change == {"working_set": 1 << 30} and found.axis == Axis("working-set", "MiB")
    assert [s.number for s in parsed("bandwidth=0,1Gbit").steps] == [None, 1.0], "0 is unlimited"
    assert [s.number for s in parsed("transport=tcp,unix").steps] == [None, None]
    sheet = of_sweep(
        Axis("transport", "transport"), [(s.text, s.number, bench(4, 1)) for s in parsed("transport=tcp,unix").steps]
    )
    few = of_sweep(Axis("memory", "GiB"), [("1GiB", 1.0, bench(2, 1)), ("2GiB", 2.0, bench(5, 2))])
    assert few.results[0] == "fetch: 0.000 ms per GiB (no interval: n = 2)"
    assert sheet.results == ["no slope: transport is not a number in each step"]


@pytest.mark.parametrize(
    "text",
    ["memory", "memory=", "memory=1GiB", "memory=1GiB,1GiB", "memory=1GiB,x", "colour=1,2", "vcpus=1,27", "=1,2"],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises((UsageError, click.BadParameter)):
        parsed(text)
    done = run("bench", "idle", "--sweep", text)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_options_of_a_scenario_are_refused_for_a_command() -> None:
    done = run("bench", "--vcpus", "2", "--", "true", "{recording}")
    assert done.returncode == 2 and "--vcpus changes a scenario, not a command" in done.stderr


def test_every_option_of_demo_is_one_of_bench() -> None:
    from ebpf_mig.commands.demo import command as demo

    of_output = {"--color"}  # a table of figures has no colours
    known = {name for p in command.params for name in p.opts}
    assert {name for p in demo.params for name in p.opts} - known == of_output


def test_a_result_and_its_runs_are_shown(tmp_path: Path) -> None:
    file, kept = tmp_path / "r.json", tmp_path / "recs" / "run-001.rec"
    kept.parent.mkdir()
    kept.write_bytes((DATA / "qemu-10.0-tcp.rec").read_bytes())
    runs = [msgspec.structs.replace(one, recording=f"recs/run-00{n}.rec") for n, one in enumerate(bench(2, 1).runs, 1)]
    whole = Benchmark(scenario="s", runs=[*runs, *bench(1, 3).runs, Run(breakdown=None, error="the VMM died")])
    file.write_text(encode(whole))
    assert decode(file.read_bytes(), "f") == whole
    assert run("report", str(file)).stdout.startswith("s: 4 runs, 1 not completed\n")
    assert run("report", str(file), "--format", "html").stdout.startswith("<!doctype html>")
    of = run("report", str(file), "--run", "1", "--format", "svg")
    assert of.stdout == run("report", str(kept), "--format", "svg").stdout and not of.stderr
    gone = run("report", str(file), "--run", "2")
    assert gone.returncode == 0 and gone.stdout.startswith("Downtime ") and "is not at " in gone.stderr
    assert "was not kept" in run("report", str(file), "--run", "3", "--format", "json").stderr
    for extra in (["--format", "html"], ["--redact"], ["--explain", "pause"], ["--what-if", "fetch=0"]):
        refused = run("report", str(file), "--run", "3", *extra)
        assert refused.returncode == 2 and "use bench --keep DIR" in refused.stderr, extra
    assert "the VMM died" in run("report", str(file), "--run", "4").stderr
    assert "has 4 runs" in run("report", str(file), "--run", "5").stderr
    assert run("report", str(file), "--format", "perfetto").returncode == 2
    assert "is not a result" in run("report", str(kept), "--run", "1").stderr
