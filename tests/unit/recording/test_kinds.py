# SPDX-License-Identifier: Apache-2.0
"""The registry of event kinds has a row for each kind, and each row is true."""

import dataclasses
import re
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest

from ebpf_mig.analysis.process import Process
from ebpf_mig.recording import events as ev
from ebpf_mig.recording.kinds import KINDS, OF_A_PROCESS, RECORD_NAMES, meanings
from ebpf_mig.recording.meaning import Meaning

COMMON_H = Path(__file__).parents[3] / "ebpf_mig/bpf/common.h"


def test_every_event_has_one_row() -> None:
    assert sorted(kind.event.__name__ for kind in KINDS) == sorted(e.__name__ for e in get_args(ev.AnyEvent))


def test_every_number_of_the_kernel_half_has_a_name() -> None:
    numbers = {int(n) for n in re.findall(r"KIND_(?!MAX)\w+ = (\d+),", COMMON_H.read_text())}
    assert set(RECORD_NAMES) == numbers


def test_every_stream_is_a_list_of_a_process() -> None:
    lists = {field.name for field in dataclasses.fields(Process)}
    for kind in KINDS:
        assert bool(kind.stream) == (kind.event in OF_A_PROCESS)
        assert not kind.stream or {kind.stream} <= lists
        assert not kind.stream or "pid" in kind.event.__struct_fields__


@pytest.mark.parametrize(
    "struct", [*(kind.event for kind in KINDS), ev.Header, ev.Target, ev.Remote], ids=lambda s: s.__name__
)
def test_every_text_and_every_instant_says_what_it_means(struct: type[msgspec.Struct]) -> None:
    known = meanings(struct)
    for name, hint in get_type_hints(struct).items():
        if "str" in str(hint):
            assert name in known, f"{struct.__name__}.{name} holds text: give it a meaning"
    if issubclass(struct, ev.Event):
        instants = {
            name
            for name in struct.__struct_fields__
            if re.fullmatch(r"((\w+_)?(begin|end|at|enter|exit)|since|until)_ns", name)
        }
        assert instants == {name for name, found in known.items() if Meaning.INSTANT in found}
