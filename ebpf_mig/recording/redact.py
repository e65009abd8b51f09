# SPDX-License-Identifier: Apache-2.0
"""Removes the names from a recording, so that it can be shared.

In: a recording. Out: the same recording with hosts, addresses, thread names and free text replaced. Equal names get
equal stand-ins, so the relations stay visible. Figures, pids and the words in `words.py` stay. The field determines the
kind of a text: see `meaning.py`.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from ebpf_mig.recording import events as ev
from ebpf_mig.recording.file import Recording
from ebpf_mig.recording.kinds import KINDS, meanings
from ebpf_mig.recording.meaning import Meaning
from ebpf_mig.recording.words import safe

_VCPU_NAME = "CPU"
_ACCEPTED_DETAILS = frozenset({"completed", "active", "setup", "device", "failed", "cancelled", "postcopy-active"})
_NUMBERS = re.compile(r"\d{1,4}(?:\.\d{1,4}){0,3}", re.ASCII)
_PORT = re.compile(r"\d{1,5}", re.ASCII)
_PROBES = frozenset(kind.record.name for kind in KINDS if kind.record)


class Names:
    """Stand-ins for names, numbered in order of appearance."""

    def __init__(self, words: frozenset[str] = frozenset()) -> None:
        """`words`: additional words that identify nobody, besides those of `words.py`."""
        self.words = words
        self._known: dict[tuple[str, str], str] = {}
        self._counts: Counter[str] = Counter()
        self.stacks: dict[tuple[str, ...], tuple[str, ...]] = {}
        """Redacted stack by original stack: a recording has few different ones."""

    def of(self, kind: str, name: str) -> str:
        """The stand-in for `name`; the empty name stays empty."""
        if not name:
            return ""
        known = self._known.get((kind, name))
        if known is None:
            self._counts[kind] += 1
            known = self._known[kind, name] = f"{kind}-{self._counts[kind]}"
        return known


def redacted(recording: Recording, names: Names | None = None) -> Recording:
    """The recording without addresses and without names of hosts, VMs, threads and files.

    Pass the same `names` for recordings that must remain comparable.
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
    """The same struct with stand-ins for its names, including nested structs."""
    changed: dict[str, Any] = {}
    known = _meanings(type(struct))
    for field in struct.__struct_fields__:
        value = getattr(struct, field)
        if isinstance(value, msgspec.Struct):
            changed[field] = _struct(value, names)
        elif isinstance(value, list) and value and isinstance(value[0], msgspec.Struct):
            changed[field] = [_struct(item, names) for item in value]
        elif field in known:
            changed[field] = _value(known[field], value, names)
    return msgspec.structs.replace(struct, **changed)


def _value(meanings_: tuple[Meaning, ...], value: Any, names: Names) -> Any:
    """Redacts a text, or the texts of a list or a dictionary; numbers stay."""
    stand_in = _STAND_IN.get(meanings_[0])
    if stand_in is None:
        return value
    if isinstance(value, str):
        return stand_in(value, names)
    if isinstance(value, tuple):
        clean = names.stacks.get(value)
        if clean is None:
            clean = names.stacks[value] = tuple(stand_in(text, names) for text in value)
        return clean
    if isinstance(value, list):
        return [stand_in(text, names) for text in value]
    of_value = _STAND_IN.get(meanings_[-1], stand_in)
    return {
        stand_in(key, names): of_value(item, names) if isinstance(item, str) else item for key, item in value.items()
    }


def _address(text: str, names: Names) -> str:
    """The port stays: it distinguishes connections and identifies nobody."""
    host, colon, port = text.rpartition(":")
    if not colon or not _PORT.fullmatch(port):
        return names.of("address", text)
    return f"{names.of('address', host)}:{port}"


def _text(text: str, names: Names) -> str:
    return text if text in _ACCEPTED_DETAILS else names.of("detail", text)


def _known_word(meaning: Meaning, called: str) -> Callable[[str, Names], str]:
    def stand_in(text: str, names: Names) -> str:
        return text if safe(meaning, text, _PROBES, names.words) else names.of(called, text)

    return stand_in


def _version(text: str, names: Names) -> str:
    """The version numbers stay, even if the builder of the kernel added a name."""
    if safe(Meaning.VERSION, text, _PROBES, names.words):
        return text
    numbers = _NUMBERS.match(text)
    return f"{numbers[0]}-custom" if numbers else names.of("version", text)


def _tier(text: str, names: Names) -> str:
    """`absent` stays, the reason is removed."""
    if safe(Meaning.TIER, text, _PROBES, names.words):
        return text
    word, colon, why = text.partition(": ")
    return f"absent: {names.of('reason', why)}" if word == "absent" and colon else names.of("tier", text)


_STAND_IN: dict[Meaning, Callable[[str, Names], str]] = {
    Meaning.ADDRESS: _address,
    Meaning.HOST: lambda text, names: names.of("host", text),
    Meaning.MACHINE_ID: lambda _text, _names: "",
    Meaning.PROCESS: lambda text, names: names.of("process", text),
    Meaning.THREAD: lambda text, names: names.of("thread", text),
    Meaning.TEXT: _text,
    Meaning.SYMBOL: _known_word(Meaning.SYMBOL, "function"),
    Meaning.PROBE: _known_word(Meaning.PROBE, "probe"),
    Meaning.VERSION: _version,
    Meaning.TIER: _tier,
    Meaning.WORD: _known_word(Meaning.WORD, "word"),
}
_meanings = functools.cache(meanings)
_WITH_NAMES = frozenset(
    kind.event for kind in KINDS if any(set(found) & set(_STAND_IN) for found in kind.meanings.values())
)
