# SPDX-License-Identifier: Apache-2.0
"""A threshold is defined once: no two modules define one of the same name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "ebpf_mig"
THRESHOLD = re.compile(r"_?[A-Z][A-Z0-9_]*_(NS|BYTES)")


def defined_in(path: Path) -> list[str]:
    """The thresholds that a module gives a value."""
    names: list[str] = []
    for node in ast.parse(path.read_text()).body:
        for target in node.targets if isinstance(node, ast.Assign) else ():
            names += [name.id for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [name for name in names if THRESHOLD.fullmatch(name)]


def test_no_threshold_is_defined_twice() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in defined_in(path):
            homes[name.lstrip("_")].append(str(path.relative_to(PACKAGE)))
    assert len(homes) > 40
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}
