# SPDX-License-Identifier: Apache-2.0
"""Times, sizes and rates as people write them on a command line, as click parameter types.

`DURATION` gives ns ("300ms", "5s"), `SIZE` bytes ("64MiB", "4G"), `BANDWIDTH` bytes/s ("1Gbit", "100MiB", "unlimited").
"""

from __future__ import annotations

import re

import click

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z/]*)")
_TIME = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "": 10**9, "m": 60 * 10**9, "min": 60 * 10**9}
_BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_LIMIT = 1 << 62


def _scaled(text: str, units: dict[str, int]) -> int | None:
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match.group(2).lower() not in units:
        return None
    value = round(float(match.group(1)) * units[match.group(2).lower()])
    return value if value < _LIMIT else None


_SIZE = {f"{prefix}{suffix}": factor for prefix, factor in _BINARY.items() for suffix in ("", "b", "ib")}
_BITS = {f"{prefix}{suffix}": factor for prefix, factor in _DECIMAL.items() for suffix in ("bit", "bit/s", "bps")}
_BYTES = {f"{unit}/s": factor for unit, factor in _SIZE.items()} | _SIZE


class _Unit(click.ParamType):
    """A number with a unit; `examples` goes into the error."""

    def __init__(self, name: str, units: dict[str, int], examples: str) -> None:
        self.name = name
        self._units = units
        self._examples = examples

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = self._parse(str(value))
        if found is None:
            self.fail(f"{value!r} is no {self.name}; write for example {self._examples}", param, ctx)
        return found

    def _parse(self, text: str) -> int | None:
        return _scaled(text, self._units)


class _Bandwidth(_Unit):
    def _parse(self, text: str) -> int | None:
        if text.strip().lower() == "unlimited":
            return 0
        bits = _scaled(text, _BITS)
        return bits // 8 if bits is not None else _scaled(text, self._units)


DURATION = _Unit("duration", _TIME, "300ms, 5s or 2min")
SIZE = _Unit("size", _SIZE, "64MiB or 4G")
BANDWIDTH = _Bandwidth("bandwidth", _BYTES, "1Gbit, 100MiB/s or unlimited")
