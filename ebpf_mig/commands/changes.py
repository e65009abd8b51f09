# SPDX-License-Identifier: Apache-2.0
"""The changes that `--what-if` can predict, as a user writes them.

In: `NAME=VALUE` items. Out: a `Hypothesis`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from ebpf_mig.analysis.whatif import Hypothesis
from ebpf_mig.commands.options import RATE
from ebpf_mig.errors import UsageError

_PLAIN_CHANGES = ("nodelay", "untraced")
"""Conditions without a value."""


def parse_changes(texts: Sequence[str]) -> Hypothesis:
    """Parses `NAME=VALUE` items; UsageError if one cannot be read or is given twice."""
    from ebpf_mig.analysis.diagnosis.rules import PREDICTABLE

    values: dict[str, tuple[str, str]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        known_names = {"bandwidth", "fetch", "rearm", *_PLAIN_CHANGES, *PREDICTABLE}
        if name not in known_names or (name in _PLAIN_CHANGES) == bool(equals):
            known = f"bandwidth=25Gbit, {', '.join(_PLAIN_CHANGES)}, or =0 behind one of fetch, rearm, "
            known += ", ".join(PREDICTABLE)
            raise UsageError(f"cannot read the change {text!r}", f"write {known}")
        if name in values:
            raise UsageError(f"{name} is given twice")
        values[name] = (value, text)
    bandwidth = RATE.convert(values["bandwidth"][0], None, None) if "bandwidth" in values else None
    if bandwidth == 0:
        raise UsageError("the bandwidth cannot be 0", "write it like bandwidth=25Gbit")
    fetch, rearm = (_share(*values[name]) if name in values else None for name in ("fetch", "rearm"))
    causes = tuple((name, _share(*values[name])) for name in values if name in PREDICTABLE)
    return Hypothesis(
        bandwidth,
        fetch,
        rearm,
        "nodelay" in values,
        "untraced" in values,
        causes,
        tuple((name, text) for name, (_, text) in values.items()),
    )


def _share(value: str, text: str) -> Fraction:
    """`0`, or the remaining share in per cent."""
    match = re.fullmatch(r"0|([0-9]{1,5}(?:\.[0-9]{1,6})?)%", value, re.ASCII)
    if match is None:
        raise UsageError(
            f"cannot read the change {text!r}", f"write {text.partition('=')[0]}=0, or =50% for half of it"
        )
    return Fraction(match[1] or 0) / 100
