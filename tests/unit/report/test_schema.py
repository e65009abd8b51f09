# SPDX-License-Identifier: Apache-2.0
"""The published JSON Schema: every property says what it is, and numbers say their unit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest

from ebpf_mig import breakdown
from ebpf_mig.breakdown import Breakdown
from ebpf_mig.compare import diff
from ebpf_mig.compare.benchmark import Benchmark
from ebpf_mig.recording.events import Direction
from ebpf_mig.report.schema import field_docs, schema_of
from tests.unit.commands.test_cli import run

UNIT = re.compile(r"\b(ns|us|bytes|pages/s|ns a page|ms/GiB|parts per billion|[Nn]umbers?|Index of|Process id)\b")
ENUMS = [kind for module in (breakdown, diff) for kind in vars(module).values() if isinstance(kind, type)]
ENUMS = [Direction, *(kind for kind in ENUMS if issubclass(kind, Enum) and kind.__module__.startswith("ebpf_mig"))]


def properties(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, definition in schema["$defs"].items():
        for key, value in definition.get("properties", {}).items():
            yield f"{name}.{key}", value


def is_number(value: dict[str, Any]) -> bool:
    """Also one that can be null, a list of numbers, or numbers by name."""
    if value.get("type") in ("integer", "number"):
        return True
    inner = [*value.get("anyOf", []), *value.get("prefixItems", [])]
    inner += [value[key] for key in ("items", "additionalProperties") if isinstance(value.get(key), dict)]
    return any(is_number(one) for one in inner)


@pytest.mark.parametrize("struct", [Breakdown, Benchmark])
def test_every_property_says_what_it_is_and_numbers_their_unit(struct: type) -> None:
    found = dict(properties(schema_of(struct, "x")))
    assert len(found) > 120
    assert [name for name, value in found.items() if not value.get("description")] == []
    numbers = {name: value["description"] for name, value in found.items() if is_number(value)}
    assert len(numbers) > 70
    assert {name: text for name, text in numbers.items() if not UNIT.search(text)} == {}


def test_the_command_prints_that_schema() -> None:
    printed = json.loads(run("schema").stdout)
    assert printed == json.loads(json.dumps(schema_of(Breakdown, breakdown.SCHEMA)))
    assert printed["$defs"]["Wait"]["properties"]["duration_ns"]["description"] == "The part in that phase, ns."


@pytest.mark.parametrize("kind", ENUMS, ids=lambda kind: kind.__name__)
def test_every_member_of_an_enum_says_what_it_is(kind: type[Enum]) -> None:
    assert kind.__doc__
    assert list(field_docs(kind)) == list(kind.__members__)
