# SPDX-License-Identifier: Apache-2.0
"""A recording without the names in it, so that it can be shown to others.

In: a recording. Out: the same with hosts, addresses, thread names and free text replaced, the same name by the same
stand-in, so that nothing is lost that a reader needs. Figures, pids and kernel functions stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from ebpf_mig.recording import events as ev
from ebpf_mig.recording.file import Recording
from ebpf_mig.recording.kinds import KINDS, meanings
from ebpf_mig.recording.meaning import Meaning

_VCPU_NAME = "CPU"
_ACCEPTED_DETAILS = frozenset({"completed", "active", "setup", "device", "failed", "cancelled", "postcopy-active"})


class Names:
    """Stand-ins, numbered in the order in which names turn up."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], str] = {}

    def of(self, kind: str, name: str) -> str:
        """`name`'s stand-in; the empty name stays empty."""
        if not name:
            return ""
        count = 1 + sum(known == kind for known, _ in self._known)
        return self._known.setdefault((kind, name), f"{kind}-{count}")


def redacted(recording: Recording, names: Names | None = None) -> Recording:
    """The recording without names of hosts, VMs, threads, files, and without addresses.

    Recordings that are to stay comparable share their `names`.
    """
    names = names or Names()
    header = _struct(recording.header, names)
    if recording.header.notes:
        header = msgspec.structs.replace(header, notes=["notes were redacted"])
    events = [_event(event, names) for event in recording.events]
    return msgspec.structs.replace(recording, header=header, events=events)


def _event(event: ev.AnyEvent, names: Names) -> ev.AnyEvent:
    if isinstance(event, ev.Thread) and event.vcpu >= 0:
        return msgspec.structs.replace(event, name=f"{_VCPU_NAME} {event.vcpu}")
    return _struct(event, names) if type(event) in _WITH_NAMES else event


_Struct = TypeVar("_Struct", bound=msgspec.Struct)


def _struct(struct: _Struct, names: Names) -> _Struct:
    """The same with stand-ins for its names, and for those of the structs in it."""
    changed: dict[str, Any] = {}
    known = _meanings(type(struct))
    for field in struct.__struct_fields__:
        value = getattr(struct, field)
        if isinstance(value, msgspec.Struct):
            changed[field] = _struct(value, names)
        elif isinstance(value, list):
            changed[field] = [_struct(v, names) if isinstance(v, msgspec.Struct) else v for v in value]
        elif isinstance(value, str) and field in known:
            changed[field] = _STAND_IN[known[field]](value, names)
    return msgspec.structs.replace(struct, **changed)


def _address(text: str, names: Names) -> str:
    """The port stays: it tells connections apart and names nobody."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal():
        return names.of("address", text)
    return f"{names.of('address', host)}:{port}"


def _text(text: str, names: Names) -> str:
    return text if text in _ACCEPTED_DETAILS else names.of("detail", text)


_STAND_IN: dict[Meaning, Callable[[str, Names], str]] = {
    Meaning.ADDRESS: _address,
    Meaning.HOST: lambda text, names: names.of("host", text),
    Meaning.MACHINE_ID: lambda _text, _names: "",
    Meaning.PROCESS: lambda text, names: names.of("process", text),
    Meaning.THREAD: lambda text, names: names.of("thread", text),
    Meaning.TEXT: _text,
    Meaning.WORD: lambda text, _names: text,
}
_meanings = functools.cache(meanings)
_WITH_NAMES = frozenset(
    kind.event for kind in KINDS if not set(kind.meanings.values()) <= {Meaning.INSTANT, Meaning.WORD}
)
