# SPDX-License-Identifier: Apache-2.0
"""Options that can also be set by environment variables and by a TOML file.

In: a click command, and the user's variables and file. Out: click's defaults. What is given as an option has priority
over a variable, and a variable over the file. What would be ignored silently is refused: a variable or a key that
belongs to no option, and a value of another type.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterator
from typing import Any

import click

from ebpf_mig.commands.options import Decorator, Quantity
from ebpf_mig.errors import UsageError
from ebpf_mig.text import printable

MAX_SETTINGS_BYTES = 64 << 10
"""Of a configuration file."""


def config_file_option(*without: str) -> Decorator:
    """`--config.file`. Its keys are the names of the command's options, but for those in `without`."""

    def apply(ctx: click.Context, _param: click.Parameter, path: str | None) -> None:
        if path and not ctx.resilient_parsing:
            ctx.default_map = read(path, ctx, {"config.file", "help", *without})

    return click.option(
        "--config.file",
        is_eager=True,
        expose_value=False,
        callback=apply,
        type=click.Path(),
        help="TOML file with options.",
    )


def read(path: str, ctx: click.Context, without: set[str]) -> dict[str, Any]:
    """The file's values by parameter. UsageError if it cannot be read, or with the key that is wrong."""
    options = {_name(param): param for param in ctx.command.params if isinstance(param, click.Option)}
    options = {name: param for name, param in options.items() if name not in without and param.expose_value}
    found = {}
    for key, value in _parsed(path):
        param = options.get(key)
        where = f"{printable(path)}: {printable(key, 100)}"
        if param is None or param.name is None:
            raise UsageError(f"{where} is no option", f"known: {', '.join(sorted(options))}")
        try:
            found[param.name] = _converted(value, param, ctx)
        except click.BadParameter as error:
            raise UsageError(f"{where}: {error.message.rstrip('.')}") from error
    return found


def _parsed(path: str) -> list[tuple[str, Any]]:
    try:
        # Opening a FIFO does not block.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{printable(path)} is not a regular file")
            text = file.read(MAX_SETTINGS_BYTES + 1)
        if len(text) > MAX_SETTINGS_BYTES:
            raise UsageError(f"{printable(path)} has more than {MAX_SETTINGS_BYTES} bytes")
        return list(_flat(tomllib.loads(text.decode())))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"cannot read {printable(path)}: {printable(str(why), 200)}") from error


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of nested tables with dots between them: `web.listen-address` is the same as `listen-address` in [web]."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _converted(value: Any, param: click.Option, ctx: click.Context) -> Any:
    """The value that the option would give, from the TOML type that fits it."""
    kinds, what = _kinds(param)
    if type(value) not in kinds:
        raise click.BadParameter(f"{printable(str(value), 100)!r} is not {what}")
    return value if param.is_flag else param.type.convert(str(value), param, ctx)


def _kinds(param: click.Option) -> tuple[tuple[type, ...], str]:
    if param.is_flag:
        return (bool,), "true or false"
    if isinstance(param.type, click.types.IntParamType):
        return (int,), "an integer"
    if isinstance(param.type, Quantity):
        return (int, str), f"a {param.type.name}"
    return (str,), "a string"


def _name(param: click.Option) -> str:
    """`web.listen-address` for `--web.listen-address`."""
    return max(param.opts, key=len).lstrip("-")


def add_variables(command: click.Command, prefix: str, *without: str) -> None:
    """Lets each option be set by an environment variable: `--web.listen-address` by `PREFIX` + `WEB_LISTEN_ADDRESS`."""
    for param in command.params:
        if isinstance(param, click.Option) and _name(param) not in without:
            param.envvar = prefix + re.sub(r"\W", "_", _name(param)).upper()
            param.show_envvar = True


def refuse_unknown_variables(command: click.Command, prefix: str) -> None:
    """UsageError if a variable with `prefix` belongs to no option. A misspelt one would be ignored silently."""
    known = {param.envvar for param in command.params if isinstance(param, click.Option)}
    for name in sorted(name for name in os.environ if name.startswith(prefix)):
        if name not in known:
            raise UsageError(f"the environment variable {printable(name)} sets no option", "see --help for their names")
