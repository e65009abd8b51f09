# SPDX-License-Identifier: Apache-2.0
"""A room imports what lies below it, and nothing else: every import is read, also those inside functions.

The table is also drawn in docs/design.md, and the two are compared. Names of VMMs stay in `vmm/`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.unit.commands.test_cli import ROOT

PACKAGE = ROOT / "ebpf_mig"
BASE = ("errors", "text", "files")
"""Modules of the package root that every room may use; as is the version in `__init__`."""
FACE = ("__init__", "__main__", "cli")
"""Modules of the package root that may use every room."""

ROOMS: dict[str, frozenset[str]] = {
    name: frozenset(below.split())
    for name, below in {
        "base": "",
        "breakdown": "base",
        "linux": "base",
        "recording": "base linux",
        "analysis": "base breakdown linux recording",
        "join": "base breakdown linux recording analysis",
        "lab": "base linux",
        "vmm": "base breakdown linux recording analysis lab",
        "collector": "base breakdown linux recording analysis join vmm",
        "compare": "base breakdown",
        "report": "base breakdown linux recording analysis join vmm collector compare",
        "probes": "base linux recording",
        "tracing": "base linux recording vmm probes",
        "exporter": "base breakdown linux recording analysis vmm collector report probes tracing",
        "commands": "base breakdown linux recording analysis join lab vmm collector compare report probes tracing exporter",
        "face": "base breakdown linux recording analysis join lab vmm collector compare report probes tracing exporter "
        "commands",
    }.items()
}
"""Each room, the lowest first, and those that it may import."""


def room(module: str) -> str:
    """The room of a module, `ebpf_mig.vmm.qemu.lab` say."""
    parts = module.split(".")
    if len(parts) == 1:
        return "face"
    if (PACKAGE / parts[1]).is_dir():
        return parts[1]
    return "base" if parts[1] in BASE else "face" if parts[1] in FACE else parts[1]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of each import of ours, also of those that are made from strings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("ebpf_mig"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            if node.module == "ebpf_mig":
                for alias in node.names:
                    yield node.lineno, "ebpf_mig.errors" if alias.name == "__version__" else f"ebpf_mig.{alias.name}"
            elif node.module and node.module.startswith("ebpf_mig."):
                yield node.lineno, node.module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"ebpf_mig(\.\w+)+", node.value) and _is_module(node.value):
                yield node.lineno, node.value


def _is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").exists()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def upward(path: Path, name: str) -> list[str]:
    """The imports of a module that its room may not have."""
    own = room(name)
    allowed = ROOMS[own] | {own}
    return [
        f"{path}:{line}: {own} imports {module} ({room(module)})"
        for line, module in imports(path)
        if room(module) not in allowed
    ]


FILES = sorted(PACKAGE.rglob("*.py"))


def test_each_import_leads_down() -> None:
    found = [text for path in FILES for text in upward(path, module_of(path))]
    assert not found, "\n".join(found)
