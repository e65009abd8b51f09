# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig demo`: two VMs with the tiny guest, one real migration, one breakdown."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable

import click

from ebpf_mig.commands import run as tracing
from ebpf_mig.commands import two_hosts as both
from ebpf_mig.commands.options import DURATION, RATE, SIZE, color_option, examples, format_option, strict_option
from ebpf_mig.errors import RecordingError, UsageError
from ebpf_mig.lab.netns import Link
from ebpf_mig.lab.scenario import Scenario
from ebpf_mig.linux.capabilities import require_tracing
from ebpf_mig.linux.process import python_environment
from ebpf_mig.recording.file import Recording
from ebpf_mig.tracing.recorder import Recorder
from ebpf_mig.vmm import adapter, adapters, with_lab
from ebpf_mig.vmm.base import Migration, Outcome

_WARM_UP_S = 0.3

_EXAMPLES = examples(
    "ebpf-mig demo",
    "ebpf-mig demo --vcpus 4 --memory 1GiB --working-set 64MiB --dirty-rate 20000",
    "ebpf-mig demo --transport unix --format json",
    *(line for one in adapters() for line in one.examples.get("demo", ())),
)
_TUNNELS = ", ".join(one.title for one in adapters() if one.tunnels)
_HANDS_OVER = ", ".join(one.title for one in adapters() if one.hands_over)


@click.command("demo", epilog=_EXAMPLES)
@click.option("--memory", type=SIZE, default="256MiB", show_default=True, help="Memory of the guest.")
@click.option("--working-set", type=SIZE, default="16MiB", show_default=True, help="Memory that each vCPU dirties.")
@click.option(
    "--dirty-rate",
    type=click.IntRange(0),
    default=10_000,
    show_default=True,
    help="Dirty rate in pages/s per vCPU; 0: unlimited.",
)
@click.option("--vcpus", type=click.IntRange(1, 26), default=1, show_default=True)
@click.option("--transport", type=click.Choice(["tcp", "unix"]), default="tcp", show_default=True)
@click.option("--multifd", type=click.IntRange(1, 255), help="Send memory over this many channels.")
@click.option("--downtime-limit", type=DURATION, help="The VMM's downtime limit, e.g. 300ms.  [default: the VMM's]")
@click.option(
    "--bandwidth", type=RATE, default="0", show_default=True, help="Bandwidth limit, e.g. 1Gbit; 0: unlimited."
)
@click.option("--postcopy", is_flag=True, help="Switch to postcopy after the second pass.")
@click.option("--dirty-ring", type=click.IntRange(1024, 65536), help="Log dirty pages in rings of this size.")
@click.option("--vmm", type=click.Choice(with_lab()), default=with_lab()[0], show_default=True)
@click.option("--local", is_flag=True, help=f"Hand the memory over instead of sending it ({_HANDS_OVER}).")
@click.option("--tunnelled", is_flag=True, help=f"Send through the VMs' managers ({_TUNNELS}).")
@click.option(
    "--two-hosts", is_flag=True, help="Put each VM in its own network, linked at --bandwidth; use two recorders."
)
@click.option("--vmm-binary", metavar="PATH", help="The VMM's program.  [default: from PATH]")
@click.option("--timeout", type=DURATION, default="60s", show_default=True, help="Cancel the migration after this.")
@tracing.recording_options
@tracing.tier_option
@format_option("text", "json")
@color_option
@strict_option
def command(
    memory: int,
    working_set: int,
    dirty_rate: int,
    vcpus: int,
    transport: str,
    multifd: int | None,
    downtime_limit: int | None,
    bandwidth: int,
    postcopy: bool,
    dirty_ring: int | None,
    vmm: str,
    local: bool,
    tunnelled: bool,
    two_hosts: bool,
    vmm_binary: str | None,
    timeout: int,
    output: str | None,
    force: bool,
    tier: str,
    form: str,
    color: str,
    strict: bool,
) -> None:
    """Migrate a demo VM and print where its downtime went.

    Starts two VMs on this host and migrates one to the other."""
    tracing.check_output(output, force)
    require_tracing()
    scenario = Scenario(
        memory, working_set, dirty_rate or None, vcpus, transport, multifd,
        None if downtime_limit is None else downtime_limit // 10**6, bandwidth, postcopy, dirty_ring,
        tunnelled=tunnelled,
    )  # fmt: skip
    if tunnelled and not adapter(vmm).tunnels:
        raise UsageError(f"{adapter(vmm).title} has no manager here to tunnel through", f"use it with {_TUNNELS}")
    if two_hosts:
        if local or transport != "tcp":
            raise UsageError("two hosts share only a network", "leave --local and --transport out")
        names = both.file_names(output, "demo", force)
        start = functools.partial(adapter(vmm).lab, binary=vmm_binary)
        outcome, halves = _two_hosts(scenario, start, timeout, tier)
        both.keep(halves, names, force)
        tracing.conclude(outcome, both.show(halves, names, form, color), strict)
        return
    open_writer = functools.partial(tracing.open_recording, output, "demo", force=force)
    with adapter(vmm).lab(scenario, vmm_binary, local=local) as (migration, notes):
        time.sleep(_WARM_UP_S)
        outcome, name = tracing.trace_migration(migration, timeout / 10**9, open_writer, notes, tier=tier)
    tracing.conclude(outcome, tracing.show(name, form, color), strict)


def _two_hosts(
    scenario: Scenario,
    start: Callable[..., contextlib.AbstractContextManager[tuple[Migration, list[str]]]],
    timeout: int,
    tier: str,
) -> tuple[Outcome, dict[str, Recording]]:
    """Runs each VM and its recorder in its own network namespace. Returns the outcome, and the recording of each
    side.
    """
    with contextlib.ExitStack() as stack:
        # The link limits the bandwidth and the VMM does not know the limit, as between real hosts.
        link = stack.enter_context(Link(scenario.bandwidth_bytes or 0))
        unlimited = dataclasses.replace(scenario, bandwidth_bytes=0)
        migration, _ = stack.enter_context(start(unlimited, link=link))
        targets = migration.targets()
        recorders: dict[str, Recorder] = {}
        for target in targets:
            command = [sys.executable, "-Pm", "ebpf_mig", "record", "--pid", str(target.pid), "--tier", tier]
            with link.inside(target.role):
                line = [*command, "--until-eof", "--output", "-"]
                recorder = Recorder(f"the {target.role}'s recorder", line, python_environment())
            recorders[target.role] = recorder
            stack.callback(recorder.close)
        migration.prepare()
        for recorder in recorders.values():
            recorder.armed()
        outcome = both.driven(migration, timeout / 10**9)
        found = {role: both.recording_of(recorder) for role, recorder in recorders.items()}
    halves = {role: both.with_marks(half, targets, outcome.marks) for role, half in found.items() if half is not None}
    if not halves:
        raise RecordingError("neither recorder made a recording")
    return outcome, halves
