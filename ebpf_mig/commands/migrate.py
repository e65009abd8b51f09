# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig migrate VMM`: triggers a migration of the user's own VMs through the VMM's API, and traces it."""

from __future__ import annotations

import contextlib
import functools

import click

from ebpf_mig.commands import tracing
from ebpf_mig.commands.common import DURATION, RATE, color_option, examples, format_option, strict_option
from ebpf_mig.vmm.qemu import QemuMigration, QemuOptions

_QEMU_EXAMPLES = (
    examples(
        "ebpf-mig migrate qemu --source a.qmp --destination b.qmp --uri tcp:127.0.0.1:4444",
        "ebpf-mig migrate qemu --source a.qmp --destination b.qmp --uri unix:/run/m.sock --multifd 4",
    )
    + """

\b
The destination is a QEMU started like the source, plus -incoming defer. Each
needs a QMP socket of its own: -qmp unix:PATH,server=on,wait=off"""
)


@click.group("migrate")
def command() -> None:
    """Migrate VMs that run already, and print where the downtime went."""


@command.command("qemu", epilog=_QEMU_EXAMPLES)
@click.option("--source", required=True, metavar="SOCKET", help="QMP socket of the VM to migrate.")
@click.option("--destination", required=True, metavar="SOCKET", help="QMP socket of the VM that waits for it.")
@click.option("--uri", required=True, help="Where the destination listens: tcp:HOST:PORT or unix:PATH.")
@click.option("--multifd", type=click.IntRange(1, 255), help="Send memory over this many channels.")
@click.option("--downtime-limit", type=DURATION, help="Set QEMU's downtime-limit, e.g. 300ms.")
@click.option("--bandwidth", type=RATE, help="Set QEMU's max-bandwidth, e.g. 10Gbit; 0: unlimited.")
@click.option("--postcopy", is_flag=True, help="Switch to postcopy after the second pass.")
@click.option("--timeout", type=DURATION, default="10m", show_default=True, help="Cancel the migration after this.")
@tracing.recording_options
@format_option("text", "json")
@color_option
@strict_option
def qemu(
    source: str,
    destination: str,
    uri: str,
    multifd: int | None,
    downtime_limit: int | None,
    bandwidth: int | None,
    postcopy: bool,
    timeout: int,
    output: str | None,
    force: bool,
    form: str,
    color: str,
    strict: bool,
) -> None:
    """Migrate a QEMU VM through QMP."""
    tracing.check_output(output, force)
    downtime_ms = None if downtime_limit is None else downtime_limit // 10**6
    options = QemuOptions(bandwidth, downtime_ms, multifd, postcopy)
    open_writer = functools.partial(tracing.open_recording, output, "migrate", force=force)
    with contextlib.closing(QemuMigration(source, destination, uri, options)) as migration:
        outcome, name = tracing.trace_migration(migration, timeout / 10**9, open_writer)
    tracing.conclude(outcome, tracing.show(name, form, color), strict)
