# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig migrate VMM`: triggers a migration of the user's own VMs through the VMM's API, and traces it."""

from __future__ import annotations

import contextlib
import functools

import click

from ebpf_mig.commands import run, two_hosts
from ebpf_mig.commands.options import DURATION, RATE, color_option, examples, format_option, strict_option
from ebpf_mig.errors import UsageError
from ebpf_mig.join.merge import Hint
from ebpf_mig.vmm.base import Elsewhere
from ebpf_mig.vmm.cloud_hypervisor.migration import ChMigration, ChOptions
from ebpf_mig.vmm.qemu.migration import QemuMigration, QemuOptions

_QEMU_EXAMPLES = (
    examples(
        "ebpf-mig migrate qemu --source a.qmp --destination b.qmp \\",
        "    --uri tcp:127.0.0.1:4444",
        "ebpf-mig migrate qemu --source a.qmp --destination b.qmp \\",
        "    --uri unix:/run/m.sock --multifd 4",
    )
    + """

\b
The destination is a QEMU started like the source, plus -incoming defer. Each
needs a QMP socket of its own: -qmp unix:PATH,server=on,wait=off"""
)


@click.group("migrate", epilog=examples("ebpf-mig migrate qemu --help", "ebpf-mig migrate cloud-hypervisor --help"))
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
@two_hosts.elsewhere_options
@run.recording_options
@run.tier_option
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
    source_host: str | None,
    destination_host: str | None,
    remote_command: str | None,
    remote_tool: str,
    hint: Hint | None,
    output: str | None,
    force: bool,
    tier: str,
    form: str,
    color: str,
    strict: bool,
) -> None:
    """Migrate a QEMU VM through QMP."""
    run.check_output(output, force)
    downtime_ms = None if downtime_limit is None else downtime_limit // 10**6
    options = QemuOptions(bandwidth, downtime_ms, multifd, postcopy)
    way = two_hosts.way_of(source_host, destination_host, remote_command, remote_tool)
    if way is not None:

        def connect(near: str, far: str, remote: tuple[str, Elsewhere]) -> QemuMigration:
            return QemuMigration(near, far, uri, options, remote)

        names = two_hosts.file_names(output, "migrate", force)
        sockets = {"source": source, "destination": destination}
        met = two_hosts.across(way, sockets, connect, timeout / 10**9, names, tier=tier, force=force)
        two_hosts.conclude(met, names, form, color, hint, strict=strict)
        return
    open_writer = functools.partial(run.open_recording, output, "migrate", force=force)
    with contextlib.closing(QemuMigration(source, destination, uri, options)) as migration:
        outcome, name = run.trace_migration(migration, timeout / 10**9, open_writer, tier=tier)
    run.conclude(outcome, run.show(name, form, color), strict)


_CH_EXAMPLES = (
    examples(
        "ebpf-mig migrate cloud-hypervisor --source a.sock --destination b.sock \\",
        "    --url tcp:127.0.0.1:4444",
        "ebpf-mig migrate cloud-hypervisor --source a.sock --destination b.sock \\",
        "    --url unix:/run/m --local",
    )
    + """

\b
The destination is a Cloud Hypervisor started with --api-socket alone."""
)


@command.command("cloud-hypervisor", epilog=_CH_EXAMPLES)
@click.option("--source", required=True, metavar="SOCKET", help="API socket of the VM to migrate.")
@click.option("--destination", required=True, metavar="SOCKET", help="API socket of the VMM that waits for it.")
@click.option("--url", required=True, help="Where the destination shall listen: tcp:HOST:PORT or unix:PATH.")
@click.option("--local", is_flag=True, help="Hand the memory over by file descriptor (unix only).")
@click.option("--downtime-ms", type=click.IntRange(1), help="Its downtime goal (v52 and later).")
@click.option("--timeout-s", type=click.IntRange(1), help="Its own time-out for pre-copy (v52 and later).")
@click.option("--connections", type=click.IntRange(1, 128), help="TCP connections (v52 and later).")
@click.option("--tls-dir", metavar="DIR", help="Certificates for TLS (v53 and later).")
@click.option("--memory-mode", type=click.Choice(["precopy", "postcopy"]), default="precopy", show_default=True)
@click.option("--source-log", metavar="FILE", help="The source's log file: its own figures are set beside ours.")
@click.option("--destination-log", metavar="FILE", help="The same of the destination.")
@click.option("--source-events", metavar="FILE", help="What the source's --event-monitor writes.")
@click.option("--destination-events", metavar="FILE", help="The same of the destination.")
@click.option("--timeout", type=DURATION, default="10m", show_default=True, help="Stop waiting after this.")
@two_hosts.elsewhere_options
@run.recording_options
@run.tier_option
@format_option("text", "json")
@color_option
@strict_option
def cloud_hypervisor(
    source: str,
    destination: str,
    url: str,
    local: bool,
    downtime_ms: int | None,
    timeout_s: int | None,
    connections: int | None,
    tls_dir: str | None,
    memory_mode: str,
    source_log: str | None,
    destination_log: str | None,
    source_events: str | None,
    destination_events: str | None,
    timeout: int,
    source_host: str | None,
    destination_host: str | None,
    remote_command: str | None,
    remote_tool: str,
    hint: Hint | None,
    output: str | None,
    force: bool,
    tier: str,
    form: str,
    color: str,
    strict: bool,
) -> None:
    """Migrate a Cloud Hypervisor VM through its HTTP API."""
    run.check_output(output, force)
    postcopy = memory_mode == "postcopy"
    options = ChOptions(
        local, downtime_ms, timeout_s, connections, tls_dir, postcopy,
        source_log, destination_log, source_events, destination_events,
    )  # fmt: skip
    way = two_hosts.way_of(source_host, destination_host, remote_command, remote_tool)
    if way is not None:
        if {"source": source_events, "destination": destination_events}[way[0]]:
            why = "events of a VMM elsewhere have no stamps on a clock that is known"
            raise UsageError(why, f"leave --{way[0]}-events out; --{way[0]}-log works there, too")

        def connect(near: str, far: str, remote: tuple[str, Elsewhere]) -> ChMigration:
            return ChMigration(near, far, url, options, remote)

        names = two_hosts.file_names(output, "migrate", force)
        sockets = {"source": source, "destination": destination}
        met = two_hosts.across(way, sockets, connect, timeout / 10**9, names, tier=tier, force=force)
        two_hosts.conclude(met, names, form, color, hint, strict=strict)
        return
    open_writer = functools.partial(run.open_recording, output, "migrate", force=force)
    with contextlib.closing(ChMigration(source, destination, url, options)) as migration:
        outcome, name = run.trace_migration(migration, timeout / 10**9, open_writer, tier=tier)
    run.conclude(outcome, run.show(name, form, color), strict)
