# SPDX-License-Identifier: Apache-2.0
"""Events and headers with any value in any field, by the types of the fields.

In: a struct's type, a text and a number. Out: structs. New fields are included automatically.
"""

from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from ebpf_mig.recording import events as ev
from ebpf_mig.recording.kinds import KINDS

STRUCTS: list[type[msgspec.Struct]] = [
    *(kind.event for kind in KINDS), ev.Header, ev.Target, ev.Remote, ev.ClockPair,
]  # fmt: skip
"""Every struct type of a recording."""


def filled(struct: type[msgspec.Struct], text: str, number: int | dict[str, int] = 1) -> Any:
    """`struct` with that text and number in every field that can hold one. `number` can be given by field name."""
    hints = get_type_hints(struct)
    names = struct.__struct_fields__
    of = {name: number.get(name, 1) if isinstance(number, dict) else number for name in names}
    return struct(**{name: _value(hints[name], text, of[name]) for name in names})


def _value(hint: Any, text: str, number: int) -> Any:
    if hint is str:
        return text
    if hint in (int, bool):
        return hint(number)
    items = get_args(hint)
    if get_origin(hint) is dict:
        return {_value(items[0], text, number): _value(items[1], text, number)}
    if get_origin(hint) is tuple:
        return (_value(items[0], text, number),) * (1 if items[-1] is ... else len(items))
    if get_origin(hint) is list:
        return [_value(items[0], text, number)]
    if items:  # X | None
        return _value(items[0], text, number)
    return filled(hint, text, number)
