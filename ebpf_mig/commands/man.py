# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig man`: prints the man pages, generated from the command line definitions.

In: the click group. Out: troff text of section 1 (man(7) macros). The command is hidden: packagers call it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from ebpf_mig import __version__
from ebpf_mig.commands.options import write_result

_EXIT_CODES = {
    0: "done",
    1: "a bug in ebpf-mig",
    2: "the command line cannot be carried out as written, or a file cannot be read",
    3: "this machine or this user cannot do what was asked",
    4: "the VMM refused, or the migration failed or was cancelled",
    5: "events were lost, and --strict was given",
    6: "a regression was found by diff",
    130: "interrupted (128 and the signal's number)",
}


@click.command("man", hidden=True)
@click.option("--directory", help="Write one page per command to this existing directory, and one of all commands.")
@click.pass_context
def command(ctx: click.Context, directory: str | None) -> None:
    """Print the man page of all commands, in troff."""
    root = ctx.find_root().command
    assert isinstance(root, click.Group)  # noqa: S101 - it has found us
    if directory is None:
        write_result(page(root))
        return
    for name, text in pages(root).items():
        write_result(text, str(Path(directory) / name))


def page(cli: click.Group) -> str:
    """The page of a group of commands."""
    return "\n".join(_lines(cli)) + "\n"


def pages(cli: click.Group) -> dict[str, str]:
    """By file name: the page of all commands, and that of each."""
    root = _root(cli)
    found = {"ebpf-mig.1": page(cli)}
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        if command is not None and not command.hidden:
            found[f"ebpf-mig-{name}.1"] = "\n".join(_command_lines(command, root)) + "\n"
    return found


def _root(cli: click.Group) -> click.Context:
    return click.Context(cli, info_name="ebpf-mig", terminal_width=76, **cli.context_settings)


def _lines(cli: click.Group) -> Iterator[str]:
    root = _root(cli)
    yield from _head("ebpf-mig", cli)
    yield "[\\fIOPTIONS\\fR] \\fICOMMAND\\fR [\\fIARGS\\fR]..."
    yield ".SH OPTIONS"
    yield from _options(cli, root)
    yield ".SH COMMANDS"
    yield from _commands(cli, root)
    yield ".SH EXIT STATUS"
    for code, meaning in _EXIT_CODES.items():
        yield f".TP\n.B {code}\n{_escaped(meaning)}"
    yield ".SH ENVIRONMENT"
    yield ".TP\n.B NO_COLOR, FORCE_COLOR\nwithout and with colour, where \\-\\-color is auto"


def _head(name: str, command: click.Command) -> Iterator[str]:
    yield f'.TH {_escaped(name.upper())} 1 "" "ebpf\\-mig {_escaped(__version__)}" "User Commands"'
    yield ".SH NAME"
    yield f"{_escaped(name)} \\- {_escaped(_short(command))}"
    yield ".SH SYNOPSIS"
    yield f".B {_escaped(name.replace('ebpf-mig-', 'ebpf-mig '))}"


def _command_lines(command: click.Command, parent: click.Context) -> Iterator[str]:
    context = click.Context(command, info_name=command.name, parent=parent, terminal_width=76)
    yield from _head(f"ebpf-mig-{command.name}", command)
    yield _escaped(" ".join(command.collect_usage_pieces(context)))
    yield ".SH DESCRIPTION"
    yield from _paragraphs(command.help or "")
    if isinstance(command, click.Group):
        yield ".SH COMMANDS"
        yield from _commands(command, context)
    else:
        yield ".SH OPTIONS"
        yield from _options(command, context)
        yield from _paragraphs(command.epilog or "")
    yield ".SH SEE ALSO"
    yield ".BR ebpf\\-mig (1)"


def _commands(group: click.Group, parent: click.Context) -> Iterator[str]:
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        if command is None or command.hidden:
            continue
        context = click.Context(command, info_name=name, parent=parent, terminal_width=76)
        if isinstance(command, click.Group):
            yield from _commands(command, context)
            continue
        yield f".SS {_escaped(context.command_path)} {_escaped(' '.join(command.collect_usage_pieces(context)))}"
        yield from _paragraphs(command.help or "")
        yield from _options(command, context)
        yield from _paragraphs(command.epilog or "")


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield f".TP\n.B {_escaped(record[0])}\n{_escaped(record[1])}"


def _paragraphs(text: str) -> Iterator[str]:
    """Filled paragraphs. Those that click does not wrap (`\\b`) keep their lines."""
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        lines = [line for line in paragraph.splitlines() if line.strip()]
        if lines and lines[0].strip() == "\b":
            yield ".PP\n.nf"
            yield from (_escaped(line) for line in lines[1:])
            yield ".fi"
        elif lines:
            yield ".PP\n" + _escaped(" ".join(line.strip() for line in lines))


def _short(command: click.Command) -> str:
    return (command.help or "").strip().splitlines()[0].rstrip(".")


def _escaped(text: str) -> str:
    """Escapes text for troff: backslashes, hyphens, control characters at the begin of a line."""
    safe = text.replace("\\", "\\e").replace("-", "\\-").replace("\n", " ")
    return f"\\&{safe}" if safe[:1] in {".", "'"} else safe
