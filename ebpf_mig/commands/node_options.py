# SPDX-License-Identifier: Apache-2.0
"""The options of `watch` and `exporter`, which run the same engine: which VMs, and what is kept of them.

In: a command. Out: the command with these options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ebpf_mig.commands.options import SIZE
from ebpf_mig.exporter.store import DIRECTORY

_OPTIONS = (
    click.option("--vm", "only", default="*", metavar="GLOB", help="Watch only VMs whose name matches."),
    click.option("--state-directory", default=DIRECTORY, show_default=True, help="Directory of the recordings."),
    click.option(
        "--keep", type=click.IntRange(1), default=100, show_default=True, help="Largest number of recordings to keep."
    ),
    click.option(
        "--keep-size", type=SIZE, default="1GiB", show_default=True, help="Largest size of all recordings together."
    ),
)


def node_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--vm`, `--state-directory`, `--keep` and `--keep-size`, in this order."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
