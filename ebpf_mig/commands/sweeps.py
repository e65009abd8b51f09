# SPDX-License-Identifier: Apache-2.0
"""`bench --sweep OPTION=VALUE,...`: the steps of a sweep.

In: the text, and the command whose option it names. Out: the values as the option reads them, and the slope's unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import click

from ebpf_mig.errors import UsageError
from ebpf_mig.report.compare_rows import Axis

_UNITS: dict[str, tuple[int, str]] = {
    "memory": (1 << 30, "GiB"),
    "working-set": (1 << 20, "MiB"),
    "dirty-rate": (1000, "1000 pages/s"),
    "vcpus": (1, "vCPU"),
    "multifd": (1, "channel"),
    "downtime-limit": (10**6, "ms"),
    "bandwidth": (125 * 10**6, "Gbit/s"),
    "dirty-ring": (1024, "1024 entries"),
}
"""What options of numbers are counted in."""
_UNLIMITED = ("dirty-rate", "bandwidth")
"""Options of which 0 means unlimited."""
_OTHERS = ("transport", "vmm", "vmm-binary")


@dataclass(frozen=True)
class Step:
    """One value of the option."""

    text: str
    change: dict[str, Any] = field(default_factory=dict)
    """The option's parameter and its value."""
    number: float | None = None
    """The value in units of the axis; None if it is no number."""


@dataclass(frozen=True)
class Sweep:
    """An option and its values."""

    axis: Axis
    steps: list[Step]


NONE = Step("")
"""The only step without a sweep."""


def parse(text: str, context: click.Context) -> Sweep:
    """`memory=1GiB,4GiB` with the types of the command's options. UsageError if it cannot be read."""
    name, equals, values = text.partition("=")
    name = name.removeprefix("--")
    known = (*_UNITS, *_OTHERS)
    if not equals or name not in known:
        raise UsageError(f"cannot read the sweep {text!r}", f"write OPTION=VALUE,VALUE with one of {', '.join(known)}")
    texts = [value.strip() for value in values.split(",")]
    if len(set(texts)) != len(texts) or len(texts) < 2:
        raise UsageError("a sweep has two or more different values", "write it like memory=1GiB,4GiB,16GiB")
    option = next(p for p in context.command.params if p.name == name.replace("-", "_"))
    per, unit = _UNITS.get(name, (1, name))
    return Sweep(Axis(name, unit), [_step(value, option, per, context) for value in texts])


def _step(text: str, option: click.Parameter, per: int, context: click.Context) -> Step:
    value = option.type.convert(text, option, context)
    name = (option.name or "").replace("_", "-")
    number = value / per if isinstance(value, int) and not (name in _UNLIMITED and value == 0) else None
    return Step(text, {option.name or "": value}, number)
