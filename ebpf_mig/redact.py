# SPDX-License-Identifier: Apache-2.0
"""A recording without the names in it, so that it can be shown to others.

In: a recording. Out: the same with hosts, addresses, thread names and free text replaced, the same name by the same
stand-in, so that nothing is lost that a reader needs. Figures, pids and kernel functions stay.
"""

from __future__ import annotations

import msgspec

from ebpf_mig import events as ev
from ebpf_mig.recording import Recording

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
    header = msgspec.structs.replace(
        recording.header,
        host=names.of("host", recording.header.host),
        boot_id="",
        targets=[msgspec.structs.replace(t, comm=names.of("process", t.comm)) for t in recording.header.targets],
        notes=["notes were redacted"] if recording.header.notes else [],
    )
    events = [_event(event, names) for event in recording.events]
    return msgspec.structs.replace(recording, header=header, events=events)


def _event(event: ev.AnyEvent, names: Names) -> ev.AnyEvent:
    match event:
        case ev.Socket():
            return msgspec.structs.replace(
                event, local=_address(event.local, names), remote=_address(event.remote, names)
            )
        case ev.Thread():
            name = f"{_VCPU_NAME} {event.vcpu}" if event.vcpu >= 0 else names.of("thread", event.name)
            return msgspec.structs.replace(event, name=name)
        case ev.Mark():
            detail = event.detail if event.detail in _ACCEPTED_DETAILS else names.of("detail", event.detail)
            return msgspec.structs.replace(event, detail=detail)
        case _:
            return event


def _address(text: str, names: Names) -> str:
    """The port stays: it tells connections apart and names nobody."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal():
        return names.of("address", text)
    return f"{names.of('address', host)}:{port}"
