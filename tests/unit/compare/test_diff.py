# SPDX-License-Identifier: Apache-2.0
"""Result files, their comparison and the gate, on samples with known differences."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from ebpf_mig.breakdown import Breakdown
from ebpf_mig.compare.benchmark import FIGURES, Benchmark, Run, decode, encode, value_of
from ebpf_mig.compare.diff import Condition, Ruling, compare, judge, parse_condition
from ebpf_mig.errors import UsageError
from ebpf_mig.report.compare import render as text_of
from ebpf_mig.report.compare_rows import of_bench, of_diff
from tests.unit import breakdowns
from tests.unit.commands.test_cli import run

DATA = Path(__file__).parents[2] / "data"


def slower(whole: Breakdown, by_ns: int) -> Breakdown:
    """The same with a handover, window and blackout longer by so much."""
    assert whole.window_ns is not None and whole.blackout_ns is not None
    phases = [
        msgspec.structs.replace(p, duration_ns=p.duration_ns + by_ns) if p.phase == "handover" else p
        for p in whole.phases
    ]
    return msgspec.structs.replace(
        whole, window_ns=whole.window_ns + by_ns, blackout_ns=whole.blackout_ns + by_ns, phases=phases
    )


def bench(count: int, seed: int, by_ms: float = 0.0, spread_ms: float = 0.5) -> Benchmark:
    draw = random.Random(seed)
    found = [slower(breakdowns.precopy(), int((by_ms + draw.gauss(0, spread_ms)) * 1e6)) for _ in range(count)]
    return Benchmark(scenario="test", kernel="6.1", runs=[Run(breakdown=b) for b in found])


def shown(a: Benchmark, b: Benchmark, *conditions: str) -> str:
    return text_of(of_diff(("a", "b"), (a, b), *judge(a, b, [parse_condition(text) for text in conditions])))


def rule(conditions: list[Condition], a: Benchmark, b: Benchmark) -> list[Ruling]:
    return judge(a, b, conditions)[1]


def verdicts(a: Benchmark, b: Benchmark) -> dict[str, str]:
    return {d.figure: d.verdict for d in compare(a, b)}


def test_injected_delay_is_found_where_it_is_and_nowhere_else() -> None:
    found = verdicts(bench(10, 1), bench(10, 2, by_ms=5))
    assert {figure for figure, verdict in found.items() if verdict == "slower"} == {"blackout", "window", "handover"}
    assert {found[figure] for figure in FIGURES if figure not in {"blackout", "window", "handover"}} == {
        "no difference"
    }
    assert verdicts(bench(10, 2, by_ms=5), bench(10, 1))["blackout"] == "faster"


def test_equals_do_not_differ() -> None:
    alarms = sum("slower" in verdicts(bench(8, 2 * i), bench(8, 2 * i + 1)).values() for i in range(20))
    assert alarms <= 2


def test_a_median_that_fails_its_condition_is_not_called_the_same() -> None:
    """With four runs each, one planned comparison finds a difference that a table of all figures cannot find."""
    a, b = bench(4, 1), bench(4, 2, by_ms=9)
    assert verdicts(a, b)["blackout"] == "cannot tell"
    found, rulings = judge(a, b, [parse_condition("blackout.p50>+5%")])
    assert rulings[0].failed
    assert {d.figure: d.verdict for d in found}["blackout"] == "slower"
    assert "blackout is slower by" in shown(a, b, "blackout.p50>+5%")


@pytest.mark.parametrize("sizes", [(3, 20), (4, 4), (5, 5), (12, 12)])
@pytest.mark.parametrize("count", [1, 40])
def test_gate_and_table_never_contradict_each_other(sizes: tuple[int, int], count: int) -> None:
    """As many conditions as you like on the same medians: each says what the table says of its figure."""
    figures = [name for name in FIGURES if name != "fetch"]
    conditions = [parse_condition(f"{figures[n % len(figures)]}.p50>+{n / 1000}ms") for n in range(count)]
    for by_ms in (0, 30):
        a, b = bench(sizes[0], 1), bench(sizes[1], 2, by_ms=by_ms)
        differences, rulings = judge(a, b, conditions)
        of = {d.figure: d.verdict for d in differences}
        for ruling in rulings:
            verdict = of[ruling.condition.figure]
            assert ruling.undecided == (verdict == "cannot tell"), ruling.why
            assert not ruling.failed or verdict == "slower", ruling.why
            assert ruling.failed or verdict != "slower" or "may be chance" not in ruling.why


def test_what_cannot_tell_could_not_have_told() -> None:
    """Samples that do not overlap at all are the clearest difference there is."""
    for size in range(1, 9):
        found = verdicts(bench(size, 1), bench(size, 2, by_ms=1000))["blackout"]
        assert found == ("slower" if size >= compare(bench(size, 1), bench(size, 2))[0].needed else "cannot tell")
    assert {compare(bench(4, 1), bench(4, 2))[0].needed} == {6}


def test_too_few_runs_say_so() -> None:
    assert set(verdicts(bench(3, 1), bench(20, 2, by_ms=50)).values()) == {"cannot tell"}
    text = shown(bench(4, 1), bench(4, 2))
    assert text.endswith("\ncannot tell: 6 completed runs on each side can show a difference\n")
    table = text.split("\n\n")[1].splitlines()
    assert len(table) == 16 and all(line.endswith("  cannot tell (n = 8)") for line in table[1:])
    assert max(map(len, table)) <= 80
    text = shown(bench(3, 1), bench(3, 2), "blackout.p50>+5%", "total.p50>+5%")
    gate = [line for line in text.splitlines() if line.startswith("cannot tell  ")]
    assert len(gate) == 2 and gate[0].endswith("cannot tell (n = 6); 5 runs on each side can decide")


def test_raw_and_corrected_p_are_shown() -> None:
    (row,) = [
        line.split()
        for line in shown(bench(10, 1), bench(10, 2, by_ms=5)).splitlines()
        if line[:8] == "blackout" and "%" in line
    ]
    assert row[5] == "0.0002" and float(row[6]) > float(row[5])
    (ruling,) = rule([parse_condition("blackout.p50>+5%")], bench(12, 1), bench(12, 2, by_ms=5))
    assert "p = 0.0002, corrected 0.0002" in ruling.why


@pytest.mark.parametrize(
    ("condition", "failed"),
    [
        ("blackout.p50>+5%", True),
        ("blackout.p50>+20%", False),
        ("handover.p50>+4ms", True),
        ("handover.p50>+6ms", False),
        ("blackout.p95>+3ms", True),
        ("blackout.max>40ms", True),
        ("blackout.max>80ms", False),
        ("fetch.p50>+1%", False),
        ("blackout.min > +2000 us", True),
    ],
)
def test_gate(condition: str, failed: bool) -> None:
    (ruling,) = rule([parse_condition(condition)], bench(12, 1), bench(12, 2, by_ms=5))
    assert ruling.failed is failed, ruling.why


def test_gate_does_not_close_on_noise() -> None:
    noisy = [rule([parse_condition("blackout.p50>+1%")], bench(8, i, 0, 8), bench(8, 100 + i, 0, 8)) for i in range(20)]
    assert sum(ruling.failed for (ruling,) in noisy) <= 2


def test_gate_that_cannot_be_judged_is_an_error() -> None:
    with pytest.raises(UsageError, match="cannot be judged from 0 and 12 runs"):
        rule([parse_condition("blackout.p50>+5%")], bench(0, 1), bench(12, 2))
    (ruling,) = rule([parse_condition("blackout.p50>+5%")], bench(3, 1), bench(12, 2))
    assert ruling.undecided and not ruling.failed
    (ruling,) = rule([parse_condition("blackout.p50>1s")], bench(0, 1), bench(1, 2))
    assert not ruling.failed


@pytest.mark.parametrize(
    "text", ["blackout>5%", "blackout.p50>5%", "blackout.p50<+5%", "nothing.p50>+5%", "", "a" * 999]
)
def test_conditions_that_mean_nothing(text: str) -> None:
    with pytest.raises(UsageError):
        parse_condition(text)


def test_file_round_trip_and_hostile_files() -> None:
    whole = msgspec.structs.replace(bench(3, 1), command=['x"runs":[]', "</script>\x1b"], warm_up=1)
    assert decode(encode(whole).encode(), "f") == whole
    assert encode(whole).count("\n") == 5, "one run per line"
    for data in (b"", b"[]", b"\xff", b'{"schema":"x","scenario":"y"}', b"[" * 100_000):
        with pytest.raises(UsageError):
            decode(data, "f")


def test_a_file_without_phases_is_compared_by_its_other_figures() -> None:
    bare = Run(breakdown=msgspec.structs.replace(breakdowns.precopy(), phases=[]))
    whole = Benchmark(scenario="s", runs=[bare] * 5)
    found = verdicts(whole, whole)
    assert (found["blackout"], found["fetch"], found["pause"]) == ("no difference", "not measured", "not measured")
    assert "not measured on both sides: fetch, pause, " in shown(whole, whole)


def test_failed_runs_and_losses_are_marked_and_not_dropped() -> None:
    runs = [
        *bench(4, 1).runs,
        Run(breakdown=None, error="the VMM \x1b died"),
        Run(breakdown=breakdowns.aborted()),
    ]
    whole = Benchmark(scenario="s", runs=runs)
    text = text_of(of_bench(whole))
    assert text.startswith("s: 6 runs, 2 not completed, 1 with losses\n")
    assert "run 5: the VMM \\x1b died" in text and "run 6: 12 events of the socket probe were lost" in text
    assert len(whole.sample("blackout")) == 4
    assert value_of(breakdowns.precopy(), "fetch") == 1_745_000
    assert all(len(line) <= 80 for line in text.splitlines())


def test_command_exit_codes_and_output(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(encode(bench(8, 1)))
    b.write_text(encode(bench(8, 2, by_ms=5)))
    same = run("diff", str(a), str(a), "--fail-if", "blackout.p50>+5%")
    assert same.returncode == 0 and "\nno median differs\n" in same.stdout and "pass  blackout.p50>+5%" in same.stdout
    worse = run("diff", str(a), str(b), "--fail-if", "blackout.p50>+5%", "--fail-if", "fetch.p50>+5%")
    assert worse.returncode == 6 and "FAIL  blackout.p50>+5%" in worse.stdout and "pass  fetch" in worse.stdout
    assert worse.stderr.startswith("ebpf-mig: regression: blackout.p50>+5% (") and worse.stderr.count("\n") == 1
    assert all(len(line) <= 80 for line in run("diff", str(a), str(b)).stdout.splitlines() if str(tmp_path) not in line)
    as_json = run("diff", str(a), str(b), "--format", "json", "--fail-if", "blackout.p50>+5%")
    found = msgspec.json.decode(as_json.stdout)
    assert as_json.returncode == 6 and found["rulings"][0]["failed"] is True
    few = tmp_path / "few.json"
    few.write_text(encode(bench(3, 1)))
    open_ = run("diff", str(few), str(b), "--fail-if", "blackout.p50>+5%")
    assert open_.returncode == 2 and "\ncannot tell  blackout.p50>+5%: " in open_.stdout
    assert "too few runs to judge blackout.p50>+5%" in open_.stderr and open_.stderr.count("\n") == 1
    assert run("diff", str(a), str(tmp_path / "none")).returncode == 2
    assert run("diff", str(a), str(b), "--fail-if", "rubbish").returncode == 2


def test_recordings_compare_as_single_runs() -> None:
    done = run("diff", str(DATA / "qemu-10.0-tcp.rec"), str(DATA / "qemu-10.0-unix.rec"))
    headline = (DATA / "qemu-10.0-tcp.txt").read_text().splitlines()[0]  # "blackout 45.162 ms"
    assert done.returncode == 0 and "cannot tell (n = 2)" in done.stdout and headline.split()[1] in done.stdout
