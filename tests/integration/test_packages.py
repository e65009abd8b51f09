# SPDX-License-Identifier: Apache-2.0
"""The source distribution is complete: what is built from it has the same bytes as what is built from the clone."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.conftest import requires

ROOT = Path(__file__).parents[2]
pytestmark = [requires("root", "a clone"), pytest.mark.timeout(400)]
GENERATED = {"PKG-INFO", "setup.cfg"}


def build(script: Path, out: Path) -> dict[str, bytes]:
    """Runs a script of tools/ and returns the files that it made, by name."""
    result = subprocess.run([script, out], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return {path.name: path.read_bytes() for path in out.iterdir()}


def names(sdist: Path) -> set[str]:
    """The files of a source distribution, without those that setuptools makes."""
    with tarfile.open(sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    return {name for name in found - GENERATED if ".egg-info/" not in name}


def test_an_unpacked_sdist_builds_the_same_sdist_and_wheel(tmp_path: Path) -> None:
    made = build(ROOT / "tools" / "build-wheel", tmp_path / "clone")
    (sdist,) = (tmp_path / "clone").glob("*.tar.gz")
    committed = subprocess.check_output(["git", "ls-tree", "-r", "--name-only", "HEAD"], cwd=ROOT, text=True)
    assert names(sdist) == set(committed.split())
    subprocess.run(["tar", "xzf", sdist, "-C", tmp_path], check=True)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    (unpacked / ".venv").mkdir()
    (unpacked / ".venv" / "junk.py").write_text("left by ./check")
    assert build(unpacked / "tools" / "build-wheel", tmp_path / "again") == made


def test_sources_without_a_time_are_refused_in_one_line(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "tools").mkdir(parents=True)
    for name in ("setup.sh", "source-date"):
        (copy / "tools" / name).write_bytes((ROOT / "tools" / name).read_bytes())
    command = ["bash", "-c", ". tools/setup.sh && export_sources out"]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert result.returncode == 3
    assert result.stderr == (
        "ebpf-mig: tools/source-date has no time: build from a clone, or from an archive that git or "
        "tools/build-wheel made\n"
    )
