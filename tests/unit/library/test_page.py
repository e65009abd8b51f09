# SPDX-License-Identifier: Apache-2.0
"""docs/library.md: its code runs as it stands, in this process and in a real notebook kernel."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path

import msgspec
import pytest

from ebpf_mig.collector import analyse
from ebpf_mig.compare.benchmark import Benchmark, Run, encode
from ebpf_mig.recording.file import read_recording
from tests.unit.commands.test_cli import ROOT

DATA = ROOT / "tests" / "data"
CELLS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "library.md").read_text(), re.S | re.M)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the page's files are."""
    shutil.copy(DATA / "qemu-11.1-tcp.rec", tmp_path / "vm1.rec")
    for side in ("source", "destination"):
        shutil.copy(DATA / "hosts" / f"{side}.rec", tmp_path)
    b = analyse(read_recording(DATA / "qemu-11.1-tcp.rec")).breakdown
    for name, more in (("before", 0), ("after", 50_000_000)):
        runs = [
            Run(breakdown=msgspec.structs.replace(b, blackout_ns=(b.blackout_ns or 0) + more + n * 1000))
            for n in range(8)
        ]
        (tmp_path / f"{name}.json").write_text(encode(Benchmark(scenario="idle", runs=runs)))
    return tmp_path


def expected(printed: str) -> None:
    """What the page's prints come to for these files."""
    for line in (
        "completed, blackout ",
        "final fetch ",
        " bytes sent",
        "blackout slower ",
        "not an ebpf-mig recording",
        " ns ahead, within ",
        "phase        what happens ",
    ):
        assert line in printed, line


def test_the_pages_code_runs(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas", reason="missing feature: pandas")
    pytest.importorskip("polars", reason="missing feature: polars")
    monkeypatch.chdir(directory)
    assert len(CELLS) >= 8
    printed, names = io.StringIO(), {}  # type: tuple[io.StringIO, dict[str, Any]]
    with contextlib.redirect_stdout(printed):
        for cell in CELLS:
            exec(compile(cell, "docs/library.md", "exec"), names)  # noqa: S102
    expected(printed.getvalue())


def test_the_pages_code_runs_in_a_notebook(directory: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="missing feature: nbclient")
    for name in ("ipykernel", "pandas", "polars"):
        pytest.importorskip(name, reason=f"missing feature: {name}")
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.rstrip()) for cell in CELLS])
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    expected("".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"))
    assert [o for o in outputs if o.output_type == "error"] == []
    shown = notebook.cells[0].outputs[0].data["text/html"]
    assert "<h3>Downtime " in shown and "fetch.kernel" in shown and "<svg" in shown
    assert "http" not in shown and "<script" not in shown, "nothing to load, nothing that runs"
    frame = notebook.cells[2].outputs[0].data["text/html"]
    assert "unattributed" in frame
