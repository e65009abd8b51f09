# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig exporter`: watches this node and serves its migrations' figures to Prometheus."""

from __future__ import annotations

import json
import logging
import signal
import socket
from pathlib import Path
from typing import Any

import click

from ebpf_mig.commands.node_options import node_options
from ebpf_mig.commands.options import ParamType, examples, say
from ebpf_mig.commands.settings import add_variables, config_file_option, refuse_unknown_variables
from ebpf_mig.errors import UsageError
from ebpf_mig.exporter.log_lines import FORMATS
from ebpf_mig.exporter.observation import vmms
from ebpf_mig.exporter.spawn import become
from ebpf_mig.exporter.store import Store
from ebpf_mig.exporter.supervisor import SIGNALS, Plan
from ebpf_mig.linux import capabilities
from ebpf_mig.text import printable

PORT = 9974
VARIABLES = "EBPF_MIG_EXPORTER_"
"""Options can also be set by environment variables of this prefix. The option has priority."""


class _Address(ParamType[str]):
    """HOST:PORT. `:PORT` is every address, `[::1]:PORT` is IPv6."""

    name = "HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """`value` as it is; fails without a port."""
        port = str(value).rpartition(":")[2] if ":" in str(value) else ""
        if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= 65535):
            self.fail(f"{printable(str(value))!r} is not HOST:PORT; e.g. 127.0.0.1:{PORT}", param, ctx)
        return str(value)


_EXAMPLES = examples(
    "ebpf-mig exporter",
    "ebpf-mig exporter --web.listen-address :9974 --web.config.file web.yml",
    "ebpf-mig exporter --config.file exporter.toml --check-config",
)


@click.command("exporter", epilog=_EXAMPLES)
@config_file_option("check-config")
@click.option(
    "--web.listen-address",
    "address",
    type=_Address(),
    default=f"127.0.0.1:{PORT}",
    show_default=True,
    help="Where to listen.",
)
@click.option("--web.config.file", "web_config", type=click.Path(), help="TLS and users, in exporter-toolkit's format.")
@node_options
@click.option(
    "--vm-label",
    type=click.Choice(["name", "hash", "none"]),
    default="name",
    show_default=True,
    help="How to label VMs in metrics.",
)
@click.option("--otlp-endpoint", "otlp", default="", metavar="URL", help="Send each migration as OpenTelemetry spans.")
@click.option(
    "--log-format",
    type=click.Choice(FORMATS),
    default=FORMATS[0],
    show_default=True,
    help="Format of the line on stderr for each migration.",
)
@click.option("--own-cost", is_flag=True, help="Measure the run time of our BPF programs; keeps CAP_SYS_ADMIN.")
@click.option("--check-config", is_flag=True, help="Only check the options, the variables and the files, then end.")
def command(
    address: str,
    web_config: str | None,
    only: str,
    state_directory: str,
    keep: int,
    keep_size: int,
    vm_label: str,
    otlp: str,
    log_format: str,
    own_cost: bool,
    check_config: bool,
) -> None:
    """Serve the downtime of each migration on this node to Prometheus."""
    refuse_unknown_variables(command, VARIABLES)
    if check_config:
        if web_config:
            from ebpf_mig.exporter import webconfig

            webconfig.load(web_config)
        say("the configuration is right")
        return
    capabilities.require_tracing()
    with _listen(address) as listener:
        Store(state_directory, keep, keep_size)  # it exists and is ours
        plan = Plan(
            only=only,
            state_directory=str(Path(state_directory).absolute()),
            keep=keep,
            keep_bytes=keep_size,
            own_cost=own_cost,
            listener=listener.fileno(),
            vm_label=vm_label,
            vmms=vmms(),
            web_config=str(Path(web_config).absolute()) if web_config else "",
            otlp=otlp,
            log_format=log_format,
            log_level=logging.getLogger("ebpf_mig").getEffectiveLevel(),
        )
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        become("ebpf_mig.exporter.supervisor", json.dumps(plan._asdict()), fds=[listener.fileno()])


add_variables(command, VARIABLES, "check-config")


def _listen(address: str) -> socket.socket:
    """A listening socket on HOST:PORT."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in host or not host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family, backlog=128, dualstack_ipv6=not host)
    except OSError as error:
        raise UsageError(f"cannot listen on {printable(address)}: {error.strerror or error}") from error
