# SPDX-License-Identifier: Apache-2.0
"""`bench --versus`: what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from ebpf_mig.cli import cli
from ebpf_mig.commands.bench import command


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["idle", "--versus", "colour=red"], "cannot read the change 'colour=red'"),
        (["idle", "--versus", "=", "--versus", ""], "cannot read the change '='"),
        (["idle", "--versus", "memory"], "--versus memory has no value"),
        (["idle", "--versus", "memory="], "--versus memory has no value"),
        (["idle", "--versus", "memory=many"], "is not a size"),
        (["idle", "--versus", "vcpus=0"], "0 is not in the range"),
        (["idle", "--versus", "local=1"], "--local has no value"),
        (["idle", "--versus", "runs=3"], "cannot read the change 'runs=3'"),
        (["idle", "--memory", "1GiB", "--versus", "memory=1GiB"], "both sides of --versus are the same"),
        (["idle", "--versus", "memory=1GiB", "--versus", "memory=2GiB"], "--versus memory is given twice"),
        (["idle", "--versus", "vcpus=2", "--sweep", "memory=1GiB,2GiB"], "exclude each other"),
        (["idle", "--fail-if", "blackout.p50>+5%"], "there is one"),
        (["idle", "--versus", "vcpus=2", "--fail-if", "blackout>5"], "cannot read the condition"),
        (["--versus", "vcpus=2", "--", "sh", "x", "{recording}"], "not a command"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, words: list[str], why: str) -> None:
    done = CliRunner().invoke(command, ["-o", str(tmp_path / "x.json"), *words], **cli.context_settings)
    assert done.exit_code != 0 and why in f"{done.output}{done.exception}"
    assert not list(tmp_path.iterdir())
