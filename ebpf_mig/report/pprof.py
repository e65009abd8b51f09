# SPDX-License-Identifier: Apache-2.0
"""The stacks of the window as a pprof profile, for `go tool pprof` and whatever else reads it.

In: rows of `analysis.stacks`, the recording's header and the window. Out: a `perftools.profiles.Profile`, compressed by
gzip (github.com/google/pprof, proto/profile.proto; the numbers below are its fields'). Side, phase and thread are
labels: `go tool pprof -tagroot side,phase,thread` makes frames of them, `-tagfocus phase=quiesce` selects by them.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence

from ebpf_mig.analysis.stacks import Kind, Stack
from ebpf_mig.breakdown import Span
from ebpf_mig.recording.events import Header
from ebpf_mig.report.protobuf import chunk, number, packed, text

_SAMPLE_TYPE, _SAMPLE, _MAPPING, _LOCATION, _FUNCTION, _STRING, _TIME, _DURATION, _COMMENT, _DEFAULT = (
    1, 2, 3, 4, 5, 6, 9, 10, 13, 14,
)  # fmt: skip
VALUES = (("waits", "count"), ("off_cpu", "nanoseconds"), ("samples", "count"), ("cpu", "nanoseconds"))
"""The values of each sample, and their units."""
_COMMENTS = (
    "off_cpu: waits of 100 us and more in the window of the migration, cut to it; exact",
    "cpu: samples inside dirty-log calls that take long; estimated",
)


def render(stacks: Sequence[Stack], header: Header, window: Span | None) -> bytes:
    """The profile; the same input gives the same bytes. `window` is on the recording's clock."""
    return gzip.compress(b"".join(_Writer().fields(stacks, header, window)), mtime=0)


class _Writer:
    """Numbers strings and functions as they are first used."""

    def __init__(self) -> None:
        self._strings = {"": 0}
        self._functions: dict[str, int] = {}

    def fields(self, stacks: Sequence[Stack], header: Header, window: Span | None) -> Iterator[bytes]:
        """The profile's fields. Tables come last, since they grow as they are used."""
        for name, unit in VALUES:
            yield chunk(_SAMPLE_TYPE, number(1, self._string(name)) + number(2, self._string(unit)))
        for row in stacks:
            yield chunk(_SAMPLE, self._sample(row))
        # A mapping with names keeps readers from looking for a binary.
        yield chunk(_MAPPING, number(1, 1) + number(5, self._string("[kernel.kallsyms]")) + number(7, 1))
        for name, at in self._functions.items():
            yield chunk(_LOCATION, number(1, at) + number(2, 1) + chunk(4, number(1, at)))
            yield chunk(_FUNCTION, number(1, at) + number(2, self._string(name)) + number(3, self._string(name)))
        if window is not None and header.clock is not None:
            yield number(_TIME, header.clock.realtime_ns + window[0] - header.clock.monotonic_ns)
        if window is not None:
            yield number(_DURATION, window[1] - window[0])
        yield packed(_COMMENT, map(self._string, _COMMENTS))
        yield number(_DEFAULT, self._string("off_cpu"))
        for known in self._strings:
            yield text(_STRING, known)

    def _sample(self, row: Stack) -> bytes:
        asleep = row.kind == Kind.OFF_CPU
        values = (row.count, row.duration_ns, 0, 0) if asleep else (0, 0, row.count, row.duration_ns)
        functions = [self._functions.setdefault(name, len(self._functions) + 1) for name in row.frames]
        labels = (("side", row.side), ("phase", row.phase), ("thread", row.thread))
        about = b"".join(chunk(3, number(1, self._string(key)) + number(2, self._string(name))) for key, name in labels)
        return packed(1, functions) + packed(2, values) + about

    def _string(self, name: str) -> int:
        return self._strings.setdefault(name, len(self._strings))
