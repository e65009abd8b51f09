# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig watch`: prints one line for each migration on this node when it ends, no matter who started it."""

from __future__ import annotations

import sys
import time

import click
import msgspec

from ebpf_mig.breakdown import Mode
from ebpf_mig.commands.node_options import node_options
from ebpf_mig.commands.options import encoded, examples, format_option, say
from ebpf_mig.exporter.messages import Answer
from ebpf_mig.exporter.node import NodeWatch
from ebpf_mig.exporter.observation import Observation
from ebpf_mig.exporter.store import Store
from ebpf_mig.linux.capabilities import require_tracing
from ebpf_mig.text import printable
from ebpf_mig.tracing.session import held_signals

_EXAMPLES = examples("ebpf-mig watch", "ebpf-mig watch --format json --count 1 | jq .blackout_ns")


@click.command("watch", epilog=_EXAMPLES)
@format_option("text", "json")
@click.option("--count", type=click.IntRange(1), help="End after this many migrations.  [default: Ctrl-C]")
@node_options
def command(form: str, count: int | None, only: str, state_directory: str, keep: int, keep_size: int) -> None:
    """Print the blackout of each migration on this node when it ends.

    Expensive probes are armed only while a VM shows signs of a migration.
    """
    require_tracing()
    store = Store(state_directory, keep, keep_size)
    seen, gone = 0, False

    def show(answer: Answer) -> None:
        nonlocal seen, gone
        if gone or (count is not None and seen >= count):
            return  # migrations still traced at the end are recorded but not printed
        observation = answer.observation
        assert observation is not None  # noqa: S101 - only an error has none
        seen += 1
        text = msgspec.json.encode(observation) if form == "json" else encoded(line(observation))
        try:
            sys.stdout.buffer.write(text + b"\n")
            sys.stdout.flush()
        except OSError:
            gone = True  # the reader is gone

    with NodeWatch(store, show, only) as node, held_signals() as deliver:
        say(f"watching this node; recordings go to {printable(state_directory)}; Ctrl-C stops it")

        def over() -> bool:
            deliver()
            return gone or (count is not None and seen >= count)

        node.run(over)


_KINDS: dict[str, str] = {Mode.CPR: " live update", Mode.SNAPSHOT: " snapshot", Mode.RESTORE: " restore"}


def line(o: Observation) -> str:
    """One migration on one line; times in ms."""
    blackout = "not known" if o.blackout_ns is None else f"{o.blackout_ns / 1e6:.3f} ms"
    final = sum(o.fetch.get("blackout", {}).values())
    figures = f"blackout {blackout}" + (f", final fetch {final / 1e6:.3f} ms" if "blackout" in o.fetch else "")
    why = f", {printable(o.diagnosis)}" if o.diagnosis else ""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(o.at))
    what = f"{printable(o.vm, 64) or '-'} {o.vmm} {o.role}{_KINDS.get(o.mode, '')}"
    return f"{moment} {what} {o.result}: {figures}{why}, {o.verdict}, {o.recording or '-'}"
