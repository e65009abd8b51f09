# SPDX-License-Identifier: Apache-2.0
"""What C and Python must agree on, as static assertions that are compiled into each program.

In: the layouts of records, the table members that Python uses, and shared constants. Out: C code that is appended to a
program's source. If a struct or a constant differs, the program does not compile and the message names the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ebpf_mig.recording.layout import WORD, Field, Layout


@dataclass(frozen=True)
class Contract:
    """The contract of one BPF program."""

    records: tuple[Layout, ...]
    """Structs that must be identical in C and Python, from the first field to the last."""
    members: tuple[Layout, ...] = ()
    """Members that the C structs must have, with their types. Order is free, and other members are allowed."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """Constants, by their C name."""

    def assertions(self) -> str:
        """The static assertions, one per line."""
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
