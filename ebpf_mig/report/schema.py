# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema of a struct, each property with its description.

In: a struct's type. Out: JSON Schema 2020-12. Descriptions are the docstrings below the fields, so that they are
written only once. Python does not keep them at run time, so they are read from the source.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import msgspec

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_of(struct: type[msgspec.Struct], title: str) -> dict[str, Any]:
    """The schema of `struct` and of all structs in it."""
    (reference,), definitions = msgspec.json.schema_components([struct])
    structs = {kind.__name__: kind for kind in _structs(struct, [])}
    for name, kind in structs.items():
        written = {field.name: field.encode_name for field in msgspec.structs.fields(kind)}
        for key, text in field_docs(kind).items():
            definitions[name]["properties"][written[key]]["description"] = text
    return {"$schema": _DIALECT, "title": title, **reference, "$defs": definitions}


def _structs(hint: Any, found: list[type[msgspec.Struct]]) -> list[type[msgspec.Struct]]:
    """All structs in a type, also those in the fields of others."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct) and hint not in found:
        found.append(hint)
        for field in msgspec.structs.fields(hint):
            _structs(field.type, found)
    for item in get_args(hint):
        _structs(item, found)
    return found


def field_docs(kind: type) -> dict[str, str]:
    """The docstring below each field of a struct, or below each member of an enum, by name."""
    return _docs_in(inspect.getsourcefile(kind) or "").get(kind.__name__, {})


@cache
def _docs_in(path: str) -> dict[str, dict[str, str]]:
    tree = ast.parse(Path(path).read_text("utf-8"))
    return {node.name: _below(node.body) for node in tree.body if isinstance(node, ast.ClassDef)}


def _below(body: list[ast.stmt]) -> dict[str, str]:
    found: dict[str, str] = {}
    for field, doc in pairwise(body):
        match field, doc:
            case (
                ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = " ".join(text.split())
    return found
