# SPDX-License-Identifier: Apache-2.0
"""The exporter's options, variables and file: they say the same, and a wrong one gives one clear line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ebpf_mig.cli import cli
from ebpf_mig.commands.exporter import VARIABLES, command
from ebpf_mig.errors import UsageError


def params(*arguments: str) -> dict[str, object]:
    return command.make_context("exporter", list(arguments), **cli.context_settings).params


SETTINGS = [
    ("web.listen-address", ":9999"),
    ("web.config.file", "web.yml"),
    ("vm", "a*"),
    ("state-directory", "/srv"),
    ("keep", "7"),
    ("keep-size", "5GiB"),
    ("vm-label", "hash"),
    ("otlp-endpoint", "http://x:4318"),
    ("log-format", "json"),
]


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_an_option_its_variable_and_its_key_say_the_same(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = params(f"--{name}", value)
    assert wanted != params()
    file = tmp_path / "exporter.toml"
    file.write_text(f"{name} = {value}" if value.isdecimal() else f'{name} = "{value}"')
    assert params("--config.file", str(file)) == wanted
    monkeypatch.setenv(VARIABLES + re.sub(r"\W", "_", name).upper(), value)
    assert params() == wanted


def test_an_option_has_priority_over_a_variable_and_a_variable_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "exporter.toml"
    file.write_text('keep = 6\nkeep-size = 4096\nown-cost = true\n[web]\nlisten-address = ":1"\n')
    monkeypatch.setenv(f"{VARIABLES}CONFIG_FILE", str(file))
    said = params()
    assert (said["keep"], said["keep_size"], said["own_cost"], said["address"]) == (6, 4096, True, ":1")
    monkeypatch.setenv(f"{VARIABLES}KEEP", "")
    assert params()["keep"] == 6, "an empty variable sets nothing"
    monkeypatch.setenv(f"{VARIABLES}KEEP", "7")
    monkeypatch.setenv(f"{VARIABLES}OWN_COST", "0")
    assert params()["keep"] == 7 and params()["own_cost"] is False
    assert params("--keep", "8", "--web.listen-address", ":2") == params() | {"keep": 8, "address": ":2"}


def test_a_flag_has_a_variable_and_an_option_has_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{VARIABLES}OWN_COST", "1")
    monkeypatch.setenv(f"{VARIABLES}KEEP", "7")
    assert params()["own_cost"] is True
    assert params("--keep", "8")["keep"] == 8
    monkeypatch.setenv(f"{VARIABLES}KEEP", "")
    assert params()["keep"] == 100, "an empty variable is the default"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("KEEP", "0", "EBPF_MIG_EXPORTER_KEEP"),
        ("KEEP_SIZE", "many", "'many' is not a size"),
        ("LOG_FORMAT", "xml", "'xml' is not one of"),
        ("OWN_COST", "perhaps", "'perhaps' is not a valid boolean"),
        ("KEPT", "7", "the environment variable EBPF_MIG_EXPORTER_KEPT sets no option"),
        ("WEB_LISTEN_ADDRESS", "nowhere", "'nowhere' is not HOST:PORT"),
    ],
)
def test_a_wrong_variable_is_refused_in_one_line(name: str, value: str, said: str) -> None:
    said_there = refused({VARIABLES + name: value})
    assert said in said_there.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keep = 0", "keep: 0 is not in the range x>=1"),
        ('keep = "7"', "keep: '7' is not an integer"),
        ("keep = 7.5", "keep: '7.5' is not an integer"),
        ("keep = true", "keep: 'True' is not an integer"),
        ("keep-size = -5", "keep-size: '-5' is not a size; write it like 4GiB, 512M or 4096"),
        ("vm = 7", "vm: '7' is not a string"),
        ("own-cost = 1", "own-cost: '1' is not true or false"),
        ('log-format = "xml"', "log-format: 'xml' is not one of"),
        ('[web]\nlisten-address = "nowhere"', "web.listen-address: 'nowhere' is not HOST:PORT"),
        ("kept = 7", "kept is no option; known: keep, keep-size,"),
        ("web = 7", "web is no option"),
        ("verbose = true", "verbose is no option"),
        ("check-config = true", "check-config is no option"),
        ('config.file = "x"', "config.file is no option"),
        ("keep = ", "Invalid value (at end of document)"),
        ("keep = 7\nkeep = 8", "Cannot overwrite a value (at end of document)"),
        ("x = " + "[" * 20000, "cannot read"),
        ("a." * 3000 + "b = 1", "cannot read"),
        ("#" * 70000, "has more than 65536 bytes"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_with_the_key(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "exporter.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        params("--config.file", str(file))
    line = f"{error.value}; {error.value.remedy}"
    assert said in line and str(file) in line and "\n" not in line


def test_what_is_no_file_is_refused_and_nothing_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "binary").write_bytes(b"\xff")
    for name in ("fifo", "binary", "missing", "."):
        with pytest.raises(UsageError, match=r"cannot read .*|is not a regular file"):
            params("--config.file", str(tmp_path / name))


def test_check_config_says_what_is_wrong_and_starts_nothing(tmp_path: Path) -> None:
    file = tmp_path / "exporter.toml"
    file.write_text("keep = 0")
    variables = {f"{VARIABLES}CONFIG_FILE": str(file)}
    assert refused(variables, "--check-config") == f"ebpf-mig: {file}: keep: 0 is not in the range x>=1\n"
    file.write_text(f'web.config.file = "{tmp_path}/web.yml"')
    assert f"cannot read {tmp_path}/web.yml" in refused(variables, "--check-config")
    file.write_text("keep = 7")
    run = exporter(variables, "--check-config")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "the configuration is right\n")


def exporter(variables: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ebpf_mig.cli", "exporter", *options],
        env=os.environ | variables,
        capture_output=True,
        check=False,
        text=True,
        timeout=30,
    )


def refused(variables: dict[str, str], *options: str) -> str:
    """What is said on stderr."""
    run = exporter(variables, *options)
    assert run.returncode in (2, 3) and run.stdout == ""
    if run.returncode == 3:
        pytest.skip(f"missing feature: {run.stderr.splitlines()[-1]}")
    return run.stderr
