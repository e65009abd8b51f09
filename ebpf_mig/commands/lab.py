# SPDX-License-Identifier: Apache-2.0
"""Shared by `demo` and `bench`: the options of a lab migration, and running one.

In: values of the options. Out: a `Scenario`; the outcome of a migration and its recording.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import click

from ebpf_mig.commands import run as tracing
from ebpf_mig.commands import two_hosts as both
from ebpf_mig.commands.options import DURATION, RATE, SIZE, Decorator
from ebpf_mig.errors import RecordingError, UsageError
from ebpf_mig.lab.netns import Link
from ebpf_mig.lab.scenario import Scenario
from ebpf_mig.linux.process import python_environment
from ebpf_mig.recording.file import Recording
from ebpf_mig.tracing.recorder import Recorder
from ebpf_mig.vmm import adapter, adapters, with_lab
from ebpf_mig.vmm.base import Migration, Outcome

WARM_UP_S = 0.3
_TUNNELS = ", ".join(one.title for one in adapters() if one.tunnels)
_HANDS_OVER = ", ".join(one.title for one in adapters() if one.hands_over)
_FIELDS = {
    "memory": "memory_bytes",
    "working_set": "working_set_bytes",
    "dirty_rate": "pages_per_s",
    "vcpus": "vcpus",
    "transport": "transport",
    "multifd": "multifd_channels",
    "downtime_limit": "downtime_ms",
    "bandwidth": "bandwidth_bytes",
    "postcopy": "postcopy",
    "dirty_ring": "dirty_ring",
    "tunnelled": "tunnelled",
}
"""The options that change a scenario, and its fields."""

Lab = Mapping[str, Any]
"""Values of the options of `lab_options` by name."""


def lab_options(*, of_scenario: bool) -> Decorator:
    """The options of a lab migration. `of_scenario`: their defaults are those of a named scenario."""

    def default(value: object) -> dict[str, Any]:
        return {} if of_scenario else {"default": value, "show_default": True}

    rate = click.IntRange(0)
    options = (
        click.option("--memory", type=SIZE, help="Memory of the guest.", **default("256MiB")),
        click.option("--working-set", type=SIZE, help="Memory that each vCPU dirties.", **default("16MiB")),
        click.option(
            "--dirty-rate", type=rate, help="Dirty rate in pages/s per vCPU; 0: unlimited.", **default(10_000)
        ),
        click.option("--vcpus", type=click.IntRange(1, 26), help="Number of vCPUs.", **default(1)),
        click.option("--transport", type=click.Choice(["tcp", "unix"]), help="What carries it.", **default("tcp")),
        click.option("--multifd", type=click.IntRange(1, 255), help="Send memory over this many channels."),
        click.option(
            "--downtime-limit", type=DURATION, help="The VMM's downtime limit, e.g. 300ms.  [default: the VMM's]"
        ),
        click.option("--bandwidth", type=RATE, help="Bandwidth limit, e.g. 1Gbit; 0: unlimited.", **default("0")),
        click.option("--postcopy", is_flag=True, help="Switch to postcopy after the second pass."),
        click.option("--dirty-ring", type=click.IntRange(1024, 65536), help="Log dirty pages in rings of this size."),
        click.option("--vmm", type=click.Choice(with_lab()), default=with_lab()[0], show_default=True),
        click.option("--local", is_flag=True, help=f"Hand the memory over instead of sending it ({_HANDS_OVER})."),
        click.option("--tunnelled", is_flag=True, help=f"Send through the VMs' managers ({_TUNNELS})."),
        click.option(
            "--two-hosts", is_flag=True, help="Put each VM in its own network, linked at --bandwidth; two recorders."
        ),
        tracing.user_stacks_option,
        click.option("--vmm-binary", metavar="PATH", help="The VMM's program.  [default: from PATH]"),
        click.option(
            "--timeout", type=DURATION, default="60s", show_default=True, help="Cancel the migration after this."
        ),
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def given(lab: Lab) -> list[str]:
    """The options that change a scenario or how it runs, as far as they were given."""
    names = (*_FIELDS, "local", "two_hosts", "user_stacks")
    return [f"--{name.replace('_', '-')}" for name in names if _is_given(lab[name])]


def _is_given(value: object) -> bool:
    return value is not None and value is not False  # 0 is a value


def scenario_of(lab: Lab, base: Scenario) -> Scenario:
    """`base` with the options that were given. UsageError if they do not fit together."""
    changes = {field: lab[name] for name, field in _FIELDS.items() if _is_given(lab[name])}
    if "downtime_ms" in changes:
        changes["downtime_ms"] //= 10**6
    if changes.get("pages_per_s") == 0:
        changes["pages_per_s"] = None
    scenario = dataclasses.replace(base, **changes)
    vmm = adapter(lab["vmm"])
    if scenario.tunnelled and not vmm.tunnels:
        raise UsageError(f"{vmm.title} has no manager here to tunnel through", f"use it with {_TUNNELS}")
    if lab["two_hosts"] and (lab["local"] or scenario.transport != "tcp"):
        raise UsageError("two hosts share only a network", "leave --local and --transport out")
    return scenario


def on_one_host(scenario: Scenario, lab: Lab, open_writer: Callable[..., Any], tier: str) -> tuple[Outcome, str]:
    """Migrates between two new VMs. Returns the outcome and the recording's name."""
    with adapter(lab["vmm"]).lab(scenario, lab["vmm_binary"], local=lab["local"]) as (migration, notes):
        time.sleep(WARM_UP_S)
        return tracing.trace_migration(
            migration, lab["timeout"] / 10**9, open_writer, notes, tier=tier, user_stacks=lab["user_stacks"]
        )


def on_two_hosts(scenario: Scenario, lab: Lab, tier: str) -> tuple[Outcome, dict[str, Recording]]:
    """Runs each VM and its recorder in its own network namespace. Returns the outcome, and the recording of each
    side.
    """
    start: Callable[..., contextlib.AbstractContextManager[tuple[Migration, list[str]]]]
    start = functools.partial(adapter(lab["vmm"]).lab, binary=lab["vmm_binary"])
    with contextlib.ExitStack() as stack:
        # The link limits the bandwidth and the VMM does not know the limit, as between real hosts.
        link = stack.enter_context(Link(scenario.bandwidth_bytes or 0))
        unlimited = dataclasses.replace(scenario, bandwidth_bytes=0)
        migration, _ = stack.enter_context(start(unlimited, link=link))
        targets = migration.targets()
        recorders: dict[str, Recorder] = {}
        for target in targets:
            command = [sys.executable, "-Pm", "ebpf_mig", "record", "--pid", str(target.pid), "--tier", tier]
            command += ["--user-stacks"] if lab["user_stacks"] else []
            with link.inside(target.role):
                line = [*command, "--until-eof", "--output", "-"]
                recorder = Recorder(f"the {target.role}'s recorder", line, python_environment())
            recorders[target.role] = recorder
            stack.callback(recorder.close)
        migration.prepare()
        for recorder in recorders.values():
            recorder.armed()
        outcome = both.driven(migration, lab["timeout"] / 10**9)
        found = {role: both.recording_of(recorder) for role, recorder in recorders.items()}
    halves = {role: both.with_marks(half, targets, outcome.marks) for role, half in found.items() if half is not None}
    if not halves:
        raise RecordingError("neither recorder made a recording")
    return outcome, halves
