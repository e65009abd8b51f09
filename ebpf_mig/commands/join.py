# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig join`: joins the recordings of a migration's two hosts into one breakdown, with the bound of their
clocks.
"""

from __future__ import annotations

import re
from typing import Any

import click

from ebpf_mig.commands.formats import FORMATS
from ebpf_mig.commands.options import (
    DURATION,
    ParamType,
    color_option,
    examples,
    format_option,
    output_option,
    strict_option,
    write_result,
)
from ebpf_mig.commands.report import require_complete, warn
from ebpf_mig.errors import UsageError
from ebpf_mig.joining.merge import Hint

_EXAMPLES = examples(
    "ebpf-mig join source.rec destination.rec",
    "ebpf-mig join a.rec b.rec --recording both.rec --format html -o both.html",
    "ebpf-mig join a.rec b.rec --clock-offset 0+-20us",
)


class Offset(ParamType[Hint]):
    """`OFFSET[+-DOUBT]`. Both are durations."""

    name = "offset"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Hint:
        """The offset and its doubt in ns."""
        if isinstance(value, Hint):
            return value
        match = re.fullmatch(r"([+-]?)([^+±-]+?)(?:(?:\+-|±)(.+))?", str(value).strip())
        if match is None:
            self.fail("write it like -1.2ms+-20us: OFFSET+-DOUBT", param, ctx)
        ahead = DURATION.convert(match[2], param, ctx)
        doubt = DURATION.convert(match[3], param, ctx) if match[3] else 0
        return Hint(-ahead if match[1] == "-" else ahead, doubt)


clock_offset_option = click.option(
    "--clock-offset",
    "hint",
    type=Offset(),
    metavar="OFFSET[+-DOUBT]",
    help="How far the destination's wall clock is ahead of the source's, by PTP or chrony, e.g. 0+-20us. Refused if "
    "the recordings contradict it.",
)


@click.command("join", epilog=_EXAMPLES)
@click.argument("first", type=click.Path(dir_okay=False))
@click.argument("second", type=click.Path(dir_okay=False))
@clock_offset_option
@click.option(
    "--pid", type=int, help="Pid of the source or the destination, if both recordings hold several migrations."
)
@click.option("--recording", metavar="FILE", help="Also write the joined recording, for `report`, `export`, `diff`.")
@format_option(*FORMATS)
@output_option()
@color_option
@strict_option
def command(
    *,
    first: str,
    second: str,
    hint: Hint | None,
    pid: int | None,
    recording: str | None,
    form: str,
    output: str,
    force: bool,
    color: str,
    strict: bool,
) -> None:
    """Show the blackout's phases from the recordings of both hosts.

    FIRST and SECOND are recordings of `record`, one from each host of a migration, in any order.
    """
    from ebpf_mig.collector import analyse
    from ebpf_mig.joining.merge import joined
    from ebpf_mig.recording.coalesce import read_coalesced
    from ebpf_mig.recording.file import RecordingWriter
    from ebpf_mig.text import printable

    if recording is not None and recording == output:
        raise UsageError("the report and the joined recording cannot be one file", "give them two names")
    names = printable(first), printable(second)
    both = [read_coalesced(file, with_axis=form in ("html", "perfetto"), share=2) for file in (first, second)]
    for name, one in zip(names, both, strict=True):
        warn(name, one)
    whole = joined(both[0], both[1], names, hint, pid)
    del both
    if recording is not None:
        with RecordingWriter(recording, whole.header, force) as writer:
            writer.write_many(whole.events)
    analysis = analyse(whole)
    write_result(FORMATS[form](analysis, output, color), output, force=force)
    require_complete(analysis.breakdown, strict)
