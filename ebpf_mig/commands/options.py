# SPDX-License-Identifier: Apache-2.0
"""Shared by several commands: options, value types, and writing a result without overwriting a file.

In: user input. Out: bytes, nanoseconds, bytes per second; results on stdout or in a new file.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ebpf_mig.errors import UsageError
from ebpf_mig.files import open_new
from ebpf_mig.text import printable

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

if TYPE_CHECKING:
    from click import ParamType as ParamType  # noqa: PLC0414 - exported
else:

    class ParamType(click.ParamType):
        """click's own, which cannot be subscripted before click 8.4."""

        def __class_getitem__(cls, _: object) -> type:
            return cls


class Group(click.Group):
    """Without a subcommand it prints its help on stderr and ends with 2; click before 8.2 would end with 0."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(UsageError.exit_code)
        return super().parse_args(ctx, args)


_LIMIT = 1 << 63


class Quantity(ParamType[int]):
    """A number with a unit, as an exact integer of the base unit."""

    def __init__(self, name: str, units: dict[str, int | Fraction], example: str, *, bare: bool = False) -> None:
        self.name = name
        self._units = units
        self._example = example
        self._bare = bare

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """`value` in the base unit; fails if the unit is unknown or missing, or if the result is not an integer."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,19}(?:\.[0-9]{1,18})?) ?([A-Za-z/]*)", str(value).strip(), re.ASCII)
        unit = self._unit(match[2], match[1]) if match else None
        if match is None or unit is None:
            self.fail(f"{printable(str(value))!r} is not a {self.name}; write it like {self._example}", param, ctx)
        amount = Fraction(match[1]) * unit
        if amount.denominator != 1 or amount >= _LIMIT:
            self.fail(f"{printable(str(value))!r} is too large or too fine for a {self.name}", param, ctx)
        return int(amount)

    def _unit(self, text: str, number: str) -> int | Fraction | None:
        if not text:
            return 1 if self._bare or Fraction(number) == 0 else None
        return self._units.get(text)


_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DECIMAL = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BYTES: dict[str, int | Fraction] = {
    "B": 1,
    **_BINARY,
    **{f"{prefix}iB": factor for prefix, factor in _BINARY.items()},
    **{f"{prefix}B": factor for prefix, factor in _DECIMAL.items()},
}
_BITS = {f"{prefix}bit": Fraction(factor, 8) for prefix, factor in ({"": 1} | _DECIMAL).items()}

SIZE = Quantity("size", _BYTES, "4GiB, 512M or 4096", bare=True)
"""Bytes. K, M, G and T alone are binary, as VMMs read them; kB, MB, GB and TB are decimal."""

DURATION = Quantity(
    "duration",
    {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9},
    "5s or 300ms",
)
"""Nanoseconds."""

RATE = Quantity(
    "rate",
    {**_BITS, **{f"{unit}/s": factor for unit, factor in (_BYTES | _BITS).items()}},
    "1Gbit or 100MiB/s",
)
"""Bytes per second. Bits are decimal, as in networks."""


def format_option(*formats: str) -> Decorator:
    """`--format`. The first of `formats` is the default."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(formats),
        default=formats[0],
        show_default=True,
        help="Kind of report.",
    )


def output_option(what: str = "report") -> Decorator:
    """`--output` and `--force`."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option("--force", is_flag=True, help="Overwrite an existing file.")(command)
        return click.option(
            "-o",
            "--output",
            type=click.Path(dir_okay=False),
            default="-",
            help=f"Write the {what} to this file instead of stdout.",
        )(command)

    return add


color_option: Decorator = click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Colour the text; auto follows NO_COLOR and FORCE_COLOR.",
)

strict_option: Decorator = click.option(
    "--strict", is_flag=True, help="Exit with 5 if the result is incomplete. The result is still written."
)


def examples(*lines: str) -> str:
    """An epilog with command lines that click does not wrap."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def write_result(result: str | bytes, output: str = "-", *, force: bool = False) -> None:
    """Write `result` to stdout (`-`) or to a new file in UTF-8. Raises UsageError; leaves no half-written file."""
    if output == "-":
        _write_stdout(result)
        return
    descriptor = open_new(output, force=force)
    ours = stat.S_ISREG(os.fstat(descriptor).st_mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(result if isinstance(result, bytes) else result.encode("utf-8", "backslashreplace"))
    except OSError as error:
        if ours:
            Path(output).unlink(missing_ok=True)
        raise UsageError(f"cannot write {output}: {error.strerror}") from error


def encoded(text: str) -> bytes:
    """Text for standard output. Characters that its encoding lacks are escaped, since a VM may have any name."""
    return text.encode(sys.stdout.encoding or "ascii", "backslashreplace")


def _write_stdout(result: str | bytes) -> None:
    stream = sys.stdout
    if isinstance(result, bytes) and stream.isatty():
        raise UsageError("this report is binary and stdout is a terminal", "use -o FILE, or redirect stdout")
    try:
        stream.buffer.write(result if isinstance(result, bytes) else encoded(result))
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"cannot write to stdout: {error.strerror}") from error


def say(message: str) -> None:
    """Prints one line for the user on stderr."""
    click.echo(message, err=True)
