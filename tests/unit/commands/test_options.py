# SPDX-License-Identifier: Apache-2.0
"""What commands share: quantities with units, results in files, what a terminal can show."""

from __future__ import annotations

import io
import os
import pty
import resource
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path
from typing import TextIO

import click
import pytest

from ebpf_mig.commands.options import DURATION, RATE, SIZE, Quantity, examples, write_result
from ebpf_mig.commands.terminal import canvas_for, use_colour
from ebpf_mig.errors import UsageError
from ebpf_mig.report.canvas import Canvas
from ebpf_mig.text import printable


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (SIZE, "4096", 4096),
        (SIZE, "4GiB", 4 << 30),
        (SIZE, "512M", 512 << 20),
        (SIZE, "1.5 K", 1536),
        (SIZE, "1.5kB", 1500),
        (SIZE, "2GB", 2_000_000_000),
        (SIZE, "7B", 7),
        (SIZE, "9223372036854775807", 2**63 - 1),
        (DURATION, "5s", 5_000_000_000),
        (DURATION, "300ms", 300_000_000),
        (DURATION, "0.25us", 250),
        (DURATION, "17ns", 17),
        (DURATION, "2m", 120_000_000_000),
        (DURATION, "0", 0),
        (RATE, "1Gbit", 125_000_000),
        (RATE, "1Gbit/s", 125_000_000),
        (RATE, "100MiB/s", 100 << 20),
        (RATE, "100MB/s", 100_000_000),
        (RATE, "8bit", 1),
        (RATE, "0", 0),
        (SIZE, 5, 5),
    ],
)
def test_quantities(kind: Quantity, text: str, value: int) -> None:
    assert kind.convert(text, None, None) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (SIZE, "4gib", "'4gib' is not a size; write it like 4GiB, 512M or 4096"),
        (SIZE, "-1", "is not a size"),
        (SIZE, "", "is not a size"),
        (SIZE, "1e9", "is not a size"),
        (SIZE, "٣", "is not a size"),
        (SIZE, "nan", "is not a size"),
        (SIZE, "1.2", "'1.2' is too large or too fine for a size"),
        (SIZE, "8388608T", "is too large or too fine for a size"),
        (SIZE, "9" * 5000, "is not a size"),
        (SIZE, "1\x1b[2J", r"'1\\x1b[2J' is not a size"),
        (DURATION, "5", "'5' is not a duration; write it like 5s or 300ms"),
        (DURATION, "5M", "is not a duration"),
        (DURATION, "0.1ns", "is too large or too fine for a duration"),
        (RATE, "100", "'100' is not a rate; write it like 1Gbit or 100MiB/s"),
        (RATE, "1MiB", "is not a rate"),
        (RATE, "1bit", "is too large or too fine for a rate"),
    ],
)
def test_what_is_no_quantity_is_refused_with_an_example(kind: Quantity, text: str, message: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        kind.convert(text, None, None)
    assert message in caught.value.message
    assert caught.value.message.isprintable()


def test_result_file_is_new_private_and_utf8(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_result("± \udc80\n", str(path))
    assert path.read_bytes() == b"\xc2\xb1 \\udc80\n"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="exists; not overwritten"):
        write_result("x", str(path))
    write_result("x", str(path), force=True)
    assert path.read_bytes() == b"x"


def test_result_is_not_written_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UsageError, match="symbolic link"):
        write_result("x", str(tmp_path / "link"), force=True)
    assert target.read_text() == "precious"


def test_result_that_does_not_fit_leaves_no_half_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UsageError, match=r"^cannot write .*: File too large$"):
            write_result("x" * 5000, str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()


def test_device_survives_a_failed_result() -> None:
    with pytest.raises(UsageError, match="cannot write /dev/full: No space left on device"):
        write_result("x", "/dev/full")
    assert Path("/dev/full").exists()


@contextmanager
def terminal(columns: int, encoding: str = "utf-8") -> Iterator[TextIO]:
    """A pseudo terminal of that width, open for writing."""
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(slave, "w", encoding=encoding) as stream:
        yield stream
    os.close(master)


@pytest.mark.parametrize(
    ("choice", "environ", "colour"),
    [
        ("auto", {"TERM": "xterm"}, True),
        ("auto", {}, True),
        ("auto", {"TERM": "dumb"}, False),
        ("auto", {"NO_COLOR": "1"}, False),
        ("auto", {"NO_COLOR": ""}, True),
        ("auto", {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ("auto", {"FORCE_COLOR": "1", "TERM": "dumb"}, True),
        ("always", {"NO_COLOR": "1", "TERM": "dumb"}, True),
        ("never", {"FORCE_COLOR": "1"}, False),
    ],
)
def test_colour_on_a_terminal(choice: str, environ: dict[str, str], colour: bool) -> None:
    with terminal(80) as stream:
        assert use_colour(stream, choice, environ) is colour


def test_colour_without_a_terminal() -> None:
    pipe = io.TextIOWrapper(io.BytesIO())
    assert not use_colour(pipe, "auto", {"TERM": "xterm"})
    assert use_colour(pipe, "auto", {"FORCE_COLOR": "1"})
    assert not use_colour(pipe, "auto", {"FORCE_COLOR": "0"})
    assert use_colour(pipe, "always", {})


def test_canvas_of_a_terminal_and_of_a_pipe() -> None:
    with terminal(93) as stream:
        assert canvas_for(stream, "auto", {}) == Canvas(93, True, True)
    with terminal(0, "latin-1") as stream:
        assert canvas_for(stream, "never", {}) == Canvas(80, False, False)
    assert canvas_for(io.TextIOWrapper(io.BytesIO(), "UTF8"), "auto", {"COLUMNS": "40"}) == Canvas(80, False, True)
    assert canvas_for(None, "auto", {"FORCE_COLOR": "1"}) == Canvas(80, False, True)
    assert canvas_for(None, "always", {}) == Canvas(80, True, True)


def test_printable() -> None:
    assert printable("CPU 0/KVM é東") == "CPU 0/KVM é東"
    assert printable("a\x1b[31m\x07\r\n\x9b\u202e\udc80") == r"a\x1b[31m\x07\r\n\x9b\u202e\udc80"
    assert printable("x" * 300) == "x" * 199 + "…"
    assert printable("abcdef", 4) == "abc…"


def test_examples_are_not_wrapped() -> None:
    long = "ebpf-mig " + "x" * 60 + " y"
    command = click.Command("c", epilog=examples(long, "ebpf-mig b"))
    with click.Context(command) as ctx:
        assert f"Examples:\n    {long}\n    ebpf-mig b\n" in command.get_help(ctx) + "\n"
