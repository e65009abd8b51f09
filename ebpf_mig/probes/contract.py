# SPDX-License-Identifier: Apache-2.0
"""What C and Python must agree on, as static assertions that are compiled with each program.

In: the layouts of records, the members of tables that Python uses, numbers that both halves have. Out: C, appended to
a program's source. A program whose struct or number differs does not compile; the message names what differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ebpf_mig.recording.layout import WORD, Field, Layout


@dataclass(frozen=True)
class Contract:
    """Of one program."""

    records: tuple[Layout, ...]
    """Structs that are equal in both halves, from the first field to the last."""
    members: tuple[Layout, ...] = ()
    """Members that C must have with these types; their order is free and there may be more."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """Constants by their name in C."""

    def assertions(self) -> str:
        """The static assertions, one a line."""
        lines = [line for layout in self.records for line in _record(layout)]
        lines += [_type(layout.struct, member) for layout in self.members for member in layout.fields]
        lines += [_assert(f"{name} == {value}", f"{name} is not {value}") for name, value in self.numbers.items()]
        return "".join(f"{line}\n" for line in lines)


def _assert(condition: str, problem: str) -> str:
    return f'_Static_assert({condition}, "{problem} as in Python");'


def _record(layout: Layout) -> Iterator[str]:
    name = layout.struct
    for member in layout.fields:
        at = WORD * member.at
        yield _assert(f"__builtin_offsetof(struct {name}, {member.name}) == {at}", f"{name}.{member.name}: not at {at}")
        yield _type(name, member)
    yield _assert(f"sizeof(struct {name}) == {layout.size}", f"{name}: not {layout.size} bytes")


def _type(struct: str, member: Field) -> str:
    type_name = "s64" if member.signed else "u64"
    if member.length is not None:
        type_name += f"[{member.length}]"
    same = f"__builtin_types_compatible_p(__typeof__(((struct {struct} *)0)->{member.name}), {type_name})"
    return _assert(same, f"{struct}.{member.name}: not {type_name}")
