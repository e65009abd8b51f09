# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig demo`: two VMs with the tiny guest, one real migration, one breakdown."""

from __future__ import annotations

import functools
from typing import Any

import click

from ebpf_mig.commands import lab as labs
from ebpf_mig.commands import run as tracing
from ebpf_mig.commands import two_hosts as both
from ebpf_mig.commands.options import color_option, examples, format_option, strict_option
from ebpf_mig.lab.scenario import Scenario
from ebpf_mig.linux.capabilities import require_tracing
from ebpf_mig.vmm import adapters

_EXAMPLES = examples(
    "ebpf-mig demo",
    "ebpf-mig demo --vcpus 4 --memory 1GiB --working-set 64MiB --dirty-rate 20000",
    "ebpf-mig demo --transport unix --format json",
    *(line for one in adapters() for line in one.examples.get("demo", ())),
)


@click.command("demo", epilog=_EXAMPLES)
@labs.lab_options(of_scenario=False)
@tracing.recording_options
@tracing.tier_option
@format_option("text", "json")
@color_option
@strict_option
def command(
    output: str | None,
    force: bool,
    tier: str,
    form: str,
    color: str,
    strict: bool,
    **lab: Any,
) -> None:
    """Migrate a demo VM and print where its downtime went.

    Starts two VMs on this host and migrates one to the other."""
    tracing.check_output(output, force)
    require_tracing()
    scenario = labs.scenario_of(lab, Scenario())
    if lab["two_hosts"]:
        names = both.file_names(output, "demo", force)
        outcome, halves = labs.on_two_hosts(scenario, lab, tier)
        both.keep(halves, names, force)
        tracing.conclude(outcome, both.show(halves, names, form, color), strict)
        return
    open_writer = functools.partial(tracing.open_recording, output, "demo", force=force)
    outcome, name = labs.on_one_host(scenario, lab, open_writer, tier)
    tracing.conclude(outcome, tracing.show(name, form, color), strict)
