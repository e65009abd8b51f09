# SPDX-License-Identifier: Apache-2.0
"""The command line: the group of commands, and the one place that turns errors into exit codes.

In: arguments and signals. Out: an exit code (docs: 0 done, 1 bug, 2 usage, 3 preflight, 4 VMM, 5 incomplete,
6 regression, 128 + N signal). A command is imported only when it is used, so that it loads no libraries of others.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from ebpf_mig.commands.options import Group, examples
from ebpf_mig.commands.version import version_line
from ebpf_mig.errors import EbpfMigError, PreflightError, UsageError
from ebpf_mig.linux import limits, standard_streams
from ebpf_mig.text import printable

COMMANDS = (
    "demo", "migrate", "record", "report", "join", "export", "bench", "diff", "watch", "exporter", "doctor", "schema",
    "completion", "relay",
)  # fmt: skip
"""One module of `commands/` each, with a click command called `command`; in the order of `--help`."""
_HIDDEN = ("man",)
"""Commands that `--help` does not list."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""No room or no permission for a file of ours, wherever it is written."""

_VERBOSE = "ebpf_mig.verbose"
_COMPLETE = "_EBPF_MIG_COMPLETE"


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP. The clean-up is the same as for Ctrl-C."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


class Commands(Group):
    """Imports a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in (*COMMANDS, *_HIDDEN):
            return None
        module = importlib.import_module(f"ebpf_mig.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        command.name = cmd_name
        return _talkative(command)


def _talkative(command: click.Command) -> click.Command:
    """Adds `-v` to a command and its subcommands."""
    if _verbose not in command.params:
        command.params.append(_verbose)
        if isinstance(command, click.Group):
            below = command.get_command

            def get(ctx: click.Context, cmd_name: str) -> click.Command | None:
                found = below(ctx, cmd_name)
                return _talkative(found) if found is not None else None

            command.get_command = get  # type: ignore[method-assign]
    return command


def _set_verbose(ctx: click.Context, _param: click.Parameter, count: int) -> None:
    level = ctx.meta[_VERBOSE] = max(count, ctx.meta.get(_VERBOSE, 0))
    logging.getLogger("ebpf_mig").setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(level, 2)])


def _print_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(version_line())
        ctx.exit()


_verbose = click.Option(
    ["-v", "--verbose"],
    count=True,
    expose_value=False,
    callback=_set_verbose,
    help="Print more messages, and all rows of a text report; -vv also prints tracebacks.",
)


@click.group(
    cls=Commands,
    params=[_verbose],
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("ebpf-mig demo", "ebpf-mig record --pid 4711 -o vm1.rec", "ebpf-mig report vm1.rec"),
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show versions.",
)
def cli() -> None:
    """Where the downtime of a live migration goes, as the kernel saw it."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    standard_streams.reserve()
    if complete := os.environ.get(_COMPLETE):
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "ebpf-mig", _COMPLETE, complete)
    logging.basicConfig(format="ebpf-mig: %(message)s", stream=sys.stderr)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is signal.SIG_DFL:
            signal.signal(signum, _terminate)
    meta: dict[str, int] = {}
    try:
        with cli.make_context("ebpf-mig", list(sys.argv[1:] if args is None else args)) as ctx:
            meta = ctx.meta
            cli.invoke(ctx)
        sys.stdout.flush()
        code = 0
    except BaseException as error:  # every way out of a command ends here
        code = _exit_code(error, meta.get(_VERBOSE, 0))
    _settle_stdout()
    return code


def _terminate(signum: int, _frame: FrameType | None) -> None:
    raise Terminated(signum)


def _exit_code(error: BaseException, verbose: int) -> int:
    """Prints one line on stderr that says what `error` means for the user. Returns the exit code."""
    match error:
        case click.exceptions.Exit():
            return error.exit_code
        case click.ClickException():
            error.show()
            return error.exit_code
        case EbpfMigError():
            message, code = "; ".join(filter(None, (str(error), error.remedy))), error.exit_code
        case Terminated():
            message, code = "terminated", 128 + error.signum
        case KeyboardInterrupt() | click.Abort():
            message, code = "interrupted", 130
        case BrokenPipeError() if _stdout_gone():
            return 128 + signal.SIGPIPE
        case OSError() if _while_printing(error):
            message, code = f"cannot write to stdout: {error.strerror}", UsageError.exit_code
        case MemoryError() | OSError() if what := limits.spent(error):
            message, code = f"{what}; run with -vv for the traceback", PreflightError.exit_code
        case OSError() if error.errno in _FULL:
            where = error.filename if isinstance(error.filename, str) else "a file"
            message, code = f"cannot write {where}: {error.strerror}", UsageError.exit_code
        case _:
            what = f"{type(error).__name__}: {error}".rstrip(": ")
            message, code = f"internal error: {what}; run with -vv for the traceback", 1
    if verbose >= 2:
        traceback.print_exception(error)
    with contextlib.suppress(OSError):
        click.echo(f"ebpf-mig: {printable(message, 2000)}", err=True)
    return code


def _stdout_gone() -> bool:
    """Whether the reader of our stdout closed it, and not a VMM its socket."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _while_printing(error: BaseException) -> bool:
    """Whether click was printing, which it does for help and versions."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__")).startswith("click.")


def _settle_stdout() -> None:
    """Discards unwritten output, so that the interpreter does not report it again at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    sys.exit(main())
