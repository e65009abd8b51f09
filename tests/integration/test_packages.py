# SPDX-License-Identifier: Apache-2.0
"""Packages as the scripts of tools/ build them: each is complete, and a second build has the same bytes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from ebpf_mig.cli import COMMANDS
from tests.conftest import requires

ROOT = Path(__file__).parents[2]
pytestmark = [requires("root", "a clone"), pytest.mark.timeout(900)]
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


@pytest.mark.long
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


def asked(rpm: Path, *what: str) -> list[str]:
    return subprocess.check_output(["rpm", "-qp", *what, rpm], text=True).splitlines()


@pytest.mark.long
def test_the_rpm_package_has_its_parts_and_fedoras_names(tmp_path: Path) -> None:
    """rpmlint is part of the build. A second build, of a tree without git, has the same bytes."""
    made = build(ROOT / "tools" / "build-rpm", tmp_path / "out")
    assert len(made) == 5
    (package,) = (tmp_path / "out").glob("*.noarch.rpm")
    files = asked(package, "-l")
    site = next(name for name in files if name.endswith("/site-packages/ebpf_mig"))
    pages = [f"/usr/share/man/man1/ebpf-mig{name}.1" for name in ("", *(f"-{name}" for name in COMMANDS))]
    for name in (
        "/usr/bin/ebpf-mig",
        "/usr/lib/systemd/system/ebpf-mig-exporter.service",
        "/usr/share/bash-completion/completions/ebpf-mig",
        "/usr/share/fish/vendor_completions.d/ebpf-mig.fish",
        "/usr/share/zsh/site-functions/_ebpf-mig",
        f"{site}/bpf/trace.bpf.c",
        *pages,
    ):
        assert name in files, name
    assert not [name for name in files if "tests" in name or name.endswith((".pyc", "direct_url.json"))]
    requires = asked(package, "--requires")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, bound in (line.split(">=") for line in wanted):
        assert f"python3dist({name.replace('.', '-')}) >= {bound}" in requires
    assert "python3-bcc >= 0.26" in requires
    assert re.search(r"systemctl --no-reload preset ebpf-mig-exporter.service", "\n".join(asked(package, "--scripts")))

    subprocess.run(["sh", "-c", 'rpm2cpio "$0" | cpio --quiet -idm', package], cwd=tmp_path, check=True)
    recording = ROOT / "tests" / "data" / "qemu-10.0-ring.rec"
    command = [sys.executable, "-P", tmp_path / "usr/bin/ebpf-mig", "report", recording]
    place = os.fspath(tmp_path / site.lstrip("/")).removesuffix("/ebpf_mig")
    said = subprocess.check_output(command, text=True, cwd="/", env={**os.environ, "PYTHONPATH": place})
    assert said == recording.with_suffix(".txt").read_text()

    (tmp_path / "tree").mkdir()
    subprocess.run(["sh", "-c", 'git archive HEAD | tar x -C "$0"', tmp_path / "tree"], cwd=ROOT, check=True)
    assert build(tmp_path / "tree" / "tools" / "build-rpm", tmp_path / "again") == made
