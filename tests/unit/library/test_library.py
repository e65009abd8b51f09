# SPDX-License-Identifier: Apache-2.0
"""The Python library: what `import ebpf_mig` gives, from every kind of source, and tables that others take over."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

import ebpf_mig as em
from ebpf_mig.collector import analyse
from ebpf_mig.compare.benchmark import Benchmark, Run, encode
from ebpf_mig.joining.merge import read_both
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.file import Recording, RecordingWriter, read_recording
from ebpf_mig.recording.kinds import KINDS
from tests.unit.commands.test_cli import ROOT

DATA = ROOT / "tests" / "data"
QEMU = DATA / "qemu-11.1-tcp.rec"
HOSTS = [str(DATA / "hosts" / f"{side}.rec") for side in ("source", "destination")]
TABLES = ("phases", "events", "ioctls", "waits", "passes", "vcpus", "sockets", "stacks")
RECORDINGS = sorted(DATA.rglob("*.rec"))


def test_importing_the_package_imports_nothing_else() -> None:
    code = """
import sys
import ebpf_mig
heavy = {"bcc", "click", "msgspec", "rich", "pandas", "polars", "pyarrow"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert not [name for name in sys.modules if name.startswith("ebpf_mig.")]
run = ebpf_mig.load(sys.argv[1])
run.breakdown, len(run.events), run._repr_html_(), run.report("json")
assert not {"bcc", "click", "pandas", "polars"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(QEMU)], check=True, cwd=ROOT)


def test_public_names_are_those_that_are_listed() -> None:
    assert set(em.__all__) == {"Bench", "Breakdown", "EbpfMigError", "Run", "Table", "join", "load", "load_bench"}
    for name in em.__all__:
        assert getattr(em, name) is getattr(em, name) and name in dir(em)
    with pytest.raises(AttributeError, match="no attribute 'analyse'"):
        em.analyse  # type: ignore[attr-defined]  # noqa: B018
    import ebpf_mig.joining

    assert callable(em.join) and ebpf_mig.joining.__doc__, "no room has the name of a function"


def test_a_recording_comes_as_path_bytes_or_file() -> None:
    whole = analyse(read_recording(QEMU)).breakdown
    with QEMU.open("rb") as file:
        for source in (QEMU, str(QEMU), QEMU.read_bytes(), io.BytesIO(QEMU.read_bytes()), file):
            assert em.load(source).breakdown == whole
    cut = em.load(QEMU.read_bytes()[:-40])
    assert cut.breakdown.completeness.verdict == "incomplete" and "incomplete" in repr(cut)


@pytest.mark.parametrize("bad", [b"", b"nonsense", "/nowhere/x.rec", "", "\0", str(DATA)])
def test_what_is_no_recording_is_one_error_with_one_line(bad: str | bytes) -> None:
    for read in (em.load, em.load_bench):
        with pytest.raises(em.EbpfMigError) as error:
            read(bad)
        assert "\n" not in str(error.value) and len(str(error.value)) > 10


def test_joined_recordings_can_be_loaded_and_made(tmp_path: Path) -> None:
    whole = read_both(*HOSTS)
    with RecordingWriter(tmp_path / "both.rec", whole.header) as writer:
        writer.write_many(whole.events)
    loaded = em.load(tmp_path / "both.rec")
    made = em.join(HOSTS[1], Path(HOSTS[0]).read_bytes())
    assert loaded.breakdown == made.breakdown and made.breakdown.clock.bound_ns
    assert {row["side"] for row in made.ioctls} == {"source", "destination"}
    with pytest.raises(em.EbpfMigError, match="same recording"):
        em.join(HOSTS[0], HOSTS[0])
    with pytest.raises(em.EbpfMigError, match="clock-offset"):
        em.join(*HOSTS, clock_ahead_ns=10**12)


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_tables_of_every_recording_convert(path: Path) -> None:
    pandas, polars = (pytest.importorskip(name, reason=f"missing feature: {name}") for name in ("pandas", "polars"))
    run = em.load(path)
    tables = [getattr(run, name) for name in TABLES] + [run.events.of(kind.event.__name__) for kind in KINDS]
    for table in tables:
        frames = table.to_pandas(), table.to_polars(), table.to_arrow()
        assert isinstance(frames[0], pandas.DataFrame) and isinstance(frames[1], polars.DataFrame)
        assert all(len(frame) == len(table) for frame in frames)
        assert list(frames[0].columns) == frames[1].columns == frames[2].column_names == list(table.columns)
        assert frames[1].to_dicts() == table.to_dicts() == frames[2].to_pylist()
        assert "<table>" in table._repr_html_() and "rows" in repr(table)


def test_figures_are_those_of_the_breakdown() -> None:
    run = em.load(QEMU)
    b = run.breakdown
    assert [(p["phase"], p["duration_ns"]) for p in run.phases] == [(p.phase, p.duration_ns) for p in b.phases]
    assert sum(run.phases["share"]) == pytest.approx(1)
    assert run.passes["bytes"] == [p.bytes for p in b.dirty_log.passes]
    assert run.sockets["role"] == [s.role for s in b.sockets]
    assert [v["blackout_ns"] for v in run.vcpus] == [v.blackout_ns for v in b.vcpus]
    calls = {(i["begin"], i["duration_ns"], i["ioctl"], i["slot"]) for i in run.ioctls}
    final = [i for fetch in b.dirty_log.fetches for i in fetch.ioctls]
    assert final and {(i.begin, i.duration_ns, i.ioctl, i.slot) for i in final} <= calls
    assert sum(run.events.kinds().values()) == len(run.events) == len(read_recording(QEMU).events)
    begins = [row["begin"] for row in run.events if row["begin"] is not None]
    assert begins == sorted(begins)
    assert msgspec.json.decode(run.report("json"), type=em.Breakdown) == b
    assert run.report("csv").startswith("phase,") and run.report("html").endswith("</html>\n")
    with pytest.raises(em.EbpfMigError, match="no report 'pdf'"):
        run.report("pdf")
    with pytest.raises(em.EbpfMigError, match="no event 'Nonsense'"):
        run.events.of("Nonsense")
    with pytest.raises(KeyError):
        run.phases["nonsense"]


def test_what_the_kernel_did_not_tell_is_null_and_not_minus_one() -> None:
    whole = read_recording(QEMU)
    pid = whole.header.targets[0].pid
    call = ev.Ioctl(0, 10**9, pid, pid, -1, 0x4010AE42, 0)
    run = em.Run(Recording(header=whole.header, events=[call]))
    (row,) = run.events.of("Ioctl")
    assert (row["begin_ns"], row["fd"], row["off_cpu_ns"], row["walk_ns"]) == (None, None, None, None)
    assert row["end_ns"] == 10**9 - run.origin_ns
    (row,) = em.load(HOSTS[0]).events.of("VcpuState")
    assert row["at_ns"] is not None


@pytest.mark.parametrize("name", [*TABLES, "Transfer", "TcpInfo", "OffCpu"])
def test_conversions_are_the_same_without_pyarrow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas", reason="missing feature: pandas")
    polars = pytest.importorskip("polars", reason="missing feature: polars")
    run = em.load(HOSTS[0])
    table = getattr(run, name) if name in TABLES else run.events.of(name)
    frames = table.to_pandas(), table.to_polars()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    pandas_frame, polars_frame = table.to_pandas(), table.to_polars()
    assert polars_frame.schema == frames[1].schema and polars_frame.equals(frames[1])
    assert list(map(str, pandas_frame.dtypes)) == list(map(str, frames[0].dtypes))
    if "stack" not in table.columns:  # a list in one, an array in the other
        assert pandas_frame.equals(frames[0])
    assert isinstance(polars_frame, polars.DataFrame)
    with pytest.raises(em.EbpfMigError, match="pyarrow is not installed"):
        table.to_arrow()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = em.load(QEMU).phases
    for name in ("pandas", "polars"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(em.EbpfMigError, match=f"{name} is not installed"):
            getattr(phases, f"to_{name}")()


def test_figures_beyond_64_bits_are_an_error_with_one_line() -> None:
    table = em.Table({"x": int}, lambda: [{"x": 1 << 70}])
    with pytest.raises(em.EbpfMigError, match="beyond 64 bits"):
        table.to_pandas()


def test_text_of_others_does_nothing_in_a_notebook() -> None:
    evil = "<img src=x onerror=alert(1)>\x1b[31m"
    whole = read_recording(QEMU)
    header = replace(whole.header, host=evil, targets=[replace(t, vmm=evil, comm=evil) for t in whole.header.targets])
    threads = [replace(e, name=evil) if isinstance(e, ev.Thread) else e for e in whole.events]
    run = em.Run(Recording(header=header, events=threads))
    for shown in (run._repr_html_(), run.ioctls._repr_html_(), run.waits._repr_html_(), run.events._repr_html_()):
        assert "<img" not in shown and "\x1b" not in shown


def result(more_ns: int) -> bytes:
    b = analyse(read_recording(QEMU)).breakdown
    runs = [Run(breakdown=replace(b, blackout_ns=(b.blackout_ns or 0) + more_ns + n)) for n in range(6)]
    return encode(Benchmark(scenario="idle", runs=[*runs, Run(breakdown=None, error="it failed")])).encode()


def test_results_of_many_runs(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(result(0))
    before, after = em.load_bench(tmp_path / "a.json"), em.load_bench(io.BytesIO(result(10**9)))
    assert len(before.runs) == 7 and before.runs[6]["error"] == "it failed" and before.runs[6]["blackout_ns"] is None
    assert before.breakdowns[6] is None and before.runs["verdict"][0] == "complete"
    found: dict[str, Any] = {row["figure"]: row for row in before.compare(after)}
    assert found["blackout"]["verdict"] == "slower" and found["window"]["verdict"] == "no difference"
    assert found["blackout"]["after_ns"] - found["blackout"]["before_ns"] == 10**9
    with pytest.raises(em.EbpfMigError):
        em.load_bench(QEMU)
