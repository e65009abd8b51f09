# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig migrate VMM`: triggers a migration of the user's own VMs through the VMM's API, and traces it.

There is one subcommand for each adapter with options. In: their values. Out: a recording, a report and an exit
code.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import click

from ebpf_mig.commands import run, two_hosts
from ebpf_mig.commands.options import DURATION, RATE, Group, color_option, examples, format_option, strict_option
from ebpf_mig.errors import UsageError
from ebpf_mig.joining.merge import Hint
from ebpf_mig.linux.capabilities import require_tracing
from ebpf_mig.text import printable
from ebpf_mig.vmm import adapter as adapter_of
from ebpf_mig.vmm import adapters
from ebpf_mig.vmm.adapter import Adapter, Kind, Option, Values


class _Vmms(Group):
    """The VMMs that this tool can ask to migrate."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return [one.name for one in adapters() if one.options]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _command(adapter_of(cmd_name)) if cmd_name in self.list_commands(ctx) else None


_EXAMPLES = examples(*(f"ebpf-mig migrate {one.name} --help" for one in adapters() if one.options))


@click.command("migrate", cls=_Vmms, epilog=_EXAMPLES)
def command() -> None:
    """Migrate running VMs, and print where the downtime went."""


def _command(adapter: Adapter) -> click.Command:
    """`migrate VMM`: the adapter's options, then the options that all VMMs have."""

    def migrate(**values: Any) -> None:
        own = {_key(option): _checked(option, values.pop(_key(option))) for option in adapter.options}
        _migrate(adapter, own, **values)

    migrate.__doc__ = adapter.about
    decorators = [
        *map(_click, adapter.options),
        click.option("--timeout", type=DURATION, default="10m", show_default=True, help=adapter.timeout_help),
        two_hosts.elsewhere_options,
        run.recording_options,
        run.tier_option,
        run.user_stacks_option,
        format_option("text", "json"),
        color_option,
        strict_option,
    ]
    made: Any = migrate
    for decorator in reversed(decorators):
        made = decorator(made)
    epilog = examples(*adapter.examples.get("migrate", ())) + (f"\n\n\b\n{adapter.epilog}" if adapter.epilog else "")
    return click.command(adapter.name, epilog=epilog)(made)


def _key(option: Option) -> str:
    return option.name.lstrip("-").replace("-", "_").lower()


def _checked(option: Option, value: Any) -> Any:
    """The value; UsageError if it goes to the VMM as a text and is none. Bytes of the command line that are not UTF-8
    are lone surrogates here, which neither JSON nor libvirt takes."""
    if isinstance(value, str) and not option.opened:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{option.name} is not UTF-8: {printable(value)}", "VMMs take only UTF-8") from error
    return value


def _click(option: Option) -> Any:
    """The decorator that adds an option."""
    if option.argument:
        return click.argument(_key(option), metavar=option.name)
    if option.kind is Kind.FLAG:
        return click.option(option.name, is_flag=True, help=option.help)
    more: dict[str, Any] = {"help": option.help, "metavar": option.metavar, "required": option.required}
    match option.kind:
        case Kind.COUNT:
            more["type"] = click.IntRange(1, option.most)
        case Kind.DURATION:
            more["type"] = DURATION
        case Kind.RATE:
            more["type"] = RATE
        case Kind.CHOICE:
            more |= {"type": click.Choice(option.choices), "default": option.choices[0], "show_default": True}
    return click.option(option.name, **more)


def _migrate(
    adapter: Adapter,
    values: Values,
    *,
    timeout: int,
    source_host: str | None,
    destination_host: str | None,
    remote_command: str | None,
    remote_tool: str,
    output: str | None,
    force: bool,
    tier: str,
    user_stacks: bool,
    form: str,
    color: str,
    strict: bool,
    hint: Hint | None,
) -> None:
    run.check_output(output, force)
    way = two_hosts.way_of(source_host, destination_host, remote_command, remote_tool)
    if way is not None:
        names = two_hosts.file_names(output, "migrate", force)
        met = two_hosts.across(
            way, adapter, values, timeout / 10**9, names, tier=tier, user_stacks=user_stacks, force=force
        )
        two_hosts.conclude(met, names, form, color, hint, strict=strict)
        return
    require_tracing()
    open_writer = functools.partial(run.open_recording, output, "migrate", force=force)
    with contextlib.closing(adapter.connect(values)) as migration:
        outcome, name = run.trace_migration(migration, timeout / 10**9, open_writer, tier=tier, user_stacks=user_stacks)
    run.conclude(outcome, run.show(name, form, color), strict)
